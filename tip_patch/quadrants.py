"""The four quadrants of tokens, and the shares of each: logged every few steps.

Q1 uncertain and disputed (high h, high δ) · Q2 uncertain, agreed · Q3 overconfident (low h, high δ) · Q4 solved.
The paper does not state its thresholds; ours are settings and are logged beside the shares. Words such as "sure" are
used for splits in nats only: a token below a median of 3.5 nats is not sure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from opsd.selection import TokenSelector, TokenStats
from opsd.utils.errors import UserError
from opsd.viewer.labels import Label, Labels
from tip_patch.groups import quantile
from tip_patch.selector import read_field

QUADRANTS = (1, 2, 3, 4)
# One palette for every picture of tokens: the viewer's, the report's and the oracle's.
QUADRANT_LABELS = (
    Label(1, "Q1", "unsure, teacher disagrees", "#e2703a", clearest={"entropy": 1, "reverse_kl": 1}, examples=2),
    Label(2, "Q2", "unsure, teacher agrees", "#e8ba3a", clearest={"entropy": 1, "reverse_kl": -1}, examples=1),
    Label(3, "Q3", "sure, teacher disagrees", "#c765ab", clearest={"entropy": -1, "reverse_kl": 1}, examples=3),
    Label(4, "Q4", "sure, teacher agrees", "#9aa7b1", True, {"entropy": -1, "reverse_kl": -1}, examples=1),
)


def quadrant_labels(entropy_N: Tensor, reverse_kl_N: Tensor, entropy_split: float, divergence_split: float) -> Tensor:
    """1 to 4 for each token, int8 [N]; "high" is strictly above the split (nats)."""
    uncertain_N, disputed_N = entropy_N > entropy_split, reverse_kl_N > divergence_split
    return (4 - 2 * uncertain_N.to(torch.int8) - disputed_N.to(torch.int8)).to(torch.int8)


def check_split(option: str, split: str | float) -> str:
    """A split as `split_at` reads it. Raises UserError, naming `option`, for anything else."""
    text = str(split).strip()
    number = text.removeprefix("q")
    try:
        fits = text in ("median", "mean") or 0.0 <= float(number) <= (1.0 if number != text else float("inf"))
    except ValueError:
        fits = False
    if not fits:
        raise UserError(f"{option} {split!r}: give median, mean, a quantile such as q0.8, or nats")
    return text


def split_at(values_N: Tensor, split: str) -> float:
    """Where an axis is split, in nats: "median", "mean", "q0.8" (that quantile) or a number; 0 for no values."""
    if split not in ("median", "mean") and not split.startswith("q"):
        return float(split)
    if not values_N.numel():
        return 0.0
    if split == "mean":
        return float(values_N.double().mean())
    return float(quantile(values_N, 0.5 if split == "median" else float(split[1:])))


def _is_nats(split: str, nats: float) -> bool:
    """Whether the split was set to this number of nats."""
    return split not in ("median", "mean") and not split.startswith("q") and float(split) == nats


@dataclass(eq=False)
class QuadrantTelemetry:
    """Shares of the four quadrants, and their part of loss, gradient and kept tokens.

    entropy_split, divergence_split: thresholds of h and δ: a number of nats, "median" or "mean" of the step's tokens,
    or "q0.8" for a quantile of them.

    Keys, for Q1 to Q4: quadrant/q1_frac (share of tokens), q1_loss_frac (of Σδ), q1_grad_frac (of Σ‖logit gradient‖),
    q1_kept_frac (fraction of the quadrant that was trained on; absent if it is empty); the two splits in nats; and the
    teacher's entropy, which the paper finds nearly constant: mean, standard deviation (nats), and the median over
    tokens of exp(−H), the probability of a typical token under the teacher.
    Errors: UserError for a split that is none of these.
    """

    entropy_split: str = "0.3"
    divergence_split: str = "0.3"

    needs = frozenset({"entropy_N", "reverse_kl_N", "teacher_entropy_N", "grad_norm_N"})
    labels: ClassVar[Labels] = {"quadrant": QUADRANT_LABELS}

    def __post_init__(self) -> None:
        for option in ("entropy_split", "divergence_split"):
            setattr(self, option, check_split(option, getattr(self, option)))

    def __call__(
        self, stats: TokenStats, kept_N: Tensor, selector: TokenSelector | None, seed: int
    ) -> dict[str, float]:
        """The numbers of one step; none for a step without tokens."""
        if not stats.rollout_N.numel():
            return {}
        entropy_split, divergence_split = self._splits(stats)
        quadrant_N = self.label_tokens(stats)["quadrant"]
        return {
            **_shares(quadrant_N, stats, kept_N.to(quadrant_N.device)),
            "quadrant/entropy_split_nats": entropy_split,
            "quadrant/divergence_split_nats": divergence_split,
            **_teacher(stats.teacher_entropy_N),
        }

    def label_tokens(self, stats: TokenStats) -> dict[str, Tensor]:
        """A column for the token record: quadrant, int8 [N], 1 to 4."""
        entropy_N, reverse_kl_N = (read_field(stats, name, "quadrants") for name in ("entropy_N", "reverse_kl_N"))
        return {"quadrant": quadrant_labels(entropy_N, reverse_kl_N, *self._splits(stats))}

    def labels_at(self, splits: dict[str, float]) -> Labels:
        """The labels of a record that was split at these nats; in words if this telemetry was set to these."""
        told = {"entropy": self.entropy_split, "divergence": self.divergence_split}
        if not splits or all(_is_nats(told[axis], nats) for axis, nats in splits.items() if axis in told):
            return self.labels
        h, delta = (f"{splits.get(axis, 0.0):.2g}" for axis in told)
        what = {1: (">", ">"), 2: (">", "≤"), 3: ("≤", ">"), 4: ("≤", "≤")}
        signs = [(label, *what[label.value]) for label in QUADRANT_LABELS]
        return {"quadrant": tuple(replace(label, what=f"h {a} {h}, δ {b} {delta} nats") for label, a, b in signs)}

    def _splits(self, stats: TokenStats) -> tuple[float, float]:
        entropy_N, reverse_kl_N = (read_field(stats, name, "quadrants") for name in ("entropy_N", "reverse_kl_N"))
        return split_at(entropy_N, self.entropy_split), split_at(reverse_kl_N, self.divergence_split)


def _shares(quadrant_N: Tensor, stats: TokenStats, kept_N: Tensor) -> dict[str, float]:
    """Each quadrant's share of tokens, loss and gradient, and the fraction of it that was kept."""
    masses = {"frac": torch.ones_like(quadrant_N), "loss_frac": stats.reverse_kl_N, "grad_frac": stats.grad_norm_N}
    numbers: dict[str, float] = {}
    for name, mass_N in masses.items():
        if mass_N is not None:
            mass_5 = _sum_by(quadrant_N, mass_N)
            total = float(mass_5.sum())
            numbers |= {f"quadrant/q{q}_{name}": float(mass_5[q]) / total if total else 0.0 for q in QUADRANTS}
    count_5, kept_5 = _sum_by(quadrant_N, torch.ones_like(quadrant_N)), _sum_by(quadrant_N, kept_N)
    numbers |= {f"quadrant/q{q}_kept_frac": float(kept_5[q] / count_5[q]) for q in QUADRANTS if count_5[q]}
    return numbers


def _sum_by(quadrant_N: Tensor, mass_N: Tensor) -> Tensor:
    """Σ mass over each quadrant, fp64 [5]; entry 0 is unused."""
    sums_5 = torch.zeros(5, dtype=torch.float64, device=quadrant_N.device)
    return sums_5.index_add(0, quadrant_N.long(), mass_N.double()).cpu()


def _teacher(entropy_N: Tensor | None) -> dict[str, float]:
    if entropy_N is None:
        return {}
    return {
        "teacher/entropy_nats": float(entropy_N.double().mean()),
        "teacher/entropy_std_nats": float(entropy_N.double().std(correction=0)),
        "teacher/typical_prob_median": float(quantile(torch.exp(-entropy_N), 0.5)),
    }
