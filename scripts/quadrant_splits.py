#!/usr/bin/env python
"""Which splits of entropy and divergence give the paper's shares of the four quadrants, from a token record alone.

    python scripts/quadrant_splits.py runs/mine/tokens/step_1.parquet --out docs/results/splits_pocket.json

The paper reports 40–47 % Q4, 40–52 % Q1 + Q2 and 3–15 % Q3 but not its thresholds. Every pair of the given
splits is tried and reported with the shares of tokens, of loss (Σδ) and of gradient (Σ‖logit gradient‖).
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import tyro
from torch import Tensor

from opsd.utils.errors import UserError, exits_on_bad_input
from reporting.tables import TextTable
from tip_patch.quadrants import QUADRANTS, check_split, quadrant_labels, split_at

SPLITS = ("median", "mean", "q0.6", "q0.7", "q0.8", "q0.9", "0.01", "0.03", "0.1", "0.3", "1")
# Fractions of tokens that the paper reports.
PAPER = {"q4": (0.40, 0.47), "q1 + q2": (0.40, 0.52), "q3": (0.03, 0.15)}
COLUMNS = ("entropy", "reverse_kl", "grad_norm")


@dataclass(frozen=True)
class Shares:
    """One pair of splits. nats: thresholds of h and δ. tokens, loss, gradient: fractions in Q1 to Q4."""

    entropy_split: str
    divergence_split: str
    nats: tuple[float, float]
    tokens: list[float]
    loss: list[float]
    gradient: list[float]

    @property
    def misses(self) -> float:
        """How far the shares of tokens lie outside the paper's ranges, added up; 0 if they fit."""
        q1, q2, q3, q4 = self.tokens
        found = {"q4": q4, "q1 + q2": q1 + q2, "q3": q3}
        return sum(max(low - found[name], found[name] - high, 0.0) for name, (low, high) in PAPER.items())


def read_tokens(file: Path) -> dict[str, Tensor]:
    """The record's entropy, reverse KL and gradient norm, fp64 [N]. Raises UserError if it lacks one."""
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); give RUN/tokens/step_N.parquet") from error
    if missing := [name for name in COLUMNS if name not in table]:
        raise UserError(f"{file} has no column {missing[0]}; record tokens with --telemetry.save_tokens True")
    return {name: torch.tensor(table[name].to_numpy(), dtype=torch.float64) for name in COLUMNS}


def shares(tokens: dict[str, Tensor], entropy_split: str, divergence_split: str) -> Shares:
    """The quadrants' shares under one pair of splits (see `quadrants.split_at`)."""
    entropy_N, reverse_kl_N = tokens["entropy"], tokens["reverse_kl"]
    nats = split_at(entropy_N, entropy_split), split_at(reverse_kl_N, divergence_split)
    quadrant_N = quadrant_labels(entropy_N, reverse_kl_N, *nats)

    def of(mass_N: Tensor) -> list[float]:
        total = float(mass_N.sum()) or 1.0
        return [float(mass_N[quadrant_N == quadrant].sum()) / total for quadrant in QUADRANTS]

    masses = (torch.ones_like(entropy_N), reverse_kl_N, tokens["grad_norm"])
    return Shares(entropy_split, divergence_split, nats, *map(of, masses))


def as_table(found: list[Shares], title: str) -> TextTable:
    """A row per pair, shares in percent."""
    rows = []
    for one in found:
        numbers = [" / ".join(f"{100 * share:.0f}" for share in part) for part in (one.tokens, one.loss, one.gradient)]
        split = f"h {one.entropy_split} ({one.nats[0]:.3g}), δ {one.divergence_split} ({one.nats[1]:.3g})"
        rows.append([split, *numbers, "yes" if not one.misses else f"{100 * one.misses:.0f} points off"])
    heads = ["split (nats)", "tokens, %\nQ1 / Q2 / Q3 / Q4", "loss, %", "gradient, %", "matches the paper"]
    return TextTable(title, heads, rows)


def main(
    record: Annotated[Path, tyro.conf.Positional],
    out: Path | None = None,
    splits: tuple[str, ...] = SPLITS,
    shown: int = 10,
    markdown: bool = False,
) -> None:
    """The quadrants' shares under every pair of splits, those closest to the paper's first.

    Args:
        record: A step's token record, RUN/tokens/step_N.parquet.
        out: JSON file for all pairs.
        splits: For each axis: median, mean, a quantile such as q0.8, or nats.
        shown: How many pairs are printed.
        markdown: Print the table as Markdown.
    """
    tokens = read_tokens(record)
    splits = tuple(check_split("--splits", split) for split in splits)
    found = [shares(tokens, *pair) for pair in itertools.product(splits, splits)]
    found.sort(key=lambda one: one.misses)
    fits = sum(not one.misses for one in found)
    title = (
        f"{len(tokens['entropy'])} tokens of {record}: {fits} of {len(found)} pairs of splits give the paper's shares"
    )
    table = as_table(found[:shown], title)
    table.show(markdown)
    if out is not None:
        values: dict[str, Any] = {"record": str(record), "tokens": len(tokens["entropy"]), "paper": PAPER}
        rows = [vars(one) | {"fits": not one.misses} for one in found]
        out.write_text(json.dumps(values | {"pairs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    with exits_on_bad_input("quadrant_splits"):
        tyro.cli(main)
