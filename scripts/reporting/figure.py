"""A report's picture: accuracy by cell, and which quadrants the tokens fell in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from reporting.stats import CellCost, CellStats, Estimate
from reporting.theme import as_written

# Okabe and Ito's colours, told apart by colour-blind readers.
SELECTOR_COLOURS = {"all": "#6b6b6b", "entropy_sample": "#e69f00", "soft_or": "#0072b2"}
OTHER_COLOUR = "#009e73"
QUADRANT_COLOURS = ("#d55e00", "#f0c350", "#cc79a7", "#c9d3da")
QUADRANT_NAMES = ("Q1 unsure, disagrees", "Q2 unsure, agrees", "Q3 sure, disagrees", "Q4 sure, agrees")


@dataclass(frozen=True)
class Panel:
    """One row of the picture: a suite's accuracies and the group's quadrant shares."""

    title: str
    stats: list[CellStats]
    before: Estimate | None
    teacher: Estimate | None
    costs: list[CellCost]


def draw(panels: list[Panel], file: Path) -> None:
    """Write the picture as PNG."""
    figure, axes = plt.subplots(
        len(panels), 2, figsize=(12, 4.6 * len(panels)), squeeze=False, width_ratios=(3, 2), layout="constrained"
    )
    for (left, right), panel in zip(axes, panels, strict=True):
        _accuracy(left, panel)
        _quadrants(right, panel.costs)
    as_written(figure).savefig(file, dpi=150)
    plt.close(figure)


def _accuracy(ax: Axes, panel: Panel) -> None:
    ax.set_title(panel.title, loc="left", fontsize=10)
    for place, row in enumerate(panel.stats):
        if row.accuracy is None:
            ax.text(place, 1, "not run", ha="center", va="bottom", color="#777777", fontsize=9)
            continue
        mean, error = 100 * row.accuracy.mean, 100 * (row.accuracy.stderr_problems or 0.0)
        colour = SELECTOR_COLOURS.get(row.cell.selector, OTHER_COLOUR)
        ax.bar(place, mean, yerr=error, color=colour, width=0.66, capsize=4, ecolor="#222222")
        ax.text(place, mean + error + 1, f"{mean:.1f}", ha="center", va="bottom", fontsize=10)
    for found, label in ((panel.before, "before training"), (panel.teacher, "teacher")):
        if found is not None:
            ax.axhline(100 * found.mean, color="#222222", linestyle="--", linewidth=1)
            # Right of the bars, where no bar's number stands.
            ax.text(
                len(panel.stats) - 0.45, 100 * found.mean, f"{label}\n{100 * found.mean:.1f}", fontsize=9, va="center"
            )
    ax.set_xticks(range(len(panel.stats)), [_label(row) for row in panel.stats])
    ax.set_xlim(-0.6, len(panel.stats) - 0.5)
    ax.set_ylim(0, 1.1 * _highest(panel))
    ax.set_ylabel("mean@k, %  (± 1 standard error over problems)", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def _quadrants(ax: Axes, costs: list[CellCost]) -> None:
    ax.set_title("Tokens by quadrant", loc="left", fontsize=11)
    ax.set_yticks(range(len(costs)), [str(cost.cell) for cost in costs])
    ax.set_ylim(len(costs) - 0.5, -0.5)
    ax.set_xlim(0, 100)
    ax.set_xlabel("share of all student tokens, %", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    for place, cost in enumerate(costs):
        if cost.quadrants is None:
            ax.text(2, place, "not measured", va="center", color="#777777", fontsize=9)
            continue
        left = 0.0
        for share, colour in zip(cost.quadrants, QUADRANT_COLOURS, strict=True):
            ax.barh(place, 100 * share, left=left, color=colour, height=0.66)
            if share >= 0.05:
                ax.text(left + 50 * share, place, f"{100 * share:.0f}", ha="center", va="center", fontsize=9)
            left += 100 * share
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in QUADRANT_COLOURS]
    ax.legend(
        handles, QUADRANT_NAMES, ncols=2, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16)
    )


def _highest(panel: Panel) -> float:
    """The highest accuracy in the panel, percent; at least 1."""
    found = [panel.before, panel.teacher, *(row.accuracy for row in panel.stats)]
    return max(1.0, *(100 * estimate.mean for estimate in found if estimate is not None))


def _label(row: CellStats) -> str:
    name = row.cell.selector
    if len(name) > 10:
        name = name.replace("_", "\n", 1)
    rule = name if name == "all" else f"{name}\n{100 * row.cell.retention:g} %"
    return "\n".join([rule, *row.cell.words])
