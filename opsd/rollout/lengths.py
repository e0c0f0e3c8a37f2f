"""Lengths and repetition of rollouts, and which part of a truncated rollout is trained on.

Legend: T tokens of a response.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from opsd.types import Rollout

# Tokens of an n-gram: normal text rarely repeats one of this length.
NGRAM = 8
QUANTILES = {"length/p10_tokens": 0.1, "length/p50_tokens": 0.5, "length/p90_tokens": 0.9, "length/max_tokens": 1.0}
# Minimum fraction of a truncated rollout that counts as its tail.
TAIL_SHARE = 0.1
_BASE = np.uint64(0x9E3779B97F4A7C15)


def trainable(rollouts: list[Rollout], truncated: Literal["keep", "drop", "mask_tail"]) -> list[Rollout]:
    """The part of a step's rollouts that is trained on, by --rollout.truncated. Rollouts kept whole are not copied.

    A token's loss does not depend on later tokens, so a tail that is left out need not be computed either.
    """
    if truncated == "keep":
        return rollouts
    if truncated == "drop":
        return [rollout for rollout in rollouts if not rollout.truncated]
    return [_without_tail(rollout) if rollout.truncated else rollout for rollout in rollouts]


def _without_tail(rollout: Rollout) -> Rollout:
    ids, mask = rollout.response_ids, rollout.student_mask
    end = min(loop_start(ids), len(ids) - int(np.ceil(TAIL_SHARE * len(ids))))
    return dataclasses.replace(rollout, response_ids=ids[:end], student_mask=None if mask is None else mask[:end])


def loop_start(ids: Sequence[int]) -> int:
    """Index at which the loop at the end of a response starts its second round; the length if there is no loop.

    A loop has at least two rounds, and its repetition is at least one n-gram long.
    """
    ids_T = np.asarray(ids)
    length = first = len(ids_T)
    if not length:
        return 0
    # A loop's last token also occurs one round earlier.
    for period in (length - 1 - np.flatnonzero(ids_T[:-1] == ids_T[-1])).tolist():
        same = ids_T[period:] == ids_T[:-period]
        broken = np.flatnonzero(~same)
        repeated = len(same) - (broken[-1] + 1 if len(broken) else 0)
        if repeated >= max(period, NGRAM):
            first = min(first, length - repeated)
    return int(first)


def repeated_fraction(ids: Sequence[int], n: int = NGRAM) -> float:
    """Fraction of a response's tokens inside an n-gram that occurs more than once; 0 if it is shorter than n."""
    if len(ids) < n:
        return 0.0
    # A hash modulo 2^64: equal n-grams have equal numbers; two different ones do with probability of about 2^-64.
    ids_T = np.asarray(ids, dtype=np.uint64) + np.uint64(1)
    windows = np.lib.stride_tricks.sliding_window_view(ids_T, n)
    powers = np.cumprod(np.full(n, _BASE))
    with np.errstate(over="ignore"):
        number = (windows * powers).sum(-1)
    _, which, counts = np.unique(number, return_inverse=True, return_counts=True)
    inside_T = np.zeros(len(ids) + 1, dtype=np.int64)
    starts = np.flatnonzero(counts[which] > 1)
    np.add.at(inside_T, starts, 1)
    np.add.at(inside_T, starts + n, -1)
    return float((inside_T.cumsum()[:-1] > 0).mean())


def compression_ratio(ids: Sequence[int]) -> float:
    """Size of a response's ids (four bytes each) over their size after zlib; 1 for an empty response."""
    raw = np.asarray(ids, dtype="<u4").tobytes()
    return len(raw) / len(zlib.compress(raw, 1)) if raw else 1.0


def length_metrics(rollouts: list[Rollout], rewards: list[float] | None) -> dict[str, float]:
    """Lengths in tokens (mean, quantiles), repetition (a fraction) and compression of a step's rollouts.

    The means are also given for rewarded and for unrewarded rollouts, if there are any.
    """
    own = [[t for t, ours in zip(r.response_ids, r.by_student, strict=True) if ours] for r in rollouts]
    values = {
        "length/mean_tokens": [len(ids) for ids in own],
        "repetition/ngram_frac": [repeated_fraction(ids) for ids in own],
        "repetition/compression": [compression_ratio(ids) for ids in own],
    }
    metrics = {name: float(np.mean(each)) for name, each in values.items()}
    for name, quantile in QUANTILES.items():
        metrics[name] = float(np.quantile(values["length/mean_tokens"], quantile))
    if rewards is not None:
        for group, chosen in (("rewarded", True), ("unrewarded", False)):
            places = [place for place, reward in enumerate(rewards) if (reward > 0) == chosen]
            if places:
                metrics |= {
                    f"{name}_{group}": float(np.mean([each[p] for p in places])) for name, each in values.items()
                }
    return metrics
