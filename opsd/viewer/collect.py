"""Turn a run folder's record of one step into the page's data: plain JSON values, with texts by index."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from opsd.utils.errors import UserError, said
from opsd.utils.paths import check_old_run
from opsd.viewer.examples import pick
from opsd.viewer.labels import Label, Labels, labels_of
from opsd.viewer.texts import Texts

# Columns of the record, and what the page calls them.
NUMBERS = {
    "h": "entropy",
    "r": "reverse_kl",
    "f": "forward_kl",
    "e": "teacher_entropy",
    "p": "log_prob",
    "o": "teacher_log_prob",
}


def recorded_steps(run: Path) -> list[int]:
    """The steps with a token record, ascending. Raises UserError if `run` is not a run or holds none."""
    check_old_run(run)
    found = [re.fullmatch(r"step_(\d+)", file.stem) for file in (run / "tokens").glob("step_*.parquet")]
    steps = sorted(int(match[1]) for match in found if match)
    if not steps:
        raise UserError(
            f"{run} holds no token record (tokens/*.parquet); train with --telemetry.save_tokens True "
            "--telemetry.top_tokens 5"
        )
    return steps


def collect(run: Path, step: int, most_rollouts: int, most_tokens: int) -> dict[str, Any]:
    """Everything the page shows of one step. Raises UserError for files that cannot be read."""
    config = _config(run)
    table = _table(run / "tokens" / f"step_{step}.parquet")
    texts, labels = (
        Texts.of_run(run, config),
        labels_of(table, config.get("telemetry", {}).get("options", {}), lambda column: _splits(run, step, column)),
    )
    written = _rollouts(run / "rollouts" / f"step_{step}.jsonl")
    shown, rows, tokens = [], [], 0
    numbers = sorted(set(table["rollout"].tolist()))
    for number in numbers[:most_rollouts]:
        group = table.loc[(table["rollout"] == number).to_numpy()]
        tokens += len(group)
        if shown and tokens > most_tokens:
            break
        rows.append(group)
        shown.append(_rollout(number, group, written.get(number), texts, labels))
    visible = pd.concat(rows) if rows else table
    return {
        "run": run.resolve().name,
        "step": step,
        "steps": config["steps"],
        "student": Path(config["student"]).name,
        "teacher": Path(config["teacher"]["model"]).name,
        "selector": _selector(config["select"]),
        "labels": [_labels(run, step, table, column, labels[column]) for column in labels],
        "scale": {key: _scale(visible, name) for key, name in NUMBERS.items() if key in "hrfe"},
        "left_out": len(numbers) - len(shown),
        "rollouts": shown,
        "examples": pick(visible, shown, labels),
        "texts": texts.all(),
    }


def _rollout(
    number: int, group: pd.DataFrame, written: dict[str, Any] | None, texts: Texts, labels: Labels
) -> dict[str, Any]:
    """One rollout: all its tokens in `ids`; statistics in lists that skip tool tokens (`at`: the index of each)."""
    ids = [int(i) for i in group["token_id"]] if written is None else written["response_ids"]
    place = group["position"].tolist() if written is not None else list(range(len(group)))
    found: dict[str, Any] = {"id": number, "ids": [texts.number(i) for i in ids]}
    if written is not None:
        found |= {
            "prompt": texts.whole(written["prompt_ids"]),
            "answer": written["answer"],
            "reward": written["reward"],
            "truncated": written["truncated"],
        }
    if place != list(range(len(ids))):
        found["at"] = place
    for key, name in NUMBERS.items():
        if name in group:
            found[key] = [_short(value) for value in group[name]]
    for column in labels:
        found[f"label {column}"] = group[column].tolist()
    if "top1_agree" in group:
        found["a"] = group["top1_agree"].astype(int).tolist()
    found["k"] = group["kept"].astype(int).tolist()
    if "stop" in group:
        found["end"] = [at for at, ends in zip(place, group["stop"].tolist(), strict=True) if ends]
    for key, side in (("s", "student"), ("t", "teacher")):
        if f"{side}_top_ids" in group:
            found[key] = [[texts.number(int(i)) for i in ids] for ids in group[f"{side}_top_ids"]]
            found[f"{key}p"] = [[_short(v) for v in values] for values in group[f"{side}_top_log_probs"]]
    return found


def _labels(run: Path, step: int, table: pd.DataFrame, column: str, labels: tuple[Label, ...]) -> dict[str, Any]:
    """A label column: what its values mean, their shares of tokens and of Σδ, and where it was split, in nats."""
    label_N, divergence_N = table[column].to_numpy(), table["reverse_kl"].to_numpy(dtype=float)
    total, values = divergence_N.sum(), []
    for label in labels:
        own_N = label_N == label.value
        loss = float(divergence_N[own_N].sum() / total) if total else 0.0
        looks = {"value": label.value, "name": label.name, "what": label.what, "colour": label.colour}
        values.append({**looks, "faint": label.faint, "tokens": float(own_N.mean()), "loss": loss})
    return {"column": column, "values": values, "splits": _splits(run, step, column)}


def _scale(table: pd.DataFrame, name: str) -> float | None:
    """Where a colour scale ends: the 98th percentile, in nats; None if the statistic was not recorded."""
    if name not in table or table.empty:
        return None
    return max(float(np.quantile(table[name].to_numpy(dtype=float), 0.98)), 1e-6)


def _short(value: float) -> float | None:
    """Rounded to four digits; None for values that JSON has no number for (a log-probability of −inf)."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _selector(select: dict[str, Any]) -> str:
    return "all tokens" if select["by"] == "all" else f"{select['by']}, {100 * select['retention']:g} % kept"


def _splits(run: Path, step: int, column: str) -> dict[str, float]:
    """The values of COLUMN/AXIS_split_nats in the step's line of metrics.jsonl, by axis."""
    file = run / "metrics.jsonl"
    for line in _text(file).splitlines() if file.is_file() else []:
        values = _json(line, file)
        if values.get("step") == step:
            axes = {key: re.fullmatch(rf"{re.escape(column)}/(\w+)_split_nats", key) for key in values}
            return {match[1]: values[key] for key, match in axes.items() if match}
    return {}


def _config(run: Path) -> dict[str, Any]:
    file = run / "config.json"
    config = _json(_text(file), file)
    if not {"student", "teacher", "select", "steps"} <= set(config):
        raise UserError(f"{file} is not a run's configuration; give a run folder")
    return config


def _table(file: Path) -> pd.DataFrame:
    with said(f"{file} cannot be read", "give another --step", OSError, ValueError):
        return pd.read_parquet(file)


def _rollouts(file: Path) -> dict[int, dict[str, Any]]:
    """The step's rollouts by id; empty if they were not saved (the page then lacks prompts and rewards)."""
    if not file.is_file():
        return {}
    return {record["id"]: record for record in (_json(line, file) for line in _text(file).splitlines())}


def _text(file: Path) -> str:
    with said(f"{file} cannot be read", "give a complete run folder", OSError, UnicodeDecodeError):
        return file.read_text()


def _json(text: str, file: Path) -> Any:
    with said(f"{file} is not JSON", "give a complete run folder", ValueError):
        return json.loads(text)
