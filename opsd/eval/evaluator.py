"""Evaluation: k responses per problem, graded; means with standard errors over problems."""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from opsd.config import EvalConfig
from opsd.data.prompts import load_prompts
from opsd.data.rendering import PromptFormat
from opsd.eval.grading import Grader, load_grader
from opsd.rollout import RolloutEngine
from opsd.types import Prompt, Rollout, Sampling
from opsd.utils.errors import UserError
from opsd.utils.seeding import derive_seed

_SUITE_NAME = re.compile(r"[\w.\-]+")


@dataclasses.dataclass(frozen=True)
class Suite:
    """A named set of problems, each with a gold answer."""

    name: str
    problems: list[Prompt]


def load_suites(
    pairs: tuple[str, ...], tokenizer: Any, how: PromptFormat, limit: int | None, flag: str = "--eval.suite"
) -> list[Suite]:
    """The suites of NAME=FILE pairs. flag: the option that gave them. Raises UserError for unusable ones."""
    suites = []
    for pair in pairs:
        name, path = suite_pair(pair, flag)
        if name in {suite.name for suite in suites}:
            raise UserError(f"{flag} names {name!r} twice; give each suite a different name")
        # A suite is evaluated whole: dropping its long problems would change what its score means.
        problems, dropped = load_prompts(Path(path), tokenizer, dataclasses.replace(how, overlong="drop"))
        if dropped:
            raise UserError(
                f"{path}: {dropped} problems are over {how.limit_flag} {how.max_tokens}; raise it: "
                "suites are evaluated completely"
            )
        unanswered = [problem.id for problem in problems if problem.answer is None]
        if unanswered:
            raise UserError(
                f"{path}: the problem with id {unanswered[0]!r} has no field {how.answer_field!r}, "
                "or a blank one; a suite needs gold answers"
            )
        if len({problem.id for problem in problems}) < len(problems):
            twice, _ = Counter(problem.id for problem in problems).most_common(1)[0]
            raise UserError(f"{path} has several records with the id {twice!r}; give each a different id")
        suites.append(Suite(name, problems[:limit]))
    return suites


def suite_pair(pair: str, flag: str, example: str = "math500=data/math500.jsonl") -> tuple[str, str]:
    """NAME=FILE as (name, file). Raises UserError for another form, or a name that cannot be part of a metric's key."""
    name, _, path = pair.partition("=")
    if not name or not path:
        raise UserError(f"{flag} {pair!r}: give NAME=FILE, e.g. {example}")
    if not _SUITE_NAME.fullmatch(name):
        raise UserError(
            f"{flag} {pair!r}: the name {name!r} has characters other than letters, digits, '.', '-' and '_'"
        )
    return name, path


class SuiteRunner(ABC):
    """Runs the same suites with the same sampling on any engine. max_new_tokens: used if config sets none.

    ends: the tokens that end a response, which are not graded; set once the models are loaded.
    """

    ends: frozenset[int] = frozenset()

    def __init__(self, suites: list[Suite], config: EvalConfig, max_new_tokens: int) -> None:
        self.suites, self._config = suites, config
        self._sampling = Sampling.of(config, config.max_new_tokens or max_new_tokens)

    def run(self, engine: RolloutEngine, model: str, step: int | None) -> dict[str, Any]:
        """Evaluate `engine` on every suite; the result is the content of eval/*.json. Fractions, tokens."""
        results = {}
        for suite in self.suites:
            seed = derive_seed(self._config.seed, "eval", suite.name)
            rollouts = engine.generate(suite.problems, self._config.samples, self._sampling, seed)
            results[suite.name] = self.statistics(suite, rollouts)
        sampling = {**dataclasses.asdict(self._sampling), "samples": self._config.samples, "seed": self._config.seed}
        return {"model": model, "step": step, "sampling": sampling, "suites": results}

    @abstractmethod
    def statistics(self, suite: Suite, rollouts: list[Rollout]) -> dict[str, Any]:
        """The statistics of one suite, from its samples·problems rollouts, problem by problem."""

    @abstractmethod
    def rewards(self, rollouts: list[Rollout]) -> list[float] | None:
        """The reward of each rollout in training; None if there are none."""


class Evaluator(SuiteRunner):
    """Evaluates single answers by comparing them with gold answers."""

    def __init__(self, suites: list[Suite], config: EvalConfig, max_new_tokens: int, tokenizer: Any) -> None:
        super().__init__(suites, config, max_new_tokens)
        self._tokenizer, self.grader = tokenizer, load_grader(config.grader)

    def statistics(self, suite: Suite, rollouts: list[Rollout]) -> dict[str, Any]:
        samples, how = self._config.samples, (self.grader, self._tokenizer, self.ends)
        of_problem = [rollouts[first : first + samples] for first in range(0, len(rollouts), samples)]
        pairs = zip(suite.problems, of_problem, strict=True)
        return statistics([score_problem(problem, own, *how) for problem, own in pairs], self.grader.answer is not None)

    def rewards(self, rollouts: list[Rollout]) -> list[float] | None:
        return grade_rollouts(rollouts, self.grader, self._tokenizer, self.ends)


def grade_rollouts(
    rollouts: list[Rollout], grader: Grader, tokenizer: Any, ends: frozenset[int] = frozenset()
) -> list[float] | None:
    """1.0 or 0.0 for each rollout; None unless every prompt has a gold answer. A truncated rollout is wrong."""
    if not rollouts or any(rollout.prompt.answer is None for rollout in rollouts):
        return None
    return [float(not r.truncated and grader.grade(_text(r, tokenizer, ends), str(r.prompt.answer))) for r in rollouts]


@dataclasses.dataclass(frozen=True)
class ProblemRecord:
    """One problem's samples, graded. correct, answers, tokens and truncated have one entry per sample.

    answers: what each sample votes for in majority@k; None if it has no answer, or the response was truncated.
    """

    id: str
    gold: str
    correct: list[bool]
    answers: list[str | None]
    tokens: list[int]
    truncated: list[bool]


def score_problem(
    problem: Prompt, rollouts: list[Rollout], grader: Grader, tokenizer: Any, ends: frozenset[int] = frozenset()
) -> ProblemRecord:
    """Grade a problem's rollouts. A truncated one is wrong, whatever it contains."""
    correct, gold = grade_rollouts(rollouts, grader, tokenizer, ends), str(problem.answer)
    assert correct is not None

    def answer(rollout: Rollout) -> str | None:
        named = None if rollout.truncated else grader.answer
        return None if named is None else named(_text(rollout, tokenizer, ends), gold)

    return ProblemRecord(
        id=problem.id,
        gold=gold,
        correct=[value == 1.0 for value in correct],
        answers=[answer(r) for r in rollouts],
        tokens=[len(r.response_ids) for r in rollouts],
        truncated=[r.truncated for r in rollouts],
    )


def statistics(records: list[ProblemRecord], votes: bool = True) -> dict[str, Any]:
    """Statistics of P problems with k samples each. Fractions; lengths in tokens.

    mean@k: mean over problems and samples; stderr_problems: its standard error over problems.
    std_samples: standard deviation, over the k samples, of the accuracy on all problems. best@k: fraction of problems
    solved at least once. pass@k: for j = 1, 2, 4, … and k, the chance that one of j samples is right, unbiased (see
    `pass_at`). majority@k: fraction whose most frequent answer (the earliest on a tie) is right; truncated rollouts
    have no vote, a problem without votes counts as not solved; None unless the grader names answers (votes).
    answered_frac: fraction of the rollouts in which the grader found an answer; None likewise.
    """
    correct_PK = np.array([record.correct for record in records], dtype=float)
    tokens_PK, truncated_PK = (np.array([getattr(r, name) for r in records]) for name in ("tokens", "truncated"))
    samples, right_P = correct_PK.shape[1], [sum(record.correct) for record in records]
    answered = float(np.mean([[answer is not None for answer in record.answers] for record in records]))
    draws = sorted({samples, *(2**power for power in range(samples.bit_length()))})
    return {
        **sample_statistics([record.id for record in records], correct_PK, tokens_PK, truncated_PK),
        "pass@k": {str(j): float(np.mean([pass_at(j, samples, right) for right in right_P])) for j in draws},
        "majority@k": float(np.mean([_majority_is_right(record) for record in records])) if votes else None,
        "answered_frac": answered if votes else None,
    }


def sample_statistics(
    ids: list[str], score_PK: np.ndarray, tokens_PK: np.ndarray, truncated_PK: np.ndarray
) -> dict[str, Any]:
    """The part of `statistics` that any scores in [0, 1] have; best@k is then the mean of each problem's best."""
    score_P, samples = score_PK.mean(1), score_PK.shape[1]
    return {
        "mean@k": float(score_P.mean()),
        "k": samples,
        "problems": len(ids),
        "stderr_problems": standard_error(score_P),
        "std_samples": float(score_PK.mean(0).std(ddof=1)) if samples > 1 else None,
        "best@k": float(score_PK.max(1).mean()),
        "mean_tokens": float(tokens_PK.mean()),
        "median_tokens": float(np.median(tokens_PK)),
        "max_tokens": int(tokens_PK.max()),
        "truncated_frac": float(truncated_PK.mean()),
        "scores": {name: float(score) for name, score in zip(ids, score_P, strict=True)},
    }


def pass_at(j: int, samples: int, right: int) -> float:
    """The chance that j of a problem's samples, drawn without replacement, include a right one: 1 − C(n−c, j)/C(n, j).

    Unbiased for the chance that one of j new samples is right (Chen et al. 2021, arXiv 2107.03374, Eq. 1).
    """
    return 1.0 - math.comb(samples - right, j) / math.comb(samples, j)


def standard_error(values: np.ndarray) -> float | None:
    """Standard error of the mean of independent values; None for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def summary(result: dict[str, Any], prefix: str = "eval") -> dict[str, float]:
    """The numbers of an evaluation that go into a line of metrics: PREFIX/SUITE/mean@16 and others."""
    flat = {}
    for name, suite in result["suites"].items():
        k = suite["k"]
        flat[f"{prefix}/{name}/mean@{k}"] = suite["mean@k"]
        flat[f"{prefix}/{name}/best@{k}"] = suite["best@k"]
        if suite["majority@k"] is not None:
            flat[f"{prefix}/{name}/majority@{k}"] = suite["majority@k"]
        if suite["stderr_problems"] is not None:
            flat[f"{prefix}/{name}/stderr_problems"] = suite["stderr_problems"]
        flat[f"{prefix}/{name}/truncated_frac"] = suite["truncated_frac"]
    return flat


def unread(result: dict[str, Any], flag: str = "--eval.grader") -> list[str]:
    """A warning line per suite in which the grader found no answer, right or wrong. flag: the grader's option."""
    return [
        f"{name}: the grader found no answer in any response. {flag} math reads \\boxed{{…}} and lines that begin with "
        f"'Answer:'; {flag} suffix compares the end of the response"
        for name, suite in result["suites"].items()
        if suite.get("answered_frac") == 0 and suite["truncated_frac"] < 1 and not suite["mean@k"]
    ]


def _majority_is_right(record: ProblemRecord) -> bool:
    """Whether the most frequent answer is right; see `statistics`."""
    votes = Counter(answer for answer in record.answers if answer is not None)
    return bool(votes) and record.correct[record.answers.index(votes.most_common(1)[0][0])]


def _text(rollout: Rollout, tokenizer: Any, ends: frozenset[int]) -> str:
    """The text that is graded: without the end token, which need not be a special token."""
    ids = rollout.response_ids
    return tokenizer.decode(ids[:-1] if ids and ids[-1] in ends else ids, skip_special_tokens=True)
