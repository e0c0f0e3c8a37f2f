"""The loss benchmark's table and figure, from its cases.

A kept graph that does not fit is extrapolated along the line through its two largest measured token counts, and marked.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from reporting.theme import colour_of

Row = dict[str, Any]
MEASURES = ("seconds", "cpu_seconds", "peak_gib")
NAMES = {
    "ours": "ours",
    "graph_kept": "(a) graph kept",
    "recomputed": "(b) recomputed",
    "liger": "(c) Liger",
    "liger_triton": "(c) Liger, Triton",
    "trl": "(d) TRL",
}
COLOURS = dict(zip(NAMES, ("#0072b2", "#d55e00", "#e69f00", "#009e73", "#56b4e9", "#cc79a7"), strict=True))
# The baselines that every row is compared with, by letter.
BASELINES = {"a": "graph_kept", "b": "recomputed", "d": "trl"}
HEADER = (
    "type",
    "d",
    "N",
    "method",
    "kept",
    "wall s",
    "CPU s",
    *(f"of ({letter}), {measure}" for letter in BASELINES for measure in ("wall", "CPU")),
    "peak GiB",
    "GFLOP/s",
    "of mm",
    "of best",
)


def table(rows: list[Row]) -> str:
    """Markdown, one row per case. "~" marks what is extrapolated, "-" what is missing."""
    cases = _merge(rows)
    _extrapolate(cases)
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for key in sorted(cases, key=_order):
        lines.append("| " + " | ".join(_line(cases[key], cases)) + " |")
    rates = [row for row in rows if row["method"] == "rate"]
    notes = [
        f"Matrix products, {row['dtype']}, d = {row['width']}: torch.mm {row['mm_gflops']:.0f} GFLOP/s over the loss's "
        f"four products, the best of all tried {row['best_gflops']:.0f}."
        for row in rates
    ]
    missing = sorted(
        {f"{NAMES.get(row['method'], row['method'])}: {row['missing']}" for row in rows if "missing" in row}
    )
    return "\n".join([*lines, "", *notes, *missing]) + "\n"


def draw(rows: list[Row], file: Path) -> None:
    """PNG: peak memory against tokens, and processor time against retention, fp32 at the smallest width."""
    cases = _merge(rows)
    _extrapolate(cases)
    shown = [row for row in cases.values() if row["dtype"] == "float32" and "missing" not in row]
    if not shown:
        return
    width = min(row["width"] for row in shown)
    shown = [row for row in shown if row["width"] == width]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _memory(left, [row for row in shown if row["selector"] == "all"], width)
    _retention(right, shown)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _memory(ax: Axes, rows: list[Row], width: int) -> None:
    for method, colour in COLOURS.items():
        points = sorted(
            (row["tokens"], row["peak_gib"], "extrapolated" in row) for row in rows if row["method"] == method
        )
        if not points:
            continue
        ax.plot([n for n, *_ in points], [gib for _, gib, _ in points], color=colour, label=NAMES[method])
        for tokens, gib, guessed in points:
            ax.plot(tokens, gib, "o", color=colour, markerfacecolor="white" if guessed else colour)
    ax.set(xlabel="tokens N", ylabel="peak above inputs and gradients, GiB", yscale="log")
    ax.set_title(f"Memory (fp32, d = {width}; hollow: extrapolated)", loc="left", fontsize=10)
    ax.legend(fontsize=9)


def _retention(ax: Axes, rows: list[Row]) -> None:
    counts = [row["tokens"] for row in rows if row["selector"] != "all"]
    if not counts:
        return
    rows = [row for row in rows if row["tokens"] == counts[0]]
    full = {row["method"]: row["cpu_seconds"] for row in rows if row["selector"] == "all"}
    for selector in ("soft_or", "entropy"):
        points = sorted((row["retention"], row["cpu_seconds"]) for row in rows if row["selector"] == selector)
        ax.plot(
            [kept for kept, _ in points],
            [cpu for _, cpu in points],
            "o-",
            color=colour_of(selector),
            label=f"ours, {selector}",
        )
    for method, seconds in full.items():
        ax.axhline(seconds, color=COLOURS[method], linestyle="--", linewidth=1, label=f"{NAMES[method]}, all tokens")
    ax.set(xlabel="retention", ylabel="processor seconds", ylim=(0, None), xlim=(0, 1))
    ax.set_title(f"Time (N = {counts[0]})", loc="left", fontsize=10)
    ax.legend(fontsize=9)


def _key(row: Row) -> tuple[Any, ...]:
    return row["dtype"], row["width"], row["tokens"], row["method"], row["selector"], row["retention"]


def _order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype, width, tokens, method, selector, retention = key
    return dtype != "float32", width, tokens, list(NAMES).index(method), selector, -retention


def _merge(rows: list[Row]) -> dict[tuple[Any, ...], Row]:
    """One row per case, the median of its repeats, with the machine's rates for its dtype and width."""
    rates = {(row["dtype"], row["width"]): row for row in rows if row["method"] == "rate"}
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["method"] != "rate":
            grouped.setdefault(_key(row), []).append(row)
    merged = {}
    for key, group in grouped.items():
        ran = [row for row in group if "missing" not in row]
        merged[key] = {**group[0], "rate": rates.get(key[:2])}
        if ran:
            merged[key] = {**ran[0], "rate": rates.get(key[:2])}
            merged[key].update({name: statistics.median(row[name] for row in ran) for name in MEASURES})
    return merged


def _extrapolate(cases: dict[tuple[Any, ...], Row]) -> None:
    """Add a kept graph's row if others were measured at a token count at which it does not fit."""
    for dtype, width, tokens, *_ in list(cases):
        measured = sorted(
            (row["tokens"], row)
            for row in cases.values()
            if (row["dtype"], row["width"], row["method"]) == (dtype, width, "graph_kept")
            and "missing" not in row
            and "extrapolated" not in row
        )
        key = (dtype, width, tokens, "graph_kept", "all", 1.0)
        if len(measured) < 2 or (key in cases and "missing" not in cases[key]):
            continue
        (few, small), (many, large) = measured[-2:]
        share = (tokens - many) / (many - few)
        line = {name: large[name] + share * (large[name] - small[name]) for name in MEASURES}
        gflop = large["gflop"] * tokens / many
        cases[key] = {**large, **line, "tokens": tokens, "gflop": gflop, "extrapolated": True}


def _line(row: Row, cases: dict[tuple[Any, ...], Row]) -> list[str]:
    kept = "all" if row["selector"] == "all" else f"{row['selector']} {row['retention']:.0%}"
    name = [row["dtype"], str(row["width"]), str(row["tokens"]), NAMES[row["method"]], kept]
    if "missing" in row:
        return [*name, *["-"] * (len(HEADER) - len(name))]
    mark = "~" if "extrapolated" in row else ""
    cells = [f"{mark}{row['seconds']:.2f}", f"{mark}{row['cpu_seconds']:.2f}"]
    for baseline in BASELINES.values():
        other = cases.get((row["dtype"], row["width"], row["tokens"], baseline, "all", 1.0))
        for measure in ("seconds", "cpu_seconds"):
            if other is None or "missing" in other:
                cells.append("-")
            else:
                cells.append(f"{'~' if 'extrapolated' in other else ''}{row[measure] / other[measure]:.2f}")
    speed = row["gflop"] / row["cpu_seconds"] * row["threads"]
    cells += [f"{mark}{row['peak_gib']:.3f}", f"{speed:.0f}"]
    rate = row["rate"]
    cells += ["-", "-"] if rate is None else [f"{speed / rate[name]:.2f}" for name in ("mm_gflops", "best_gflops")]
    return [*name, *cells]
