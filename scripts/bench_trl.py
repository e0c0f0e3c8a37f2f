"""Loss curves on the pocket pair: TRL alone, TRL with selection by each engine, opsd with and without selection.

    python scripts/bench_trl.py --out runs/bench_trl        about ten minutes on one core

The same pair, prompts, numbers of answers and learning rate; 64 answers per step, Soft-OR at 50 % over rollouts. The
three TRL runs start from one seed and write the same answers in the first step; opsd uses its own sampling seeds. Each
trains in its own process, one after the other, with one thread. curves.json holds, step by step, the loss in nats
per trained token and the share of tokens that was kept, and for each run its CPU seconds (start and imports included)
and its peak resident memory. For the time of a step at a real vocabulary see scripts/bench_step.py.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from opsd.utils.errors import UserError, exits_on_bad_input

POCKET = Path(__file__).parents[1] / "assets" / "pocket"
METHODS = ("trl", "trl-kernel", "trl-fused", "opsd", "opsd-tip")
SELECTION = {"retention": 0.5, "normalise_over": "rollout"}
ANSWERS, NEW_TOKENS, LR = 64, 40, 1e-3


@dataclass(frozen=True)
class Options:
    """What runs."""

    out: Path = Path("runs/bench_trl")
    """Folder for run folders, outputs and curves.json."""
    steps: int = 40
    """Steps of each trainer."""
    method: str = ""
    """One method, run in this process; empty: all, each in its own process."""


def main(options: Options) -> None:
    """Run the trainers. Raises UserError if one fails."""
    if options.method:
        run(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    curves = {}
    for method in METHODS:
        words = [sys.executable, __file__, "--method", method, "--steps", str(options.steps), "--out", str(options.out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        log = options.out / f"{method}.log"
        with log.open("wb") as output:
            if subprocess.run(words, stdout=output, stderr=output, env=environment).returncode:
                raise UserError(f"{method} failed; its output is in {log}")
        curves[method] = json.loads((options.out / f"{method}.json").read_text())
        print(f"{method}: {curves[method]['cpu_s']:.1f} processor s", file=sys.stderr, flush=True)
    (options.out / "curves.json").write_text(json.dumps({"steps": options.steps, "methods": curves}, indent=1) + "\n")


def run(options: Options) -> None:
    """Run one trainer, and write its file."""
    steps = run_trl(options) if options.method.startswith("trl") else run_opsd(options)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found = {"cpu_s": time.process_time(), "peak_mib": usage.ru_maxrss / 1024, **steps}
    (options.out / f"{options.method}.json").write_text(json.dumps(found) + "\n")


def run_trl(options: Options) -> dict[str, list[float]]:
    """TRL's DistillationTrainer: the losses that it logged, and the shares that were kept."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    trainer: Any = DistillationTrainer
    selection: dict[str, Any] = {}
    if engine := options.method.partition("-")[2]:
        from tip_patch.adapters.trl import tip

        trainer = tip(DistillationTrainer)
        selection = {"selector_options": SELECTION, "engine": engine, "telemetry_every": 0}
    config = DistillationConfig(
        output_dir=str(options.out / options.method),
        max_steps=options.steps,
        per_device_train_batch_size=ANSWERS // 4,
        gradient_accumulation_steps=4,
        max_completion_length=NEW_TOKENS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    )
    data = Dataset.from_list([json.loads(line) for line in (POCKET / "train.jsonl").read_text().splitlines()])
    made = trainer(str(POCKET / "student"), str(POCKET / "teacher"), config, train_dataset=data, **selection)
    made.train()
    lines = [line for line in made.state.log_history if "loss" in line]
    kept = [line.get("select/kept_frac", 1.0) for line in lines]
    return {"loss_nats": [line["loss"] for line in lines], "kept_frac": kept}


def run_opsd(options: Options) -> dict[str, list[float]]:
    """`opsd train`: the same of its metrics.jsonl."""
    from opsd.config import from_json
    from opsd.train import start

    folder = options.out / options.method
    values = {
        "student": str(POCKET / "student"),
        "teacher": {"model": str(POCKET / "teacher")},
        "prompts": str(POCKET / "train.jsonl"),
        "prompt_format": "raw",
        "out": str(folder),
        "steps": options.steps,
        "prompts_per_step": ANSWERS,
        "rollout": {"samples_per_prompt": 1, "max_prompt_tokens": 16, "max_new_tokens": NEW_TOKENS},
        "select": {"by": "soft_or" if options.method.endswith("-tip") else "all", **SELECTION},
        "optim": {"lr": LR, "schedule": "constant"},
        "engine": {"device": "cpu"},
        "checkpoint": {"every": 0},
        "telemetry": {"every": 0, "save_rollouts_every": 0},
        "track": {"progress": False},
    }
    start(from_json(values))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["step"]]
    return {name: [line[key] for line in lines] for name, key in KEYS.items()}


KEYS = {"loss_nats": "loss/nats", "kept_frac": "select/kept_frac"}

if __name__ == "__main__":
    with exits_on_bad_input("bench_trl"):
        main(tyro.cli(Options, description=__doc__))
