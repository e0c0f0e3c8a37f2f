#!/usr/bin/env python
"""The memory rows of the paper's Tables 3 and 4: peak of a training process for each retention, `whole` and `fused`.

    python scripts/memory_rows.py --student STUDENT --teacher TEACHER --prompts FILE --out runs/memory FLAGS…

Every cell is its own process, `opsd train` for two steps (the optimiser's state exists from the second step on); its
peak is `mem/peak_gib`: the whole process on a CPU, memory allocated since loading on a GPU. On a CPU the C library is
told to return large blocks when they are freed, so that a peak is memory in use. Unknown FLAGS are passed to every
`opsd train`. Writes memory.json and memory.md; a cell that has finished is not run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from opsd.utils.errors import UserError, exits_on_bad_input
from reporting.cells import CellName
from reporting.paper import MEMORY, PAIRS, Paper
from reporting.tables import TextTable

TABLES = ("table3", "table4")
MODES = ("whole", "fused")
STEPS = 2
PROMPT_TOKENS = 512
# glibc's own threshold grows with freed blocks, up to 32 MiB; smaller freed blocks stay with the process.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


@dataclass(frozen=True)
class Args:
    """Models, prompts, and how much the student writes."""

    out: Path
    """Folder for the run folders and the two files."""
    student: str
    teacher: str
    prompts: str
    prompts_per_step: int = 4
    """Prompts, with one rollout each."""
    max_new_tokens: int = 1024
    """Longest rollout, in tokens. A step is one micro-batch: the memory of `whole` grows with its tokens."""


def cells() -> list[CellName]:
    """The cells whose memory the paper states, in its order."""
    return list(dict.fromkeys(cell for table in TABLES for cell in Paper.read(table).cells))


def command(args: Args, cell: CellName, mode: str, run: Path, further: list[str]) -> list[str]:
    """One cell's `opsd train`."""
    longest = args.prompts_per_step * (args.max_new_tokens + PROMPT_TOKENS)
    select = ["--select.by", cell.selector, "--select.retention", str(cell.retention)]
    return [
        sys.executable, "-m", "opsd", "train", "--student", args.student, "--teacher", args.teacher,
        "--prompts", args.prompts, "--out", str(run), "--steps", str(STEPS),
        "--prompts_per_step", str(args.prompts_per_step), "--rollout.samples_per_prompt", "1",
        "--rollout.max_prompt_tokens", str(PROMPT_TOKENS), "--rollout.overlong_prompts", "drop",
        "--rollout.max_new_tokens", str(args.max_new_tokens), "--engine.micro_batch_tokens", str(longest),
        "--engine.gradient_checkpointing", "True", "--checkpoint.keep", "1", "--telemetry.every", "0",
        "--loss.memory", mode, *select, *further,
    ]  # fmt: skip


def measure(args: Args, cell: CellName, mode: str, further: list[str]) -> dict[str, object]:
    """Run a cell, unless it has finished. peak_gib: the run's largest; tokens: of the larger of the two steps."""
    run = args.out / f"{cell.selector}-{100 * cell.retention:g}-{mode}"
    if not (run / "DONE").exists():
        resumed = [sys.executable, "-m", "opsd", "train", "--resume", str(run)]
        done = subprocess.run(
            resumed if (run / "config.json").exists() else command(args, cell, mode, run, further),
            check=False,
            env={**os.environ, **GIVEN_BACK},
        )
        if done.returncode:
            raise UserError(f"{run} ended with exit code {done.returncode}; its message is above")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "selector": cell.selector,
        "retention": cell.retention,
        "memory": mode,
        "peak_gib": max(line["mem/peak_gib"] for line in lines),
        "tokens": max(line["rollout/tokens"] for line in lines),
    }


def table(rows: list[dict[str, object]]) -> TextTable:
    """Our peaks per retention, also as a fraction of the run on all tokens, next to the paper's."""
    papers = [Paper.read(name) for name in TABLES]
    peaks = {(row["selector"], row["retention"], row["memory"]): float(str(row["peak_gib"])) for row in rows}
    lines = []
    for cell in cells():
        ours = []
        for mode in MODES:
            peak, full = peaks[cell.selector, cell.retention, mode], peaks["all", 1.0, mode]
            ours += [f"{peak:.2f}", f"{100 * peak / full:.0f} %"]
        theirs = []
        for pair in papers[0].pairs:
            paper = next(one for one in papers if cell in one.cells)
            found, full = paper.number(pair, MEMORY, cell), paper.number(pair, MEMORY, paper.baseline)
            assert found is not None and full is not None
            theirs += [f"{found[0]:g}", f"{100 * found[0] / full[0]:.0f} %"]
        lines.append([str(cell), *ours, *theirs])
    heads = [head for mode in MODES for head in (f"{mode}\nGiB", "of\nall")]
    heads += [head for pair in papers[0].pairs for head in (f"paper, GB\n{PAIRS[pair]}", "of\nall")]
    return TextTable("Peak memory of the training process", ["", *heads], lines)


def main(args: Args, further: list[str]) -> None:
    """All cells in both modes, then the table and the files."""
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for mode in MODES:
        for cell in cells():
            rows.append(measure(args, cell, mode, further))
    values = {
        "vocabulary": json.loads((Path(args.student) / "config.json").read_text())["vocab_size"],
        "steps": STEPS,
        "rows": rows,
    }
    (args.out / "memory.json").write_text(json.dumps(values, indent=1) + "\n")
    found = table(rows)
    (args.out / "memory.md").write_text(found.markdown())
    found.show()


if __name__ == "__main__":
    with exits_on_bad_input("memory_rows"):
        main(*tyro.cli(Args, description=__doc__, return_unknown_args=True))
