"""The tokens worth showing first: the clearest of each kind, as in the paper's appendix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

# Kind, how many, which quadrant; `left_out` is the fifth kind: the dearest tokens that were not trained on.
KINDS = (("q3", 3), ("q1", 2), ("q2", 1), ("q4", 1), ("left_out", 1))


def pick(table: pd.DataFrame, rollouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The examples of each kind, clearest first: {kind, rollout, row}, both places in the page's own lists.

    table: the rows of `rollouts`, in their order. Clearest means far from both splits: with h and δ scaled to [0, 1]
    by their largest value, δ̂·(1 − ĥ) for Q3, ĥ·δ̂ for Q1, ĥ·(1 − δ̂) for Q2, (1 − ĥ)·(1 − δ̂) for Q4; plain δ among
    tokens left out of training. No two examples of a kind show the same two first choices (in a record without
    likeliest tokens: the same token).
    """
    if table.empty or not {"entropy", "reverse_kl"} <= set(table):
        return []
    entropy, divergence = (_scaled(table[name].to_numpy(dtype=float)) for name in ("entropy", "reverse_kl"))
    clear = {
        "q1": entropy * divergence,
        "q2": entropy * (1 - divergence),
        "q3": divergence * (1 - entropy),
        "q4": (1 - entropy) * (1 - divergence),
        "left_out": divergence,
    }
    place = {rollout["id"]: number for number, rollout in enumerate(rollouts)}
    row = table.groupby("rollout", sort=False).cumcount().to_numpy()
    owner = [place[number] for number in table["rollout"].tolist()]
    found = []
    for kind, count in KINDS:
        seen = set()
        for index in _ranked(table, kind, clear[kind]):
            if len(seen) == count:
                break
            if (key := _key(table, index)) not in seen:
                seen.add(key)
                found.append({"kind": kind, "rollout": owner[index], "row": int(row[index])})
    return found


def _ranked(table: pd.DataFrame, kind: str, clear: np.ndarray) -> np.ndarray:
    """The rows of a kind, clearest first; ties go to the earlier row."""
    if kind == "left_out":
        own = ~table["kept"].to_numpy(dtype=bool) & (clear > 0)
    elif "quadrant" in table:
        own = table["quadrant"].to_numpy() == int(kind[1])
    else:
        return np.array([], dtype=int)
    rows = np.flatnonzero(own)
    return rows[np.argsort(-clear[rows], kind="stable")]


def _key(table: pd.DataFrame, index: int) -> tuple[int, int]:
    """Both models' first choices, or the token itself: rollouts of one prompt repeat the same places."""
    if "teacher_top_ids" not in table:
        return int(table["token_id"].iloc[index]), -1
    return int(table["student_top_ids"].iloc[index][0]), int(table["teacher_top_ids"].iloc[index][0])


def _scaled(values: np.ndarray) -> np.ndarray:
    """Divided by the largest; all zeros stay zeros."""
    return values / max(values.max(), 1e-12)
