"""The per-token record of a step, tokens/step_N.parquet: each token's statistics, and whether it was trained on.

Columns: step, rollout (its id), position (in the response, from 0), token_id; entropy, reverse_kl, forward_kl,
teacher_entropy, grad_norm and other scores (nats), top1_agree; labels of telemetry (quadrant, 1 to 4), kept.
With `--telemetry.top_tokens K` also log_prob and teacher_log_prob of the token, and student_top_ids,
student_top_log_probs, teacher_top_ids, teacher_top_log_probs: lists of K, likeliest first.

Legend: N student tokens of a step, micro-batch by micro-batch; R of them recorded; K likeliest tokens per row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from opsd.distill.topk import ModelTop
from opsd.selection import TokenStats, TokenTelemetry
from opsd.types import Rollout


def recorded_rollouts(rollouts: list[Rollout], most: int) -> list[int]:
    """Ids of at most `most` rollouts with student tokens, spread evenly: over prompts first, then over samples."""
    ids = sorted(rollout.id for rollout in rollouts if rollout.student_tokens())
    count = min(most, len(ids))
    return [ids[place * len(ids) // count] for place in range(count)]


def token_table(
    step: int,
    rollouts: list[Rollout],
    most: int,
    stats: TokenStats,
    kept_N: Tensor,
    telemetry: Iterable[TokenTelemetry],
    top: tuple[ModelTop, ModelTop] | None = None,
) -> pd.DataFrame:
    """The step's record, one row per token, in the order of rollouts and positions.

    It has at most `most` rollouts (see `recorded_rollouts`); `top` has only their rows, in the order of `stats`.
    telemetry: labels the tokens.
    """
    recorded = recorded_rollouts(rollouts, most)
    row_R = torch.isin(stats.rollout_N.cpu(), torch.tensor(recorded, dtype=torch.int64)).nonzero().squeeze(1)
    statistics = {
        {"token_ids_N": "token_id"}.get(name, name.removesuffix("_N")): value
        for name, value in vars(stats).items()
        if isinstance(value, torch.Tensor)
    }
    for one in telemetry:
        statistics |= one.label_tokens(stats)
    statistics["kept"] = kept_N
    columns: dict[str, Any] = {name: value.cpu()[row_R].numpy() for name, value in statistics.items()}
    if top is not None:
        columns |= _top_columns(*top)
    columns["position"] = np.empty(len(row_R), dtype=np.int64)
    for rollout in rollouts:
        # A rollout's rows are in the order of its tokens.
        if rollout.id in recorded:
            columns["position"][columns["rollout"] == rollout.id] = np.flatnonzero(rollout.by_student)
    columns["step"] = np.full(len(row_R), step, dtype=np.int64)
    first = ["step", "rollout", "position", "token_id"]
    order = [*(name for name in first if name in columns), *(name for name in columns if name not in first)]
    table = pd.DataFrame({name: columns[name] for name in order})
    return table.sort_values(["rollout", "position"], kind="stable", ignore_index=True)


def _top_columns(student: ModelTop, teacher: ModelTop) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "log_prob": student.sampled_N.cpu().numpy(),
        "teacher_log_prob": teacher.sampled_N.cpu().numpy(),
    }
    for name, top in (("student", student), ("teacher", teacher)):
        columns[f"{name}_top_ids"] = list(top.ids_NK.to(torch.int32).cpu().numpy())
        columns[f"{name}_top_log_probs"] = list(top.log_prob_NK.cpu().numpy())
    return columns
