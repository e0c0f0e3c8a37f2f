"""The figures of a group of runs, with their captions; figures without data are left out."""

from __future__ import annotations

from reporting.paper import BENCHMARKS, Paper
from reporting.plots import HEALTH_CURVES, average_and_best, bars, costs, crowded, curve_names, curves, retention
from reporting.runs import Run
from reporting.stats import CellCost, SuiteReport
from reporting.theme import Picture, picture
from reporting.tokens import plane, read_tokens


def pictures(group: list[Run], suites: list[SuiteReport], cell_costs: list[CellCost], paper: Paper) -> list[Picture]:
    """The group's figures in the paper's order, then curves, memory and time."""
    found = [picture for suite in suites for picture in _of_suite(suite, paper)]
    tokens = read_tokens(group)
    if tokens is not None:
        title = "Figure 2. Entropy and divergence of every token."
        found.append(picture(title, tokens.words, lambda: plane(tokens)))
    found.sort(key=lambda one: one.title)  # by the paper's figure numbers
    if training := curve_names(group):
        words = "Mean over seeds, shaded from lowest to highest, smoothed over 1/40 of the run."
        found.append(picture("Training curves.", words, lambda: curves(group, training)))
    if health := curve_names(group, HEALTH_CURVES):
        words = "Lengths, truncation, repetition, and the end-of-turn token; drawn like the training curves."
        found.append(picture("Health.", f"{words} {warnings(group)}", lambda: curves(group, health)))
    cells = [cost.cell for cost in cell_costs if cost.peak_gib is not None]
    if cells:
        words = "Peak memory of the training process; the median step's time by stage. log: telemetry."
        found.append(picture("Memory and time.", words, lambda: costs(group, cells)))
    return found


def warnings(group: list[Run]) -> str:
    """The warnings of --health in these runs, each with its runs and steps."""
    told = [
        f"{key.removeprefix('health/')} ({run.path.name}, step {line['step']})"
        for run in group
        for line in run.steps
        for key in line
        if key.startswith("health/")
    ]
    return f"Warnings: {', '.join(told)}." if told else "No run raised a warning."


def _of_suite(suite: SuiteReport, paper: Paper) -> list[Picture]:
    name = BENCHMARKS.get(suite.name, suite.name)
    measured = [row for row in suite.stats if row.accuracy is not None]
    common = (suite.before, suite.teacher, suite.name, paper)
    if not measured:
        return []
    words = (
        f"Ours on {name}: ± the larger standard error, over problems or seeds; dotted: before training"
        f"{'' if crowded(suite.stats) else '; dashed: the teacher'}."
    )
    found = [picture("Figure 1. Accuracy by rule.", words, lambda: bars(suite.stats, *common))]
    rules: dict[str, set[float]] = {}
    for row in measured:
        rules.setdefault(row.cell.selector, set()).add(row.cell.retention)
    if any(len(retentions) > 1 for retentions in rules.values()):
        words = f"Ours on {name} with standard errors; the paper's with its ±. The band is training on all tokens."
        found.append(
            picture(
                "Figure 3. Accuracy against retention.",
                words,
                lambda: retention(suite.stats, suite.before, suite.name, paper),
            )
        )
    if paper.best and any(best is not None for _, best in suite.best):
        words = "Bars: the mean over tries; diamonds: the best try."
        how = (suite.stats, suite.best, suite.name, paper)
        found.append(picture("Figure 4. Average and best of k.", words, lambda: average_and_best(*how)))
    return found
