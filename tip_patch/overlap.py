"""How much the other rules would have agreed with the mask that was trained on."""

from __future__ import annotations

from dataclasses import dataclass

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
    """|both| / |either| of two masks; 1 where neither keeps a token."""
    either = int((first_N | second_N).sum())
    return int((first_N & second_N).sum()) / either if either else 1.0


@dataclass(eq=False)
class ShadowMasks:
    """Overlap (Jaccard) of the trained mask with every other rule's at the same budget.

    Keys: select/jaccard_<rule>. A shadow keeps as many tokens of each rollout as were trained on, whichever rule chose
    them; it normalises over the step's tokens, or over rollouts where the active rule does, and with the active rule's
    clip. Two masks of one random rule would say nothing of the rule: the active one is left out. No keys where all
    tokens are trained on. select/jaccard_random says what chance alone gives.
    """

    needs = frozenset({"entropy_N", "reverse_kl_N", "forward_kl_N"})

    def __call__(
        self, stats: TokenStats, kept_N: Tensor, selector: TokenSelector | None, seed: int
    ) -> dict[str, float]:
        """The overlaps of one step."""
        kept_N = kept_N.to(stats.rollout_N.device)
        if not kept_N.numel() or bool(kept_N.all()):
            return {}
        rollouts = Rollouts.of(stats.rollout_N)
        budget_R = rollouts.sum(kept_N.long())
        active = getattr(selector, "name", None)
        scope = "rollout" if getattr(selector, "normalise_over", None) == "rollout" else "batch"
        clip_quantile = getattr(selector, "clip_quantile", Selector.clip_quantile)
        overlaps: dict[str, float] = {}
        for rule in RULES:
            if rule.name == active:
                continue
            shadow = rule(normalise_over=scope, clip_quantile=clip_quantile)
            if any(getattr(stats, field) is None for field in rule.needs):
                continue
            shadow.prepare(stats)
            shadow_N = shadow.choose(stats, rollouts, budget_R, seed).kept_N
            overlaps[f"select/jaccard_{rule.name}"] = jaccard(kept_N, shadow_N)
        return overlaps
