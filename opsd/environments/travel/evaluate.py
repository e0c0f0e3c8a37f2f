"""Avg@k and Best@k on held-out trips: means of the fraction of hard constraints, with standard errors over trips."""

from __future__ import annotations

from typing import Any

import numpy as np

from opsd.config import EvalConfig
from opsd.environments.travel.score import PlanScore
from opsd.environments.travel.talk import Talk
from opsd.eval.evaluator import Suite, SuiteRunner, sample_statistics, standard_error
from opsd.types import Rollout


class TravelEvaluator(SuiteRunner):
    """Evaluates episodes by their final plans."""

    def __init__(self, suites: list[Suite], config: EvalConfig, max_new_tokens: int, talk: Talk) -> None:
        super().__init__(suites, config, max_new_tokens)
        self._talk = talk

    def statistics(self, suite: Suite, rollouts: list[Rollout]) -> dict[str, Any]:
        return statistics(rollouts, [self._talk.score(rollout) for rollout in rollouts], self._config.samples)

    def rewards(self, rollouts: list[Rollout]) -> list[float]:
        """The fraction of hard constraints that each rollout's plan satisfies."""
        return [self._talk.score(rollout).hard_fraction for rollout in rollouts]


def statistics(rollouts: list[Rollout], scores: list[PlanScore], samples: int) -> dict[str, Any]:
    """Statistics of P trips with `samples` episodes each, trip by trip. Fractions; lengths in response tokens.

    mean@k is the paper's Avg@k: the mean over trips and samples of the fraction of hard constraints. best@k: the mean
    over trips of the best sample's fraction. Standard errors are over trips. constraints: for each key, the
    fraction of the trips' samples that satisfy it, and the number of trips. hard_all: the fraction that satisfies all.
    """
    score_PK = np.array([score.hard_fraction for score in scores]).reshape(-1, samples)
    trips = [rollout.prompt.id for rollout in rollouts[::samples]]
    tokens, truncated = np.array([(len(rollout.response_ids), rollout.truncated) for rollout in rollouts]).T
    commonsense = [score.commonsense or 0.0 for score in scores]
    known = any(score.commonsense is not None for score in scores)
    return {
        **sample_statistics(trips, score_PK, tokens, truncated),
        "stderr_best": standard_error(score_PK.max(1)),
        "majority@k": None,
        "constraints": by_constraint(scores, samples),
        "hard_all": float(np.mean([score.hard_all for score in scores])),
        "delivered_frac": float(np.mean([score.delivered for score in scores])),
        "valid_frac": float(np.mean([score.valid for score in scores])),
        "commonsense": float(np.mean(commonsense)) if known else None,
        "mean_student_tokens": float(np.mean([rollout.student_tokens() for rollout in rollouts])),
    }


def by_constraint(scores: list[PlanScore], samples: int) -> dict[str, dict[str, float]]:
    """For each constraint's key: mean over the samples of the trips that have it, standard error, number of trips."""
    held: dict[str, list[bool]] = {}
    for score in scores:
        for key, value in score.hard.items():
            held.setdefault(key, []).append(value)
    result = {}
    for key, values in sorted(held.items()):
        of_trip = np.array(values, dtype=float).reshape(-1, samples).mean(1)
        error = standard_error(of_trip)
        result[key] = {
            "mean": float(of_trip.mean()),
            "trips": len(of_trip),
            **({} if error is None else {"stderr_problems": error}),
        }
    return result
