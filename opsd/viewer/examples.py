"""The tokens worth showing first: the clearest of each kind, as in the paper's appendix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from opsd.viewer.labels import Labels

LEFT_OUT = "left_out"


def pick(table: pd.DataFrame, rollouts: list[dict[str, Any]], labels: Labels) -> list[dict[str, Any]]:
    """The examples of each kind, clearest first: {kind, rollout, row}, the latter two as indices of the page's lists.

    table: the rows of `rollouts`, in their order. The kinds: "COLUMN VALUE" for each label that has examples, in
    descending number of examples, and "left_out": the largest divergence among tokens that were not trained on. How
    clear an example is: the product of its statistics x̂, each scaled to [0, 1] by its largest value, or of 1 − x̂ for
    those that should be low. No two examples of a kind show the same two first choices (in a record without likeliest
    tokens: the same token).
    """
    place = {rollout["id"]: number for number, rollout in enumerate(rollouts)}
    row = table.groupby("rollout", sort=False).cumcount().to_numpy()
    owner = [place[number] for number in table["rollout"].tolist()]
    found = []
    for kind, count, clear in sorted(_kinds(table, labels), key=lambda kind: -kind[1]):
        seen = set()
        rows = np.flatnonzero(clear > -np.inf)
        for index in rows[np.argsort(-clear[rows], kind="stable")]:
            if len(seen) == count:
                break
            if (key := _key(table, index)) not in seen:
                seen.add(key)
                found.append({"kind": kind, "rollout": owner[index], "row": int(row[index])})
    return found


def _kinds(table: pd.DataFrame, labels: Labels) -> Iterator[tuple[str, int, np.ndarray]]:
    """Each kind's name, how many examples to show, and how clear an example every row is (−inf: not of this kind)."""
    for column, values in labels.items():
        for label in values:
            if label.examples and set(label.clearest) <= set(table):
                clear = np.ones(len(table))
                for name, side in label.clearest.items():
                    scaled = _scaled(table[name].to_numpy(dtype=float))
                    clear = clear * (scaled if side > 0 else 1 - scaled)
                yield f"{column} {label.value}", label.examples, np.where(table[column] == label.value, clear, -np.inf)
    if "reverse_kl" in table:
        divergence = _scaled(table["reverse_kl"].to_numpy(dtype=float))
        left_out = ~table["kept"].to_numpy(dtype=bool) & (divergence > 0)
        yield LEFT_OUT, 1, np.where(left_out, divergence, -np.inf)


def _key(table: pd.DataFrame, index: int) -> tuple[int, int]:
    """Both models' first choices, or the token itself: rollouts of one prompt repeat the same examples."""
    if "teacher_top_ids" not in table:
        return int(table["token_id"].iloc[index]), -1
    return int(table["student_top_ids"].iloc[index][0]), int(table["teacher_top_ids"].iloc[index][0])


def _scaled(values: np.ndarray) -> np.ndarray:
    """Divided by the largest; all zeros stay zeros."""
    return values / max(values.max(initial=0.0), 1e-12)
