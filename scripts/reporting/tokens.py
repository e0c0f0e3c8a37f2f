"""Figure 2 from measured tokens: where they lie on the plane of entropy and divergence, and each quadrant's share."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from opsd.utils.errors import UserError, first_line
from reporting.runs import Run
from reporting.stats import BASELINE
from reporting.theme import QUADRANT_COLOURS, count_colours, ink

# Smaller values are drawn at this one: a logarithmic axis has no zero.
FLOOR_NATS = 1e-6
# Position of each quadrant's label, outside the axes: (x, y, right-aligned).
CORNERS = {1: (1.0, 1.03, True), 2: (1.0, -0.19, True), 3: (0.0, 1.03, False), 4: (0.0, -0.19, False)}


@dataclass(frozen=True)
class Tokens:
    """Measured tokens [N] of some runs: h and δ in nats, quadrants 1 to 4; splits: mean thresholds in nats."""

    entropy_N: np.ndarray
    reverse_kl_N: np.ndarray
    quadrant_N: np.ndarray
    splits: tuple[float, float] | None
    source: str

    @property
    def words(self) -> str:
        """The picture's caption."""
        return (
            f"Measured: {self.source}. Dashed: where the quadrants are split (means over steps), so a token near a "
            "line may be on the other side in its own step. Values below 1e-6 nats are drawn at 1e-6."
        )


def read_tokens(group: list[Run]) -> Tokens | None:
    """All recorded tokens of the runs on all tokens, or of every run if those recorded none; None if there are none.

    Raises UserError for a record that cannot be read.
    """
    recorded = [run for run in group if list((run.path / "tokens").glob("step_*.parquet"))]
    baseline = [run for run in recorded if run.cell == BASELINE]
    runs = baseline or recorded
    if not runs:
        return None
    files = [file for run in runs for file in sorted((run.path / "tokens").glob("step_*.parquet"))]
    tables = [table for file in files if (table := _table(file)) is not None]
    if not tables:
        return None
    whole = pd.concat(tables, ignore_index=True)
    splits = [
        [value for run in runs for value in run.logged(f"quadrant/{axis}_split_nats")]
        for axis in ("entropy", "divergence")
    ]
    return Tokens(
        whole["entropy"].to_numpy(dtype=float),
        whole["reverse_kl"].to_numpy(dtype=float),
        whole["quadrant"].to_numpy(dtype=int),
        (float(np.mean(splits[0])), float(np.mean(splits[1]))) if all(splits) else None,
        f"{len(whole):,} tokens of {len(tables)} steps, "
        + ("trained on all tokens" if baseline else ", ".join(dict.fromkeys(str(run.cell) for run in runs))),
    )


def plane(tokens: Tokens) -> Figure:
    """Tokens as hexagons, coloured by their number; the splits dashed; each quadrant's share of tokens and of Σδ."""
    figure, ax = plt.subplots(figsize=(7.4, 5.2), layout="constrained")
    x_N, y_N = (np.maximum(values, FLOOR_NATS) for values in (tokens.entropy_N, tokens.reverse_kl_N))
    hexagons = ax.hexbin(
        x_N,
        y_N,
        gridsize=46,
        xscale="log",
        yscale="log",
        mincnt=1,
        norm=LogNorm(),
        cmap=count_colours(),
        linewidths=0.2,
    )
    figure.colorbar(hexagons, ax=ax, label="tokens", shrink=0.8)
    if tokens.splits is not None:
        ax.axvline(max(tokens.splits[0], FLOOR_NATS), color=ink(), linestyle="--", linewidth=1)
        ax.axhline(max(tokens.splits[1], FLOOR_NATS), color=ink(), linestyle="--", linewidth=1)
    total = tokens.reverse_kl_N.sum()
    for quadrant, (x, y, right) in CORNERS.items():
        own_N = tokens.quadrant_N == quadrant
        loss = tokens.reverse_kl_N[own_N].sum() / total if total else 0.0
        ax.text(
            x,
            y,
            f"Q{quadrant}: {100 * own_N.mean():.1f} % of tokens, {100 * loss:.1f} % of Σδ",
            transform=ax.transAxes,
            ha="right" if right else "left",
            fontsize=9,
            bbox={"facecolor": QUADRANT_COLOURS[quadrant - 1], "alpha": 0.85, "edgecolor": "none", "pad": 4},
            color="#1d2126",
        )
    ax.set_xlabel("student entropy h, nats")
    ax.set_ylabel("divergence δ = KL(student‖teacher), nats")
    return figure


def _table(file: object) -> pd.DataFrame | None:
    """A record's three columns; None if it was written without them."""
    try:
        table = pd.read_parquet(str(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}); move it away") from error
    return table if {"entropy", "reverse_kl", "quadrant"} <= set(table) and len(table) else None
