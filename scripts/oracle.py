#!/usr/bin/env python
"""Proposition 1 on a small pair of models: the descent of a step along each quadrant's gradient, and a figure.

    python scripts/oracle.py --student assets/pocket/student --teacher assets/pocket/teacher \\
        --prompts assets/pocket/train.jsonl --out runs/oracle

The student writes two sets of rollouts on different prompts. The first gives ∇L; every token of the second gets its own
gradient. Writes oracle.json and oracle.png. Memory: 16 gradients of the whole student at once, so keep it small.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from transformers.utils.logging import disable_progress_bar
from tyro.conf import arg

from opsd.data.packing import pack
from opsd.data.prompts import load_prompts
from opsd.data.rendering import PromptFormat
from opsd.model.loading import load_scorer, load_tokenizer
from opsd.model.scorer import Scorer
from opsd.rollout import HFRollout
from opsd.types import MicroBatch, Prompt, Sampling
from opsd.utils.errors import UserError, exits_on_bad_input
from opsd.utils.seeding import derive_seed
from reporting.tables import TextTable
from tip_patch.oracle import QuadrantWorth, TokenWorth, by_quadrant, mean_gradient, measure
from tip_patch.quadrants import QUADRANT_LABELS, check_split, quadrant_labels, split_at

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Args:
    """Models, rollouts, and thresholds of the quadrants."""

    student: str
    teacher: str
    prompts: str
    out: Path
    prompt_format: str = "raw"
    """raw or chat."""
    rollouts: int = 96
    """Rollouts, one per prompt, whose tokens are measured."""
    held_out: int = 192
    """Rollouts on other prompts, which give ∇L."""
    max_new_tokens: int = 48
    splits: Annotated[tuple[str, ...], arg(metavar="H,DELTA")] = ("0.1,0.1", "median,mean", "median,median")
    """Pairs of thresholds for entropy and reverse KL: median, mean, a quantile such as q0.8, or nats. The first is
    drawn."""
    seed: int = 0


def write_rollouts(args: Args, scorer: Scorer, tokenizer: Any) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """The measured rollouts and the held-out ones, one rollout per micro-batch."""
    prompts, _ = load_prompts(args.prompts, tokenizer, PromptFormat(kind=args.prompt_format))
    wanted = args.rollouts + args.held_out
    if len(prompts) < wanted:
        raise UserError(f"{args.prompts} holds {len(prompts)} prompts: give {wanted}, or ask for fewer rollouts")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(derive_seed(args.seed, "prompts")))
    chosen: list[Prompt] = [prompts[place] for place in order[:wanted].tolist()]
    engine = HFRollout(scorer.model, tokenizer, wanted)
    rollouts = engine.generate(chosen, 1, Sampling(max_new_tokens=args.max_new_tokens), args.seed)
    micros = [micro for rollout in rollouts for micro in pack([rollout], sys.maxsize)]
    return micros[: args.rollouts], micros[args.rollouts :]


@torch.no_grad()
def teacher_logs(teacher: Scorer, micros: list[MicroBatch], vocab_size: int) -> list[Tensor]:
    """The teacher's log-probabilities at each micro-batch's student tokens [N, V]."""
    return [teacher.head.as_head().logits(teacher.hidden(m), vocab_size).log_softmax(-1) for m in micros]


def measure_pair(args: Args) -> TokenWorth:
    """Load, write, score, differentiate."""
    for name in args.splits:
        read_splits(name)
    tokenizer = load_tokenizer(args.student, "--student")
    student = load_scorer(args.student, "--student", torch.float32, CPU)
    teacher = load_scorer(args.teacher, "--teacher", torch.float32, CPU)
    measured, held_out = write_rollouts(args, student, tokenizer)
    vocab_size = min(student.head.weight.shape[0], teacher.head.weight.shape[0])
    # torch.func differentiates plain matrix products, not the fused attention kernels.
    student.model.set_attn_implementation("eager")
    gradient_P = mean_gradient(student.model, held_out, teacher_logs(teacher, held_out, vocab_size))
    return measure(student.model, measured, teacher_logs(teacher, measured, vocab_size), gradient_P)


def read_splits(name: str) -> tuple[str, str]:
    """Both thresholds of "H,DELTA". Raises UserError."""
    parts = name.split(",")
    if len(parts) != 2:
        raise UserError(f"--splits {name}: give H,DELTA, e.g. median,mean or 0.1,0.1")
    return check_split("--splits", parts[0]), check_split("--splits", parts[1])


@dataclass(frozen=True)
class Split:
    """The results of one pair of thresholds (nats), and each token's quadrant."""

    name: str
    entropy_nats: float
    divergence_nats: float
    quadrants: dict[int, QuadrantWorth]
    quadrant_of: np.ndarray


def split_tokens(worth: TokenWorth, name: str, seed: int) -> Split:
    """Proposition 1 under one pair of thresholds, written "H,DELTA"."""
    entropy_N, reverse_kl_N = torch.from_numpy(worth.entropy), torch.from_numpy(worth.reverse_kl)
    first, second = read_splits(name)
    at = split_at(entropy_N, first), split_at(reverse_kl_N, second)
    quadrant_of = quadrant_labels(entropy_N, reverse_kl_N, *at).numpy()
    return Split(name, *at, by_quadrant(worth, quadrant_of, seed=seed), quadrant_of)


def print_tables(worth: TokenWorth, splits: list[Split], console: Console) -> None:
    """One table for each split."""
    console.print(f"{len(worth.entropy)} tokens, ‖∇L‖ = {worth.gradient_square**0.5:.4g}")
    heads = ["", "share", "φ", "M", "w*·ηβ", "φ²/2M·β [95 %]", "‖∇L‖²cos²/2·β [95 %]", "share of Σφ", "local"]
    for split in splits:
        rows = [
            [
                f"Q{q}",
                *(f"{value:.3g}" for value in (row.share, row.alignment, row.square, row.weight)),
                _with_interval(row.descent, row.descent_interval),
                _with_interval(row.token_descent, row.token_descent_interval),
                f"{row.descent_share:.3f}",
                f"{row.local_median:.3g}",
            ]
            for q, row in split.quadrants.items()
        ]
        title = f"h > {split.entropy_nats:.3g}, δ > {split.divergence_nats:.3g} nats ({split.name})"
        console.print(TextTable(title, heads, rows).rich())


def _with_interval(value: float, ends: tuple[float, float]) -> str:
    return f"{value:.3g} [{ends[0]:.2g}, {ends[1]:.2g}]"


def draw(worth: TokenWorth, split: Split, path: Path) -> None:
    """Where the tokens lie, and both descents of each quadrant with their intervals."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    where, mean_step, own_step = figure.subplots(1, 3)
    floor = 1e-5
    for q in split.quadrants:
        mine = split.quadrant_of == q
        h, delta = (np.maximum(values[mine], floor) for values in (worth.entropy, worth.reverse_kl))
        where.plot(h, delta, ".", ms=3, alpha=0.5, color=QUADRANT_LABELS[q - 1].colour, label=f"Q{q} {mine.mean():.0%}")
    where.set(xscale="log", yscale="log", xlabel="student entropy h (nats)", ylabel="KL(student‖teacher) δ (nats)")
    where.axvline(max(split.entropy_nats, floor), color="black", lw=0.6)
    where.axhline(max(split.divergence_nats, floor), color="black", lw=0.6)
    where.legend(loc="upper left", fontsize=8, markerscale=3)
    names = [f"Q{q}" for q in split.quadrants]
    colours = [QUADRANT_LABELS[q - 1].colour for q in split.quadrants]
    for ax, field, title in (
        (mean_step, "descent", "φ²/(2βM): one step for the quadrant"),
        (own_step, "token_descent", "‖∇L‖²cos²/(2β): each token alone"),
    ):
        values = np.array([getattr(row, field) for row in split.quadrants.values()])
        ends = np.array([getattr(row, f"{field}_interval") for row in split.quadrants.values()]).T
        errors = np.maximum(np.abs(ends - values), 0.0)
        ax.bar(names, values, color=colours, yerr=errors, capsize=3)
        ax.set_title(title, fontsize=10)
        ax.set_ylabel("descent, units of 1/β")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, write."""
    args = tyro.cli(Args, description=__doc__)
    disable_progress_bar()
    with exits_on_bad_input("oracle"):
        worth = measure_pair(args)
        splits = [split_tokens(worth, name, args.seed) for name in args.splits]
    args.out.mkdir(parents=True, exist_ok=True)
    print_tables(worth, splits, Console(width=150))
    found = {
        "settings": {name: str(value) for name, value in dataclasses.asdict(args).items()},
        "tokens": len(worth.entropy),
        "gradient_norm": worth.gradient_square**0.5,
        "splits": [
            {
                "entropy_nats": split.entropy_nats,
                "divergence_nats": split.divergence_nats,
                **{f"q{q}": dataclasses.asdict(row) for q, row in split.quadrants.items()},
            }
            for split in splits
        ],
    }
    (args.out / "oracle.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(worth, splits[0], args.out / "oracle.png")


if __name__ == "__main__":
    main()
