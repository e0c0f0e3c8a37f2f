"""A single run's report: its settings, evaluations and metrics, without the paper's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from reporting.page import Section
from reporting.pictures import warnings
from reporting.plots import HEALTH_CURVES, costs, curve_names, curves
from reporting.runs import Run
from reporting.tables import TextTable, percent
from reporting.theme import Picture, picture
from reporting.tokens import plane, read_tokens

# A metric, its name in the table, and its format.
NUMBERS: list[tuple[str, str, Callable[[float], str]]] = [
    ("loss/nats", "loss, nats per token trained on", "{:.3f}".format),
    ("student/reverse_kl_nats", "reverse KL, nats per token", "{:.3f}".format),
    ("student/entropy_nats", "student's entropy, nats", "{:.3f}".format),
    ("teacher/entropy_nats", "teacher's entropy, nats", "{:.3f}".format),
    ("select/kept_frac", "tokens trained on", "{:.1%}".format),
    *((f"quadrant/q{q}_frac", f"tokens in Q{q}", "{:.1%}".format) for q in (1, 2, 3, 4)),
    ("rollout/tokens", "tokens generated per step", "{:,.0f}".format),
    ("rollout/truncated_frac", "truncated answers", "{:.1%}".format),
    ("rollout/reward", "reward", "{:.3f}".format),
    ("optim/grad_norm", "gradient norm", "{:.3g}".format),
    ("mem/peak_gib", "peak memory, GiB", "{:.2f}".format),
    ("time/step_s", "step, s", "{:.2f}".format),
]
# Metrics that have a curve here, in addition to those of a table's runs.
FURTHER = tuple((f"quadrant/q{q}_frac", f"share of tokens in Q{q}") for q in (1, 2, 3, 4))


def one_run(run: Run) -> Section:
    """The report of a run, finished or not."""
    return Section(title_of(run), facts(run), list(tables(run)), list(pictures(run)))


def title_of(run: Run) -> str:
    """The run's name and its progress."""
    steps = run.config["steps"]
    done = steps if run.done else max((int(line["step"]) for line in run.steps), default=0)
    return f"{run.path.resolve().name}: {done} of {steps} steps{'' if run.done else ', not finished'}"


def facts(run: Run) -> list[str]:
    """Models and settings, in lines; settings missing from config.json (e.g. of a record made by TRL) are left out."""
    config = run.config
    rollout, optim, loss = (config.get(part, {}) for part in ("rollout", "optim", "loss"))
    named = {"student": config["student"], "teacher": config["teacher"]["model"], "prompts": config.get("prompts")}
    models = [f"{name} {value}" for name, value in named.items() if value]
    rate = f"learning rate {optim['lr']}" if "lr" in optim else None
    optimiser = ", ".join(filter(None, (optim.get("kind"), rate, optim.get("schedule"))))
    how = filter(None, (str(run.cell), loss.get("divergence"), optimiser, f"seed {run.seed}"))
    lines = [", ".join(models), "; ".join(how)]
    if "prompts_per_step" in config and "samples_per_prompt" in rollout:
        longest = f" of at most {rollout['max_new_tokens']} tokens" if "max_new_tokens" in rollout else ""
        lines.append(
            f"{config['prompts_per_step']} prompts × {rollout['samples_per_prompt']} answers{longest} per step"
        )
    return lines + quadrant_lines(run)


def quadrant_lines(run: Run) -> list[str]:
    """What Q1 to Q4 mean and their thresholds, if a token record or the metrics have them."""
    splits = {axis: run.logged(f"quadrant/{axis}_split_nats") for axis in ("entropy", "divergence")}
    if not all(splits.values()):
        return []
    entropy, divergence = (_span(values) for values in splits.values())
    return [
        f"Q1 to Q4, tokens by the student's entropy (split at {entropy} nats) and the divergence from the teacher (at "
        f"{divergence} nats): Q1 above both, Q2 above the first alone, Q3 above the second alone, Q4 below both"
    ]


def _span(values: list[float]) -> str:
    """One value, or the lowest and the highest."""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def tables(run: Run) -> Iterator[TextTable]:
    """Evaluations, if there are any, and metrics over the first and the last tenth of the steps."""
    found = {name: result for name, result in evaluations(run) if result is not None}
    suites = list(dict.fromkeys(suite for result in found.values() for suite in result["suites"]))
    if suites:
        rows = [[name, *(_accuracy(result, suite) for suite in suites)] for name, result in found.items()]
        yield TextTable("Accuracy, %, ± standard error over problems", ["", *suites], rows)
    rows = []
    for key, name, form in NUMBERS:
        if values := run.logged(key):
            some = max(1, len(values) // 10)
            ends = [form(median(part)) for part in (values[:some], values[-some:])]
            rows.append([name, *ends, form(min(values)), form(max(values))])
    if rows:
        yield TextTable(
            "Metrics, medians over the first and last tenth of the steps",
            ["", "first", "last", "lowest", "highest"],
            rows,
        )


def evaluations(run: Run) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each evaluation with its name, in the order of steps; the teacher last."""
    steps = sorted(int(file.stem.removeprefix("step_")) for file in (run.path / "eval").glob("step_*.json"))
    for step in steps:
        yield "before training" if step == 0 else f"after step {step}", run.evaluation(f"step_{step}")
    yield "teacher", run.evaluation("teacher")


def pictures(run: Run) -> Iterator[Picture]:
    """Curves, tokens, memory and time; pictures without data are left out."""
    if names := curve_names([run]) + curve_names([run], FURTHER):
        yield picture("Curves.", "Smoothed over 1/40 of the run.", lambda: curves([run], names))
    if health := curve_names([run], HEALTH_CURVES):
        words = "Lengths, truncation, repetition, and the end-of-turn token."
        yield picture("Health.", f"{words} {warnings([run])}", lambda: curves([run], health))
    tokens = read_tokens([run])
    if tokens is not None:
        yield picture("Entropy and divergence of every token.", tokens.words, lambda: plane(tokens))
    if run.done and run.logged("mem/peak_gib"):
        words = "Peak memory of the process; the median step's time by stage."
        yield picture("Memory and time.", words, lambda: costs([run], [run.cell]))


def _accuracy(result: dict[str, Any], suite: str) -> str:
    found = result["suites"].get(suite)
    if found is None:
        return "-"
    score = found.get("mean@k", sum(found["scores"].values()) / len(found["scores"]))
    return percent(score, found.get("stderr_problems"))
