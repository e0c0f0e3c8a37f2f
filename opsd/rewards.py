"""Loss weights from rewards: a prompt's better rollouts count for more (the base repository's OPD_REWARD_BETA)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from opsd.utils.errors import UserError


def reward_weights(rewards: Sequence[float], prompt_ids: Sequence[Hashable], beta: float) -> Tensor:
    """n·softmax(reward/β) over each prompt's n rollouts: one loss weight a rollout, fp32, in the order given.

    The weights of a prompt have mean 1; β → ∞ gives all ones. Compute them over whole prompts, before rollouts are
    spread over micro-batches. Errors: UserError for β ≤ 0 or lists of different lengths.
    """
    if not beta > 0:
        raise UserError(f"reward weights: beta {beta}: give a number above 0")
    if len(rewards) != len(prompt_ids):
        raise UserError(f"{len(rewards)} rewards for {len(prompt_ids)} rollouts: give one each")
    members: dict[Hashable, list[int]] = {}
    for place, prompt in enumerate(prompt_ids):
        members.setdefault(prompt, []).append(place)
    weights = torch.empty(len(rewards))
    for places in members.values():
        scaled = torch.tensor([rewards[place] for place in places], dtype=torch.float64) / beta
        weights[places] = (len(places) * scaled.softmax(0)).float()
    return weights
