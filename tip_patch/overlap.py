"""How much the other rules would have agreed with the mask that was trained on, and where each ranks the stop."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd.selection import TokenSelector, TokenStats
from tip_patch.baselines import FirstFraction
from tip_patch.groups import Rollouts
from tip_patch.selector import Selector
from tip_patch.selectors import Q3, Divergence, Entropy, EntropySample, Random, SoftOr, SoftOrBottom

RULES: tuple[type[Selector], ...] = (
    EntropySample,
    Entropy,
    SoftOr,
    SoftOrBottom,
    Q3,
    Divergence,
    Random,
    FirstFraction,
)


def jaccard(first_N: Tensor, second_N: Tensor) -> float:
    """|both| / |either| of two masks; 1 if neither keeps a token."""
    either = int((first_N | second_N).sum())
    return int((first_N & second_N).sum()) / either if either else 1.0


def place_in_rollout(score_N: Tensor, rollouts: Rollouts) -> Tensor:
    """The fraction of its rollout's other tokens that each scores above, from 0 (lowest) to 1 (highest); 1 if alone."""
    others_N = (rollouts.counts_R[rollouts.index_N] - 1).double()
    return torch.where(others_N > 0, rollouts.smaller(score_N).double() / others_N.clamp_min(1), 1.0)


@dataclass(eq=False)
class ShadowMasks:
    """Overlap (Jaccard) of the trained mask with every other rule's at the same budget, and where each ranks the stop.

    Keys: select/jaccard_<rule>. stop/score_percentile_<rule>: the fraction of its rollout's other tokens that a token
    which ends a turn scores above, averaged over these tokens, also without a selector; stop/score_percentile is the
    active rule's. stop/kept_frac_<rule>: the fraction of them that the shadow keeps.

    A shadow keeps as many tokens of each rollout as were trained on, whichever rule chose them; it normalises over
    the step's tokens, or over rollouts if the active rule does, and with the active rule's clip. The active
    rule is left out: two masks of one random rule would tell nothing about it. No masks if all tokens are trained on.
    select/jaccard_random is the overlap that chance alone gives.
    """

    needs = frozenset({"entropy_N", "reverse_kl_N", "forward_kl_N"})

    def __call__(
        self, stats: TokenStats, kept_N: Tensor, selector: TokenSelector | None, seed: int
    ) -> dict[str, float]:
        """The overlaps of one step."""
        kept_N = kept_N.to(stats.rollout_N.device)
        if not kept_N.numel():
            return {}
        rollouts, stop_N = Rollouts.of(stats.rollout_N), stats.stop_N
        if stop_N is not None and not stop_N.any():
            stop_N = None
        budget_R = rollouts.sum(kept_N.long())
        active = getattr(selector, "name", None)
        scope = "rollout" if getattr(selector, "normalise_over", None) == "rollout" else "batch"
        clip_quantile = getattr(selector, "clip_quantile", Selector.clip_quantile)
        numbers: dict[str, float] = {}
        if stop_N is not None and isinstance(selector, Selector):
            own = dataclasses.replace(selector, normalise_over=scope)
            numbers |= _percentile("stop/score_percentile", own, stats, rollouts, seed)
        for rule in RULES:
            if rule.name == active or any(getattr(stats, field) is None for field in rule.needs):
                continue
            shadow = rule(normalise_over=scope, clip_quantile=clip_quantile)
            if stop_N is not None:
                numbers |= _percentile(f"stop/score_percentile_{rule.name}", shadow, stats, rollouts, seed)
            if kept_N.all():
                continue
            shadow.prepare(stats)
            shadow_N = shadow.choose(stats, rollouts, budget_R, seed).kept_N
            numbers[f"select/jaccard_{rule.name}"] = jaccard(kept_N, shadow_N)
            if stop_N is not None:
                numbers[f"stop/kept_frac_{rule.name}"] = float(shadow_N[stop_N].double().mean())
        return numbers


def _percentile(key: str, rule: Selector, stats: TokenStats, rollouts: Rollouts, seed: int) -> dict[str, float]:
    """Where the rule ranks the tokens that end a turn; nothing for a rule that does not rank."""
    if type(rule).score is Selector.score:
        return {}
    assert stats.stop_N is not None
    rule.prepare(stats)
    place_N = place_in_rollout(rule.score(stats, rollouts, seed), rollouts)
    return {key: float(place_N[stats.stop_N].mean())}
