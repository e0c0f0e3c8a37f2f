#!/usr/bin/env python
"""A pocket student that can use an answer shown before its prompt, and makes the old errors without one.

    python scripts/pocket/reader.py --out runs/reader

The committed student was never shown an answer and cannot use one. Here it is trained further: half on solutions with
its planted errors to plain prompts, half on right ones to `A24;83+3*8+16+91=`, the prompt that the context
recipes/contexts/pocket/answer.txt makes. It is then what on-policy self-distillation starts from at scale: a model that
solves more problems if it sees the answer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opsd.data.prompts import read_records
from opsd.utils.errors import exits_on_bad_input
from opsd.utils.seeding import derive_seed
from pocket.sft import BATCH, NO_LOSS, Batch, SumsRecipe, sums_batch, train_shown
from pocket.task import Written, exact, fresh_problems, student_hand

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "pocket"
READER = SumsRecipe("reader", steps=1200, stop=1200, peak_lr=1e-3, hand=student_hand)


def right_hand(rng: Random, op: str, left: int, right: int) -> Written:
    """A hand that is always right."""
    return Written(exact(left, op, right))


def batches(tokenizer: Any, seed: int, taken: set[str]) -> Iterator[Batch]:
    """In turn a plain batch with the student's errors and a right one with answers in front; no prompt of `taken`."""
    rngs = [Random(derive_seed(seed, READER.name, part)) for part in ("problems", "hand")]
    problems = fresh_problems(rngs[0], taken)
    while True:
        yield sums_batch(list(islice(problems, BATCH)), student_hand, rngs[1], tokenizer)
        chosen = list(islice(problems, BATCH))
        ids_BL, labels_BL, _ = sums_batch(chosen, right_hand, rngs[1], tokenizer)
        shown_BL = torch.tensor(tokenizer([f"{problem.answer};" for problem in chosen]).input_ids)
        yield torch.cat([shown_BL, ids_BL], 1), torch.cat([torch.full_like(shown_BL, NO_LOSS), labels_BL], 1), None


def main(out: Path, seed: int = 0) -> None:
    """Make the model folder `out`.

    Args:
        out: Folder to write to.
        seed: Decides the training data.
    """
    disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(ASSETS / "student", trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(ASSETS / "student", trust_remote_code=False, use_safetensors=True)
    taken = {record["prompt"] for name in ("eval", "train") for record in read_records(ASSETS / f"{name}.jsonl")}
    for _ in train_shown(model, batches(tokenizer, seed, taken), READER):
        pass
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    with exits_on_bad_input("reader"):
        tyro.cli(main)
