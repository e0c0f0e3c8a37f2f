"""Engines with which the student turns prompts into rollouts."""

from opsd.rollout.base import RolloutEngine
from opsd.rollout.hf import HFRollout

__all__ = ["HFRollout", "RolloutEngine"]
