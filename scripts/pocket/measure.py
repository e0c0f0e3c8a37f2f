#!/usr/bin/env python
"""How well a pocket model solves the problems, and how often its planted habits show.

    python scripts/pocket/measure.py assets/pocket/student assets/pocket/teacher

The numbers are the trainer's own: 256 problems, 16 samples each at temperature 1, judged by their ending. Any
checkpoint folder of a pocket run can be given.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opsd.config import EvalConfig
from opsd.data.rendering import PromptFormat
from opsd.eval.evaluator import Evaluator, Suite, load_suites
from opsd.model.loading import load_scorer, load_tokenizer
from opsd.rollout import HFRollout
from opsd.types import Prompt, Sampling
from opsd.utils.errors import UserError, exits_on_bad_input
from pocket.task import RESPONSE_TOKENS, Habits

EVAL = Path(__file__).resolve().parents[2] / "assets" / "pocket" / "eval.jsonl"
MAX_NEW_TOKENS = RESPONSE_TOKENS + 2
"""Token limit of a response in the pocket recipe: two more than a well-formed one has."""


def accuracy(model: PreTrainedModel, tokenizer: Any, suite: Suite, samples: int) -> dict[str, float]:
    """mean@k with its standard error over problems, best@k, share of truncated responses: the trainer's evaluator."""
    config = EvalConfig(samples=samples, grader="suffix")
    engine = HFRollout(model, tokenizer, config.generate_batch)
    result = Evaluator([suite], config, MAX_NEW_TOKENS, tokenizer).run(engine, "pocket", None)["suites"][suite.name]
    return {
        f"mean@{samples}": result["mean@k"],
        "stderr_problems": result["stderr_problems"],
        f"best@{samples}": result["best@k"],
        "truncated_frac": result["truncated_frac"],
    }


def greedy_habits(model: PreTrainedModel, tokenizer: Any, problems: list[Prompt]) -> Habits:
    """Habits counted over one greedy response per problem."""
    habits = Habits()
    greedy = Sampling(temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)
    for rollout in HFRollout(model, tokenizer, 256).generate(problems, 1, greedy, seed=0):
        habits.add(tokenizer.decode(rollout.response_ids, skip_special_tokens=True))
    return habits


def measure(model: PreTrainedModel, tokenizer: Any, problems: Path, samples: int) -> dict[str, float]:
    """Accuracy on a problem file, and the frequency of the planted habits in greedy responses; all fractions."""
    (suite,) = load_suites((f"pocket={problems}",), tokenizer, PromptFormat(kind="raw"), None)
    habits = greedy_habits(model, tokenizer, suite.problems).fractions()
    return {**accuracy(model, tokenizer, suite, samples), **{f"greedy_{name}": share for name, share in habits.items()}}


def main(models: Annotated[tuple[str, ...], tyro.conf.Positional], problems: Path = EVAL, samples: int = 16) -> None:
    """Accuracy and habits of pocket models, one JSON line per model; fractions.

    Args:
        models: Model folders.
        problems: Problem file with fields prompt and answer.
        samples: Responses per problem (the k of mean@k).
    """
    if not models:
        raise UserError("no model was given; give a folder, e.g. assets/pocket/student")
    if samples < 1:
        raise UserError(f"--samples {samples}: give a number above 0")
    disable_progress_bar()
    for folder in models:
        tokenizer = load_tokenizer(folder, "model")
        model = load_scorer(folder, "model", torch.float32, torch.device("cpu")).model
        print(json.dumps({"model": folder, **measure(model, tokenizer, problems, samples)}))


if __name__ == "__main__":
    with exits_on_bad_input("measure"):
        tyro.cli(main)
