"""The page's figures of accuracy and cost: Figures 1, 3 and 4 next to ours, training curves, memory and time."""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reporting.cells import CellName
from reporting.leaderboard import Gains, error_of
from reporting.paper import BENCHMARKS, PAIRS, Paper
from reporting.results import Measure
from reporting.runs import Run
from reporting.stats import BASELINE, CellCost, CellStats, Estimate, SuiteReport
from reporting.theme import QUADRANT_COLOURS, colour_of, ink, tones
from tip_patch.quadrants import QUADRANT_LABELS

CURVES = (
    ("loss/nats", "trained divergence, nats per kept token"),
    ("student/reverse_kl_nats", "reverse KL over all tokens, nats"),
    ("student/entropy_nats", "student entropy, nats"),
    ("rollout/reward", "mean reward of the step's rollouts"),
)
HEALTH_CURVES = (
    ("length/mean_tokens", "mean length of a rollout, tokens"),
    ("length/p90_tokens", "90th percentile of length, tokens"),
    ("rollout/truncated_frac", "rollouts truncated, fraction"),
    ("repetition/ngram_frac", "tokens inside repeated n-grams, fraction"),
    ("stop/student_prob", "student's probability of its stop"),
    ("stop/delta_nats", "teacher − student log-prob. of the stop"),
    ("stop/kept_frac", "stops trained on, fraction"),
    ("stop/score_percentile", "percentile of the stop in the score, 0 to 1"),
)
STAGES = ("rollout", "teacher", "student", "sync", "log")
# Line style and marker of a rule's variants, in order.
VARIANT_STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
STAGE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#9aa7b1")


def bars(stats: list[CellStats], before: Estimate | None, teacher: Estimate | None, suite: str, paper: Paper) -> Figure:
    """Figure 1's form: accuracy by cell, ours on the left, the paper's pairs on the right; many cells: only ours."""
    if crowded(stats):
        return _bars_across(stats, before, suite)
    figure, (left, right) = _panels(2, height=3.6, widths=(1, 1 + 0.35 * len(paper.pairs)))
    left.set_title(f"ours, {BENCHMARKS.get(suite, suite)}")
    _our_bars(left, stats, before, teacher)
    _paper_bars(right, [row.cell for row in stats], paper.benchmark_of(suite), paper)
    return figure


def overview(reports: list[tuple[str, SuiteReport, list[CellCost]]]) -> Figure:
    """figure.png: a row for each (title, suite, costs): accuracy by cell, and the share of tokens in each quadrant."""
    size = (12, 4.6 * len(reports))
    figure, axes = plt.subplots(len(reports), 2, figsize=size, squeeze=False, width_ratios=(3, 2), layout="constrained")
    for (left, right), (title, suite, cell_costs) in zip(axes, reports, strict=True):
        left.set_title(title)
        _our_bars(left, suite.stats, suite.before, suite.teacher)
        left.set_ylabel("mean@k, %  (± the larger standard error, over problems or seeds)", fontsize=8)
        for found, name in ((suite.before, "before training"), (suite.teacher, "teacher")):
            if found is not None:
                # Right of the bars, clear of their numbers.
                text = f"{name}\n{100 * found.mean:.1f}"
                left.text(len(suite.stats) - 0.45, 100 * found.mean, text, fontsize=9, va="center")
        left.set_xlim(-0.6, len(suite.stats) - 0.5)
        _quadrants(right, cell_costs)
    return figure


def _our_bars(ax: Axes, stats: list[CellStats], before: Estimate | None, teacher: Estimate | None) -> None:
    colours = tones([row.cell for row in stats])
    for place, row in enumerate(stats):
        if row.accuracy is None:
            ax.text(place, 1, "not run", ha="center", color=ink(), fontsize=8, rotation=90)
            continue
        mean, error = 100 * row.accuracy.mean, 100 * _error(row.accuracy)
        ax.bar(place, mean, yerr=error, color=colours[row.cell], width=0.7, capsize=3, ecolor=ink())
        ax.text(place, mean + error + 0.8, f"{mean:.1f}", ha="center", fontsize=9)
    for found, style in ((before, ":"), (teacher, "--")):
        if found is not None:
            ax.axhline(100 * found.mean, color=ink(), linestyle=style, linewidth=1)
    ax.set_xticks(range(len(stats)), [label(row.cell) for row in stats], fontsize=8)
    ax.set_ylabel("mean@k, %")


def _quadrants(ax: Axes, cell_costs: list[CellCost]) -> None:
    ax.set_title("tokens by quadrant")
    ax.set_yticks(range(len(cell_costs)), [str(cost.cell) for cost in cell_costs])
    ax.set_ylim(len(cell_costs) - 0.5, -0.5)
    ax.set_xlim(0, 100)
    ax.set_xlabel("share of all student tokens, %")
    for place, cost in enumerate(cell_costs):
        if cost.quadrants is None:
            ax.text(2, place, "not measured", va="center", fontsize=9)
            continue
        left = 0.0
        for share, colour in zip(cost.quadrants, QUADRANT_COLOURS, strict=True):
            ax.barh(place, 100 * share, left=left, color=colour, height=0.66)
            if share >= 0.05:
                ax.text(left + 50 * share, place, f"{100 * share:.0f}", ha="center", va="center", fontsize=9)
            left += 100 * share
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in QUADRANT_COLOURS]
    names = [f"{label.name} {label.what}" for label in QUADRANT_LABELS]
    ax.legend(handles, names, ncols=2, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def crowded(stats: list[CellStats]) -> bool:
    """Whether the names of bars side by side would overlap."""
    return len(stats) > (6 if any(row.cell.variant for row in stats) else 13)


def _bars_across(stats: list[CellStats], before: Estimate | None, suite: str) -> Figure:
    """Horizontal bars, one below the other: names of any number of cells stay readable."""
    figure, (ax,) = _panels(1, height=0.9 + 0.26 * len(stats))
    figure.set_figwidth(8.0)
    ax.set_title(f"ours, {BENCHMARKS.get(suite, suite)}")
    colours = tones([row.cell for row in stats])
    for place, row in enumerate(stats):
        if row.accuracy is None:
            ax.text(0.5, place, "not run", va="center", color=ink(), fontsize=8)
            continue
        mean, error = 100 * row.accuracy.mean, 100 * _error(row.accuracy)
        ax.barh(place, mean, xerr=error, color=colours[row.cell], height=0.7, capsize=2, ecolor=ink())
        ax.text(mean + error, place, f" {mean:.1f}", va="center", fontsize=8)
    if before is not None:
        ax.axvline(100 * before.mean, color=ink(), linestyle=":", linewidth=1)
    ax.set_yticks(range(len(stats)), [str(row.cell) for row in stats], fontsize=8)
    ax.set_ylim(len(stats) - 0.4, -0.6)
    ax.set_xlabel("mean@k, %")
    return figure


def _paper_bars(ax: Axes, cells: list[CellName], benchmark: str, paper: Paper) -> None:
    ax.set_title(f"the paper, {BENCHMARKS[benchmark]}")
    known = [cell for cell in cells if cell in paper.cells]
    for group, pair in enumerate(paper.pairs):
        for place, cell in enumerate(known):
            found = paper.number(pair, benchmark, cell)
            if found is not None:
                where = group * (len(known) + 1) + place
                ax.bar(where, found[0], yerr=found[1], color=colour_of(cell.selector), width=0.9, ecolor=ink())
                text = "" if cell.retention == 1 else f"{100 * cell.retention:g}"
                ax.text(where, found[0] / 2, text, ha="center", va="center", fontsize=8, color="white")
    middle = (len(known) - 1) / 2
    ax.set_xticks(
        [group * (len(known) + 1) + middle for group in range(len(paper.pairs))],
        [PAIRS[pair] for pair in paper.pairs],
        fontsize=8,
    )
    handles = {cell.selector: plt.Rectangle((0, 0), 1, 1, color=colour_of(cell.selector)) for cell in known}
    ax.legend(handles.values(), handles.keys(), ncols=2, fontsize=8, loc="upper right")
    ax.margins(y=0.25)


def retention(stats: list[CellStats], before: Estimate | None, suite: str, paper: Paper) -> Figure:
    """Figure 3's form: accuracy against retention, a line per rule; ours, then each pair of the paper.

    The teacher is left out: it is far above and would compress the differences between cells.
    """
    benchmark = paper.benchmark_of(suite)
    figure, axes = _panels(1 + len(paper.pairs), height=3.6)
    ours = {row.cell: (100 * row.accuracy.mean, 100 * _error(row.accuracy)) for row in stats if row.accuracy}
    _lines(axes[0], ours)
    axes[0].set_title(f"ours, {BENCHMARKS.get(suite, suite)}")
    axes[0].set_ylabel("mean@k, %")
    if before is not None:
        start = 100 * before.mean
        axes[0].axhline(start, color=ink(), linestyle=":", linewidth=1)
        axes[0].text(0.02, start, "before training", fontsize=8, va="bottom", transform=axes[0].get_yaxis_transform())
    for ax, pair in zip(axes[1:], paper.pairs, strict=True):
        theirs = {
            cell: (found[0], found[1] or 0.0) for cell in paper.cells if (found := paper.number(pair, benchmark, cell))
        }
        _lines(ax, theirs)
        ax.set_title(f"paper, {PAIRS[pair]}".replace("\n", " "))
    named = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    loc = "outside lower center"
    figure.legend(list(named.values()), list(named), loc=loc, ncols=min(6, len(named)), fontsize=8)
    return figure


def gains_against_retention(gains: Gains, measure: Measure) -> Figure:
    """A line per rule: the difference to all tokens over retention, with errors; all tokens are the line at 0."""
    figure, (ax,) = _panels(1, height=4.6)
    figure.set_figwidth(9.0)
    # At 100 % only rules that weight tokens have a point.
    _lines(ax, {cell: (measure.scale * gain.mean, measure.scale * error_of(gain)) for cell, gain in gains.items()})
    ax.axhline(0.0, color=colour_of("all"), linewidth=1, label="all tokens")
    ax.set_xscale("log")
    ticks = sorted({100 * cell.retention for cell in gains})
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_ylabel(f"{measure.name} minus all tokens', {measure.unit}")
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


def _lines(ax: Axes, points: dict[CellName, tuple[float, float]]) -> None:
    """A line per rule over retention; every line ends at all tokens, 100 %. Variants differ in dashes and markers."""
    everything = points.get(BASELINE)
    rules = list(dict.fromkeys((cell.selector, cell.variant) for cell in points if cell.selector != "all"))
    variants = list(dict.fromkeys(variant for _, variant in rules))
    colours = tones([CellName(selector, 0.5, variant) for selector, variant in rules])
    for rule in rules:
        own = sorted(
            (100 * cell.retention, *value) for cell, value in points.items() if (cell.selector, cell.variant) == rule
        )
        whole = points.get(CellName("all", 1.0, rule[1]), everything)
        own += [(100.0, *whole)] if whole else []
        x, y, error = zip(*own, strict=True)
        dash, mark = VARIANT_STYLES[variants.index(rule[1]) % len(VARIANT_STYLES)]
        style = {
            "ls": dash,
            "marker": mark,
            "markersize": 4,
            "capsize": 3,
            "color": colours[CellName(rule[0], 0.5, rule[1])],
        }
        ax.errorbar(x, y, yerr=error, label=" ".join(rule).rstrip(), **style)
    if everything:
        ax.axhspan(
            everything[0] - everything[1], everything[0] + everything[1], color=colour_of("all"), alpha=0.18, lw=0
        )
        ax.axhline(everything[0], color=colour_of("all"), linewidth=1, label="all tokens")
    ax.set_xlabel("tokens kept, %")


def average_and_best(
    stats: list[CellStats], best: list[tuple[CellName, Estimate | None]], suite: str, paper: Paper
) -> Figure:
    """Figure 4's form: the mean over tries next to the best of them."""
    figure, axes = _panels(1 + len(paper.pairs), height=3.2)
    ours = {row.cell: 100 * row.accuracy.mean for row in stats if row.accuracy}
    ours_best = {cell: 100 * found.mean for cell, found in best if found}
    _mean_and_best(axes[0], ours, ours_best, f"ours, {BENCHMARKS.get(suite, suite)}")
    benchmark = paper.benchmark_of(suite)
    for ax, pair in zip(axes[1:], paper.pairs, strict=True):
        means = {cell: found[0] for cell in paper.cells if (found := paper.number(pair, benchmark, cell))}
        tops = {cell: found for cell in paper.cells if (found := paper.best_of(pair, benchmark, cell)) is not None}
        _mean_and_best(ax, means, tops, f"paper, {PAIRS[pair]}".replace("\n", " "))
    return figure


def _mean_and_best(ax: Axes, means: dict[CellName, float], best: dict[CellName, float], title: str) -> None:
    ax.set_title(title)
    for place, (cell, value) in enumerate(means.items()):
        ax.barh(place, value, height=0.6, color=colour_of(cell.selector))
        ax.text(value, place, f" {value:.1f}", va="center", fontsize=8)
        if cell in best:
            ax.plot(best[cell], place, marker="D", color=ink(), markersize=5)
            ax.text(best[cell], place + 0.38, f"best {best[cell]:.1f}", ha="center", fontsize=7)
    ax.set_yticks(range(len(means)), [str(cell) for cell in means], fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set_xlabel("%")


def curve_names(group: list[Run], asked: tuple[tuple[str, str], ...] = CURVES) -> list[tuple[str, str]]:
    """The metrics that have a curve, each with its title: those of training, and every evaluation's."""
    names = [(key, title) for key, title in asked if any(run.logged(key) for run in group)]
    if asked is not CURVES:
        return names
    evaluated = sorted({key for run in group for line in run.steps for key in line if _is_mean(key)})
    return names + [(key, f"{key.split('/')[1]}, {key.split('/')[2]}") for key in evaluated]


def curves(group: list[Run], names: list[tuple[str, str]]) -> Figure:
    """Curves of the named metrics: a line per cell, the mean over its seeds, smoothed."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    cells = list(dict.fromkeys(run.cell for run in group))
    across = min(columns + 1, len(cells))
    size = (3.7 * columns, 2.6 * rows + 0.2 * (len(cells) // across))
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    colours = tones(cells)
    for ax, (key, title) in zip(grid.flat, names, strict=False):
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.ticklabel_format(axis="y", useOffset=False)
        for cell in cells:
            curve = _curve([run for run in group if run.cell == cell], key)
            style = {"marker": "o", "markersize": 3} if len(curve) < 12 else {}
            ax.plot(curve.index, curve["mean"], color=colours[cell], ls=dashes(cell), label=str(cell), lw=1.4, **style)
            ax.fill_between(curve.index, curve["min"], curve["max"], color=colours[cell], alpha=0.12, lw=0)
    for ax in list(grid.flat)[len(names) :]:
        ax.set_axis_off()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=across, fontsize=8)
    return figure


def _curve(runs: list[Run], key: str) -> pd.DataFrame:
    """mean, min and max of the seeds at each step that all of them logged, smoothed over a fortieth of the run.

    Smoothed by the mean over the last values (fewer at the start), so no later step enters and no step is lost.
    """
    series = [pd.Series({int(line["step"]): line[key] for line in run.steps if key in line}) for run in runs]
    series = [one for one in series if len(one)]
    whole = pd.concat(series, axis=1).dropna().sort_index() if series else pd.DataFrame()
    smooth = whole.rolling(max(1, len(whole) // 40), min_periods=1).mean()
    return pd.DataFrame({how: getattr(smooth, how)(axis=1) for how in ("mean", "min", "max")})


def costs(group: list[Run], cells: Iterable[CellName]) -> Figure:
    """Peak memory of cells that logged it, and where a step's time goes (medians over steps, means over seeds)."""
    rows = [(cell, [run for run in group if run.done and run.cell == cell]) for cell in cells]
    figure, (left, right) = _panels(2, height=0.9 + 0.42 * len(rows))
    colours = tones([cell for cell, _ in rows])
    left.set_title("peak memory, GiB")
    right.set_title("a step's time, s")
    for place, (cell, runs) in enumerate(rows):
        peak = float(np.mean([max(run.logged("mem/peak_gib")) for run in runs if run.logged("mem/peak_gib")]))
        left.barh(place, peak, height=0.6, color=colours[cell], alpha=shade(cell))
        left.text(peak, place, f" {peak:.2f}", va="center", fontsize=8)
        start = 0.0
        for stage, colour in zip(STAGES, STAGE_COLOURS, strict=True):
            found = [float(np.median(values)) for run in runs if (values := run.logged(f"time/{stage}_s"))]
            if found:
                right.barh(place, np.mean(found), left=start, height=0.6, color=colour)
                start += float(np.mean(found))
        right.text(start, place, f" {start:.2f}", va="center", fontsize=8)
    for ax in (left, right):
        ax.set_yticks(range(len(rows)), [str(cell) for cell, _ in rows], fontsize=8)
        ax.invert_yaxis()
        ax.margins(x=0.15)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in STAGE_COLOURS]
    figure.legend(handles, STAGES, loc="outside lower right", ncols=len(STAGES), fontsize=8)
    return figure


def label(cell: CellName) -> str:
    """A cell's name for a narrow axis."""
    name = cell.selector.replace("_", "\n", 1) if len(cell.selector) > 8 else cell.selector
    rule = name if cell.selector == "all" else f"{name}\n{100 * cell.retention:g} %"
    return "\n".join([rule, *cell.words])


def dashes(cell: CellName) -> str:
    """Fewer tokens, more dashes: lines of one rule can be told apart."""
    return "-" if cell.retention >= 0.5 else "--" if cell.retention >= 0.2 else ":"


def shade(cell: CellName) -> float:
    """Fewer tokens, fainter: cells of one rule can be told apart."""
    return 0.35 + 0.65 * cell.retention if cell.retention < 0.5 else 1.0


def _error(found: Estimate) -> float:
    """The larger of the two standard errors, a fraction."""
    return max(found.stderr_problems or 0.0, found.stderr_seeds or 0.0)


def _is_mean(key: str) -> bool:
    return key.startswith("eval/") and "/mean@" in key


def _panels(count: int, height: float, widths: tuple[float, ...] | None = None) -> tuple[Figure, list[Axes]]:
    width = 5.2 * count if count < 3 else 3.4 * count
    figure, axes = plt.subplots(
        1, count, figsize=(min(width, 13.0), height), squeeze=False, layout="constrained", width_ratios=widths
    )
    return figure, list(axes[0])
