#!/usr/bin/env python
"""Makes the two pocket planners from a seed, and measures how well they plan.

    python scripts/pocket/travel_make.py --out assets/pocket_planning

On two free CPU cores: about four minutes for the teacher, ten seconds for the student (the teacher at step 1,000,
trained on with planted habits), half a minute for measuring.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opsd.config import EvalConfig
from opsd.environments.travel import TravelEnv, pocket_tasks
from opsd.environments.travel.evaluate import TravelEvaluator
from opsd.environments.travel.talk import Talk
from opsd.eval.evaluator import Suite
from opsd.rollout.cached_agent import CachedAgentRollout
from opsd.utils.errors import UserError
from pocket.travel_sft import STUDENT, STUDENT_FROM_STEP, TEACHER, Recipe, build_model, make_tokenizer, train

TASKS, SAMPLES = 64, 16
MAX_TURNS, MAX_NEW_TOKENS = 8, 120
"""What the recipe gives an episode: a clean one has 5 turns and 62 tokens."""


def train_models(out: Path, seed: int) -> None:
    """Write the folders teacher and student."""
    tokenizer = make_tokenizer()
    teacher = build_model(tokenizer, seed)
    student: Qwen3ForCausalLM | None = None
    for step in _shown(teacher, TEACHER, tokenizer, seed):
        if step == STUDENT_FROM_STEP:
            student = copy.deepcopy(teacher)
    assert student is not None
    for _ in _shown(student, STUDENT, tokenizer, seed):
        pass
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)


def _shown(model: Qwen3ForCausalLM, recipe: Recipe, tokenizer: Any, seed: int) -> Any:
    """Train with a progress bar; yields each step's number once it is done."""
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(recipe.name, total=recipe.stop, loss="")
        for step, loss in enumerate(train(model, recipe, tokenizer, seed), start=1):
            progress.update(task, advance=1, loss=f"{loss:.3f} nats")
            yield step


def measure(folder: Path, seed: int) -> dict[str, Any]:
    """Avg@16 and Best@16 with standard errors, and the share of each constraint, on tasks of their own."""
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=False).eval()
    tokenizer = make_tokenizer()
    talk = Talk(TravelEnv(), tokenizer, thinking=False, tool_output_characters=0)
    suite = Suite("choice", [*map(talk.prompt, pocket_tasks(TASKS, seed, "choice"))])
    config = EvalConfig(samples=SAMPLES)
    engine = CachedAgentRollout(model, tokenizer, talk, MAX_TURNS, config.generate_batch)
    found = TravelEvaluator([suite], config, MAX_NEW_TOKENS, talk).run(engine, folder.name, None)["suites"]["choice"]
    names = {
        "mean@k": f"avg@{SAMPLES}",
        "stderr_problems": "stderr",
        "best@k": f"best@{SAMPLES}",
        "stderr_best": "stderr_best",
    }
    shares = {key: round(entry["mean"], 4) for key, entry in found["constraints"].items()}
    return {**{ours: found[key] for key, ours in names.items()}, "constraints": shares}


def record(out: Path, seed: int) -> dict[str, Any]:
    """Measure both models and write made.json: seed, scores (fractions), versions, checksums."""
    files = [f"{name}/model.safetensors" for name in ("teacher", "student")]
    made = {
        "command": f"python scripts/pocket/travel_make.py --out {out} --seed {seed}",
        "seed": seed,
        "scores": {name: measure(out / name, seed) for name in ("teacher", "student")},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sha256": {file: hashlib.sha256((out / file).read_bytes()).hexdigest() for file in files},
    }
    (out / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    return made


def main(out: Path, seed: int = 0) -> None:
    """Make the pocket planners; what was there under the same names is replaced.

    Args:
        out: Folder to write to.
        seed: Decides weights and training data.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        train_models(out, seed)
        made = record(out, seed)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); give another folder") from error
    print(json.dumps(made["scores"], indent=1))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        print(f"planning_make: {error}", file=sys.stderr)
        sys.exit(2)
