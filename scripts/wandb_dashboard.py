#!/usr/bin/env python
"""A wandb workspace for runs of this trainer: accuracy, memory, selection, health, time; seeds of a cell averaged.

    python scripts/wandb_dashboard.py --entity TEAM --project opsd --suites math500 aime24 aime25
    python scripts/wandb_dashboard.py --entity TEAM --project opsd --dry_run

Only saving needs the network; --dry_run prints the workspace as JSON.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import tyro

from opsd.utils.errors import UserError, exits_on_bad_input


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


panels, ws = _imported("wandb_workspaces.reports.v2"), _imported("wandb_workspaces.workspaces")

# Top-level keys of a run's config (opsd/run/wandb_run.py); seeds of one cell share all of them.
GROUP_BY = ("recipe", "pair", "selector")
# The seeds of a cell are drawn as one line: their mean, shaded by its standard error.
OVER_SEEDS: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"}
STAGES = ("rollout", "teacher", "student", "sync", "log")
QUADRANTS = (1, 2, 3, 4)
REWARDED = ("rewarded", "unrewarded")


def workspace(entity: str, project: str, name: str, suites: tuple[str, ...], samples: int) -> Any:
    """The whole workspace, runs grouped by cell. Needs no network."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections(suites, samples),
        settings=ws.WorkspaceSettings(x_axis="step", remove_legends_from_panels=False, max_runs=50),
        runset_settings=ws.RunsetSettings(groupby=[ws.Config(key) for key in GROUP_BY]),
    )


def sections(suites: tuple[str, ...], samples: int) -> list[Any]:
    """All sections; those that are read first are open."""
    found = {
        "Accuracy": _accuracy(suites, samples),
        "Memory": _memory(),
        "Training": _training(),
        "Selection": _selection(),
        "Health": _health(),
        "Time": _time(),
    }
    return [ws.Section(name=name, panels=own, is_open=name in ("Accuracy", "Memory")) for name, own in found.items()]


def _accuracy(suites: tuple[str, ...], samples: int) -> list[Any]:
    return [
        *(_bars(f"{suite}, at the end", f"summary/{suite}/final", "fraction") for suite in suites),
        *(_against_retention(f"{suite} against retention", f"summary/{suite}/final") for suite in suites),
        _lines("accuracy while training", *(f"eval/{suite}/mean@{samples}" for suite in suites), unit="fraction"),
        _lines("reward of the step's rollouts", "rollout/reward", smoothing_type="average", smoothing_factor=0.6),
    ]


def _memory() -> list[Any]:
    return [
        _bars("peak memory", "summary/peak_gib", "GiB"),
        _against_retention("peak memory against retention", "summary/peak_gib"),
        _lines("peak memory so far", "mem/peak_gib", unit="GiB"),
        _lines("how full micro-batches are", "batch/fill_frac", unit="fraction"),
    ]


def _training() -> list[Any]:
    return [
        _lines("trained divergence per kept token", "loss/nats", unit="nats"),
        _lines("reverse KL over all tokens", "student/reverse_kl_nats", unit="nats"),
        _lines("entropy", "student/entropy_nats", "teacher/entropy_nats", unit="nats"),
        _lines("gradient norm before clipping", "optim/grad_norm", log_y=True),
        _lines("learning rate", "optim/lr"),
    ]


def _selection() -> list[Any]:
    return [
        _lines("tokens by quadrant", *(f"quadrant/q{q}_frac" for q in QUADRANTS), unit="fraction"),
        _lines("divergence by quadrant", *(f"quadrant/q{q}_loss_frac" for q in QUADRANTS), unit="fraction"),
        _lines("tokens kept", "select/kept_frac", unit="fraction"),
        _lines("overlap with other rules (Jaccard)", metric_regex="select/jaccard_.*"),
        panels.MediaBrowser(title="rollouts", media_keys=["rollout/samples"]),
    ]


def _health() -> list[Any]:
    lengths = [f"length/{name}_tokens" for name in ("p10", "mean", "p90", "max")]
    return [
        _lines("lengths of rollouts", *lengths, unit="tokens"),
        _lines("lengths by reward", *(f"length/mean_tokens_{group}" for group in REWARDED), unit="tokens"),
        _lines("truncated rollouts", "rollout/truncated_frac", unit="fraction"),
        _lines("tokens inside repeated n-grams", "repetition/ngram_frac", unit="fraction"),
        _lines("repetition by reward", *(f"repetition/ngram_frac_{group}" for group in REWARDED), unit="fraction"),
        _lines("compression ratio", "repetition/compression"),
        _lines("end token's probability at its position", "stop/student_prob", "stop/teacher_prob"),
        _lines("end token's probability before it", "stop/student_prob_before", "stop/teacher_prob_before", log_y=True),
        _lines("teacher − student log-probability of the end token", "stop/delta_nats", unit="nats"),
        _lines("end tokens trained on", metric_regex="stop/kept_frac.*"),
        _lines("rank of the end token by rule", metric_regex="stop/score_percentile.*"),
        _lines("warnings", metric_regex="health/.*"),
    ]


def _time() -> list[Any]:
    return [
        _lines("step time by stage", *(f"time/{stage}_s" for stage in STAGES), unit="s", plot_type="stacked-area"),
        _bars("mean step", "summary/mean_step_s", "s"),
    ]


def _lines(title: str, *metrics: str, unit: str = "", **options: Any) -> Any:
    return panels.LinePlot(title=title, x="step", y=list(metrics), title_y=unit, **OVER_SEEDS, **options)


def _bars(title: str, metric: str, unit: str) -> Any:
    return panels.BarPlot(title=title, metrics=[panels.SummaryMetric(metric)], title_x=unit, **OVER_SEEDS)


def _against_retention(title: str, metric: str) -> Any:
    return panels.ScatterPlot(title=title, x=panels.Config("retention"), y=panels.SummaryMetric(metric))


def main(
    entity: str,
    project: str = "opsd",
    name: str = "Token selection",
    suites: tuple[str, ...] = ("math500", "aime24", "aime25"),
    samples: int = 16,
    dry_run: bool = False,
) -> None:
    """Build the workspace and save it, printing its address.

    Args:
        entity: The wandb user or team.
        project: The project that runs were tracked in (--track.project).
        name: The workspace's name.
        suites: Evaluation suites, by their names in --eval.suite.
        samples: Responses per problem (the k of mean@k).
        dry_run: Print the workspace as JSON instead; needs no network and no account.
    """
    if ws is None:
        raise UserError("wandb-workspaces is not installed; pip install wandb-workspaces")
    built = workspace(entity, project, name, suites, samples)
    if dry_run:
        print(json.dumps(built._to_model().model_dump(by_alias=True, mode="json"), indent=1))
        return
    print(built.save().url)


if __name__ == "__main__":
    with exits_on_bad_input("wandb_dashboard"):
        tyro.cli(main)
