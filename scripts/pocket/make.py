#!/usr/bin/env python
"""Makes the pocket experiment from a seed: problems, tokenizer, teacher and student, and their accuracies.

    python scripts/pocket/make.py --out assets/pocket

On two CPU cores: about four minutes for the teacher, one for the student, half a one for measuring.
"""

from __future__ import annotations

import hashlib
import json
import sys
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opsd.eval.evaluator import Suite
from opsd.types import Prompt
from opsd.utils.errors import UserError
from opsd.utils.seeding import derive_seed
from pocket.measure import accuracy, measure
from pocket.sft import STEPS, STUDENT, TEACHER, Recipe, build_model, train
from pocket.task import Problem, fresh_problems
from pocket.tokenizer import make_tokenizer

EVAL_PROBLEMS = 256
TRAIN_PROBLEMS = 4096
"""240 steps × 16 prompts take 3,840: no prompt comes twice."""
CHOICE_PROBLEMS = 256
"""What the student's checkpoint is chosen on; they serve nothing else."""
CHOICE_SAMPLES = 4
CHECKPOINT_EVERY = 100
SAMPLES = 16


def make_problems(seed: int) -> dict[str, list[Problem]]:
    """Problems to evaluate on, to train on and to choose the student on: all different, from streams of their own."""
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
    """A line for each problem, with the fields that `opsd train` reads."""
    return "".join(json.dumps({"prompt": problem.prompt, "answer": problem.answer}) + "\n" for problem in problems)


def as_prompts(problems: list[Problem], tokenizer: Any) -> list[Prompt]:
    """Problems as the trainer's sampler takes them."""
    return [Prompt(str(k), p.prompt, tokenizer(p.prompt).input_ids, p.answer) for k, p in enumerate(problems)]


def make_model(
    recipe: Recipe, tokenizer: Any, seed: int, problems: dict[str, list[Problem]]
) -> tuple[PreTrainedModel, int]:
    """The trained model and the step at which its training ended. None of `problems` is trained on."""
    model = build_model(recipe, tokenizer, seed)
    taken = {problem.prompt for chosen in problems.values() for problem in chosen}
    choice = Suite("choice", as_prompts(problems["choice"], tokenizer))
    text = TextColumn("{task.description} {task.fields[loss]}")
    step = 0
    with Progress(text, MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task(recipe.name, total=STEPS, loss="")
        for step, loss in enumerate(train(model, recipe, tokenizer, seed, taken), start=1):
            progress.update(bar, advance=1, loss=f"{loss:.3f} nats")
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
    tokenizer = make_tokenizer()
    models = {}
    for recipe in (TEACHER, STUDENT):
        model, step = make_model(recipe, tokenizer, seed, problems)
        model.save_pretrained(out / recipe.name)
        tokenizer.save_pretrained(out / recipe.name)
        models[recipe.name] = {"steps": step, **measure(model, tokenizer, out / "eval.jsonl", SAMPLES)}
    files = ["eval.jsonl", "train.jsonl", "teacher/model.safetensors", "student/model.safetensors"]
    made = {
        "command": f"python scripts/pocket/make.py --out {out} --seed {seed}",
        "seed": seed,
        "models": models,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sha256": {file: hashlib.sha256((out / file).read_bytes()).hexdigest() for file in files},
    }
    (out / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    return made


def main(out: Path, seed: int = 0) -> None:
    """Make the pocket problems and models; what was there under the same names is replaced.

    Args:
        out: Folder to write to.
        seed: Decides problems, weights and training data.
    """
    disable_progress_bar()
    try:
        made = make(out, seed)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); give another folder") from error
    print(json.dumps(made["models"], indent=1))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        print(f"make: {error}", file=sys.stderr)
        sys.exit(2)
