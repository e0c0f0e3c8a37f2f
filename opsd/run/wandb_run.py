"""A run in wandb: its group, its summary, and a few of its rollouts as a table.

wandb is imported only here, and only if a run asks for it; metrics.jsonl is written in any case.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from opsd.config import TrainConfig, to_json
from opsd.selection import ALL_TOKENS
from opsd.utils.paths import model_name
from opsd.utils.seeding import derive_seed

SAMPLE_ROWS = 16
SAMPLE_COLUMNS = ("step", "id", "prompt", "answer", "text", "reward", "truncated", "tokens")
# wandb's own limits.
LONGEST_TAG, LONGEST_GROUP = 64, 128


def labels(config: TrainConfig, folder: Path) -> dict[str, str]:
    """Labels that group runs, from the resolved settings: recipe (the parent folder), pair, selector and seed."""
    select = config.select
    kept = "" if select.by == ALL_TOKENS else f"-{100 * select.retention:g}"
    return {
        "recipe": folder.resolve().parent.name,
        "pair": f"{'+'.join(map(model_name, config.teacher_paths().values()))} to {model_name(config.student)}",
        "selector": f"{select.by}{kept}",
        "seed": f"seed-{config.seed}",
    }


def start(config: TrainConfig, folder: Path, mode: Literal["offline", "online"]) -> Any:
    """A wandb run for a run folder; the seeds of a cell share its group."""
    import wandb

    label = labels(config, folder)
    return wandb.init(
        project=config.track.project,
        name=folder.name,
        # The id is derived from the run's path: a resumed run keeps it, and no other run has it.
        id=f"{derive_seed(str(folder.resolve())):016x}",
        resume="allow",
        mode=mode,
        dir=str(folder),
        group=" · ".join(label[name] for name in ("recipe", "pair", "selector"))[:LONGEST_GROUP],
        job_type=label["selector"][:LONGEST_TAG],
        tags=[text[:LONGEST_TAG] for text in label.values() if text],
        # The settings, and top-level keys by which charts can group and filter.
        config={
            **to_json(config),
            **{name: label[name] for name in ("recipe", "pair", "selector")},
            "retention": 1.0 if config.select.by == ALL_TOKENS else config.select.retention,
        },
        settings=wandb.Settings(silent=True),
    )


def summary(metrics: Path) -> dict[str, float]:
    """A run's summary, from its metrics.jsonl: GiB, seconds, tokens, fractions; only of metrics that were logged.

    summary/peak_gib, mean_step_s, tokens, kept_frac; per suite SUITE/final, best, gain (final minus step 0).
    wandb itself also keeps each metric's last value.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    logged = {
        key: [line[key] for line in lines if key in line] for key in dict.fromkeys(k for line in lines for k in line)
    }
    found: dict[str, float] = {}
    for name, key, sum_up in (
        ("peak_gib", "mem/peak_gib", max),
        ("mean_step_s", "time/step_s", _mean),
        ("tokens", "rollout/tokens", sum),
        ("kept_frac", "select/kept_frac", _mean),
    ):
        if key in logged:
            found[f"summary/{name}"] = sum_up(logged[key])
    for key, values in logged.items():
        if key.startswith("eval/") and "/mean@" in key:
            suite = key.split("/")[1]
            found |= {f"summary/{suite}/final": values[-1], f"summary/{suite}/best": max(values)}
            if key in lines[0] and lines[0]["step"] == 0:
                found[f"summary/{suite}/gain"] = values[-1] - values[0]
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def sample_table(rollouts: Path, step: int) -> Any | None:
    """At most SAMPLE_ROWS rollouts of rollouts/step_N.jsonl, spread evenly, as a wandb.Table; None without the file."""
    if not rollouts.is_file():
        return None
    import wandb

    records = [json.loads(line) for line in rollouts.read_text().splitlines()]
    count = min(SAMPLE_ROWS, len(records))
    chosen = [records[place * len(records) // count] for place in range(count)]
    names = ("id", "prompt_id", "answer", "text", "reward", "truncated")
    rows: list[Any] = [[step, *(one[name] for name in names), len(one["response_ids"])] for one in chosen]
    return wandb.Table(columns=list(SAMPLE_COLUMNS), data=rows, allow_mixed_types=True)
