"""The student writes: engines that turn prompts into rollouts."""

from opsd.rollout.base import Rollout, RolloutEngine, Sampling
from opsd.rollout.hf import HFRollout

__all__ = ["HFRollout", "Rollout", "RolloutEngine", "Sampling"]
