"""Time and memory of the distillation loss, against the usual ways to write it.

    python scripts/bench_loss.py                     all cases, estimated at an hour on two quiet cores
    python scripts/bench_loss.py --quick             a few small ones, two minutes
    python scripts/bench_loss.py --tokens 1024 --widths 1024 --dtypes bfloat16

Each case runs in its own process and measures its first call; on CUDA the median of three after a warm-up call. Writes
into --out: cases.jsonl (a line per case, written when it ends; cases that it already holds are not run again), table.md
and figure.png. Ratios hold within one run.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import tyro

from bench.case import Case
from bench.report import draw, table

# What a kept graph holds per token and vocabulary entry: about 3.5 fp32 values, as measured.
GRAPH_BYTES = 14.2
RETENTIONS = (0.5, 0.2, 0.1)


@dataclass(frozen=True)
class Options:
    """Which cases run. Token counts and widths (hidden sizes) each cross with the methods."""

    out: Path = Path("runs/bench")
    tokens: tuple[int, ...] = (1024, 2048, 4096, 8192)
    widths: tuple[int, ...] = (256, 1024)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    methods: tuple[str, ...] = ("ours", "graph_kept", "recomputed", "liger", "liger_triton", "trl")
    """Methods that are not installed, or not available on this device, are left out and the reason is reported."""
    selected_tokens: int = 2048
    """Token counts of the cases that train on a part of the tokens."""
    vocab: int = 151_936
    chunk: int = 256
    """Tokens; Liger's Triton kernels and TRL choose their own."""
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)
    repeats: int = 1
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    teacher_width: int | None = None
    """The teacher's hidden size; None: the student's."""
    quick: bool = False
    """512 and 1024 tokens at width 256 in fp32 only."""


def main() -> None:
    """Run what is missing, then write table and figure from all that is there."""
    options = tyro.cli(Options, description=__doc__)
    if options.quick:
        options = dataclasses.replace(
            options, tokens=(512, 1024), widths=(256,), dtypes=("float32",), selected_tokens=1024
        )
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "cases.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    wanted = list(dict.fromkeys(plan(options)))
    for repeat in range(options.repeats):
        for case in wanted:
            if sum(matches(row, case) for row in rows) > repeat:
                continue
            row = run(case)
            rows.append(row)
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            print(describe(row), flush=True)
    rows = [row for row in rows if row.get("device", "cpu") == options.device]
    text = table(rows)
    (options.out / "table.md").write_text(text)
    draw(rows, options.out / "figure.png")
    print(text)


def plan(options: Options) -> Iterator[Case]:
    """All cases; those to be compared run one after the other."""
    for dtype in options.dtypes:
        for width in options.widths:

            def case(method: str, tokens: int, dtype: str = dtype, width: int = width, **more: Any) -> Case:
                names = ("vocab", "chunk", "threads", "device", "teacher_width")
                shape = {name: getattr(options, name) for name in names}
                return Case(method, tokens, width, dtype, **shape, **more)

            yield case("rate", 1)
            for tokens in sorted(options.tokens):
                for method in options.methods:
                    if method != "graph_kept" or fits(tokens, options):
                        yield case(method, tokens)
            for retention in RETENTIONS:
                for selector in ("soft_or", "entropy"):
                    yield case("ours", options.selected_tokens, selector=selector, retention=retention)


def fits(tokens: int, options: Options) -> bool:
    """Whether a kept graph of this many tokens leaves a third of the free memory unused."""
    free = torch.cuda.mem_get_info()[0] if options.device == "cuda" else psutil.virtual_memory().available
    return GRAPH_BYTES * tokens * options.vocab < 0.67 * free


def matches(row: dict[str, Any], case: Case) -> bool:
    """Whether a row belongs to the case; rows of earlier versions may lack fields that were constant then."""
    return Case(**{field.name: row[field.name] for field in dataclasses.fields(Case) if field.name in row}) == case


def run(case: Case) -> dict[str, Any]:
    """Measure the case in its own process; if it fails, it is recorded as missing, with the last line of its output."""
    command = [sys.executable, "-m", "bench.case", json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no output"]
    if done.returncode == 0:
        return json.loads(lines[-1])
    reason = "killed, out of memory?" if done.returncode == -9 else lines[-1]
    return {**dataclasses.asdict(case), "gflop": case.flop / 1e9, "missing": reason}


def describe(row: dict[str, Any]) -> str:
    """A case in one line, for the console."""
    kept = f"{row['selector']} {row['retention']:g}" if row["selector"] != "all" else "all"
    name = f"{row['method']:11} {row['dtype']:9} d {row['width']:5} N {row['tokens']:5} {kept:13}"
    if "missing" in row:
        return f"{name} - ({row['missing']})"
    if row["method"] == "rate":
        return f"{name} mm {row['mm_gflops']:.0f} GFLOP/s, best {row['best_gflops']:.0f}"
    return f"{name} {row['seconds']:7.2f} s {row['cpu_seconds']:7.2f} CPU s {row['peak_gib']:6.2f} GiB"


if __name__ == "__main__":
    main()
