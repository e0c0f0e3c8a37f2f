#!/usr/bin/env python
"""Makes the pocket experiment from a seed: problems, tokenizer, teacher and student, and their accuracies.

    python scripts/pocket/make.py --out assets/pocket

On two CPU cores: about four minutes for the teacher, one for the student, half a minute for measuring.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from opsd.eval.evaluator import Suite
from opsd.run.disk import writing
from opsd.types import Prompt
from opsd.utils.errors import UserError, exits_on_bad_input
from opsd.utils.seeding import derive_seed
from pocket.measure import accuracy, measure
from pocket.sft import SUMS_STUDENT, SUMS_TEACHER, SumsRecipe, sums_batches, sums_model, train_shown, write_made
from pocket.task import Problem, fresh_problems
from pocket.tokenizer import sums_tokenizer

EVAL_PROBLEMS = 256
TRAIN_PROBLEMS = 4096
"""240 steps × 16 prompts take 3,840: no prompt comes twice."""
CHOICE_PROBLEMS = 256
"""Problems that the student's checkpoint is chosen on; used for nothing else."""
CHOICE_SAMPLES = 4
CHECKPOINT_EVERY = 100
SAMPLES = 16


def make_problems(seed: int) -> dict[str, list[Problem]]:
    """Problems to evaluate on, to train on and to choose the student on: all different, from separate streams."""
    taken: set[str] = set()
    problems: dict[str, list[Problem]] = {}
    for name, count in (("eval", EVAL_PROBLEMS), ("train", TRAIN_PROBLEMS), ("choice", CHOICE_PROBLEMS)):
        stream = fresh_problems(Random(derive_seed(seed, name, "problems")), taken)
        problems[name] = []
        for problem in islice(stream, count):
            taken.add(problem.prompt)
            problems[name].append(problem)
    return problems


def as_jsonl(problems: list[Problem]) -> str:
    """A line per problem, with the fields that `opsd train` reads."""
    return "".join(json.dumps({"prompt": problem.prompt, "answer": problem.answer}) + "\n" for problem in problems)


def as_prompts(problems: list[Problem], tokenizer: Any) -> list[Prompt]:
    """Problems as the trainer's sampler takes them."""
    return [Prompt(str(k), p.prompt, tokenizer(p.prompt).input_ids, p.answer) for k, p in enumerate(problems)]


def make_model(
    recipe: SumsRecipe, tokenizer: Any, seed: int, problems: dict[str, list[Problem]]
) -> tuple[PreTrainedModel, int]:
    """The trained model and the step at which its training ended. None of `problems` is trained on."""
    model = sums_model(recipe, tokenizer, seed)
    taken = {problem.prompt for chosen in problems.values() for problem in chosen}
    choice = Suite("choice", as_prompts(problems["choice"], tokenizer))
    step = 0
    for step in train_shown(model, sums_batches(recipe, tokenizer, seed, taken), recipe):
        if recipe.enough is not None and step % CHECKPOINT_EVERY == 0:
            found = accuracy(model, tokenizer, choice, CHOICE_SAMPLES)[f"mean@{CHOICE_SAMPLES}"]
            if found >= recipe.enough:
                break
    return model, step


def make(out: Path, seed: int) -> dict[str, Any]:
    """Write everything to `out`; returns what made.json holds: seed, accuracies (fractions), versions, checksums."""
    out.mkdir(parents=True, exist_ok=True)
    problems = make_problems(seed)
    for name in ("eval", "train"):
        (out / f"{name}.jsonl").write_text(as_jsonl(problems[name]))
    tokenizer = sums_tokenizer()
    models = {}
    for recipe in (SUMS_TEACHER, SUMS_STUDENT):
        model, step = make_model(recipe, tokenizer, seed, problems)
        model.save_pretrained(out / recipe.name)
        tokenizer.save_pretrained(out / recipe.name)
        models[recipe.name] = {"steps": step, **measure(model, tokenizer, out / "eval.jsonl", SAMPLES)}
    files = ["eval.jsonl", "train.jsonl", "teacher/model.safetensors", "student/model.safetensors"]
    return write_made(out, "make.py", seed, files, models=models)


def main(out: Path, seed: int = 0) -> None:
    """Make the pocket problems and models; existing files of the same names are replaced.

    Args:
        out: Folder to write to.
        seed: Decides problems, weights and training data.
    """
    disable_progress_bar()
    with writing(f"--out {out}", "give another folder", UserError):
        made = make(out, seed)
    print(json.dumps(made["models"], indent=1))


if __name__ == "__main__":
    with exits_on_bad_input("make"):
        tyro.cli(main)
