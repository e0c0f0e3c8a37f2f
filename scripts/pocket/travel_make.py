#!/usr/bin/env python
"""Makes the two pocket planners from a seed, and measures how well they plan.

    python scripts/pocket/travel_make.py --out assets/pocket_planning

On two free CPU cores: about four minutes for the teacher, ten seconds for the student (the teacher at step 1,000,
trained on with planted habits), half a minute for measuring.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from opsd.config import EvalConfig
from opsd.environments.travel import TravelEnv, pocket_tasks
from opsd.environments.travel.evaluate import TravelEvaluator
from opsd.environments.travel.talk import Talk
from opsd.eval.evaluator import Suite
from opsd.rollout import HFRollout
from opsd.rollout.cached_agent import CachedAgentRollout
from opsd.run.disk import writing
from opsd.utils.errors import UserError, exits_on_bad_input
from pocket.sft import (
    TRIPS_STUDENT,
    TRIPS_STUDENT_FROM_STEP,
    TRIPS_TEACHER,
    train_shown,
    trips_batches,
    trips_model,
    write_made,
)
from pocket.tokenizer import trips_tokenizer

TASKS, SAMPLES = 64, 16
MAX_TURNS, MAX_NEW_TOKENS = 8, 120
"""Limits of an episode in the recipe; a clean one has 5 turns and 62 tokens."""


def train_models(out: Path, seed: int) -> None:
    """Write the folders teacher and student."""
    tokenizer = trips_tokenizer()
    teacher = trips_model(tokenizer, seed)
    student: Qwen3ForCausalLM | None = None
    for step in train_shown(teacher, trips_batches(TRIPS_TEACHER, tokenizer, seed), TRIPS_TEACHER):
        if step == TRIPS_STUDENT_FROM_STEP:
            student = copy.deepcopy(teacher)
    assert student is not None
    for _ in train_shown(student, trips_batches(TRIPS_STUDENT, tokenizer, seed), TRIPS_STUDENT):
        pass
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)


def measure(folder: Path, seed: int) -> dict[str, Any]:
    """Avg@16 and Best@16 with standard errors, and the share of each constraint, on tasks used for nothing else."""
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=False).eval()
    tokenizer = trips_tokenizer()
    talk = Talk(TravelEnv(), tokenizer, thinking=False, tool_output_characters=0)
    suite = Suite("choice", [*map(talk.prompt, pocket_tasks(TASKS, seed, "choice"))])
    config = EvalConfig(samples=SAMPLES)
    engine = CachedAgentRollout(HFRollout(model, tokenizer, config.generate_batch), talk, MAX_TURNS)
    found = TravelEvaluator([suite], config, MAX_NEW_TOKENS, talk).run(engine, folder.name, None)["suites"]["choice"]
    names = {
        "mean@k": f"avg@{SAMPLES}",
        "stderr_problems": "stderr",
        "best@k": f"best@{SAMPLES}",
        "stderr_best": "stderr_best",
    }
    shares = {key: round(entry["mean"], 4) for key, entry in found["constraints"].items()}
    return {**{ours: found[key] for key, ours in names.items()}, "constraints": shares}


def main(out: Path, seed: int = 0) -> None:
    """Make the pocket planners; existing files of the same names are replaced.

    Args:
        out: Folder to write to.
        seed: Decides weights and training data.
    """
    with writing(f"--out {out}", "give another folder", UserError):
        out.mkdir(parents=True, exist_ok=True)
        train_models(out, seed)
        scores = {name: measure(out / name, seed) for name in ("teacher", "student")}
        files = [f"{name}/model.safetensors" for name in scores]
        made = write_made(out, "travel_make.py", seed, files, scores=scores)
    print(json.dumps(made["scores"], indent=1))


if __name__ == "__main__":
    with exits_on_bad_input("travel_make"):
        tyro.cli(main)
