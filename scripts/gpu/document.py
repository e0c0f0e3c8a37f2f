"""docs/gpu.md from the rows of all stages: the targets, what failed, and a table per stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gpu.check import Row

HOW = """`make gpu-check` runs all of this on a machine with one NVIDIA GPU, in at most eight minutes and without a
network, and writes this page and gpu.json. Each stage is a separate process with its own time limit; failures are
reported here, and the next stage runs. `python scripts/gpu_check.py --help` lists the options;
`--device cpu --small` is a dry run, which `make test` includes.

Without a package index, a checkout and a folder of wheels are enough. Besides PyTorch and transformers it needs
tyro with docstring-parser and typeguard, psutil, safetensors, filelock, xxhash; for the ZeRO
runs deepspeed (a wheel built with `DS_BUILD_OPS=0`) with hjson, pydantic and py-cpuinfo; as baselines liger-kernel, and
trl with datasets and accelerate; pytest. A stage that lacks a package says which.

```
python3 -m pip install --no-index --no-deps --target site wheels/*.whl
PYTHONPATH=site python3 scripts/gpu_check.py --docs docs
```

| stage | what it shows |
|:--|:--|
| environment | versions; the card's copy bandwidth and its rate of square matrix products |
| products | the loss's products agree with fp64; their rate, also for Qwen3's 151,669 tokens (odd); kernels |
| exact | loss, gradients and statistics against fp64 at the full vocabulary, fused, whole; selection, scales, caps |
| losses | time and memory at 16,384 tokens, hidden sizes 2,560 and 4,096, compared with TRL's and Liger's functions |
| attention | packed rollouts do not see each other; the cost of attention by lengths and by a mask |
| update | updates of a random Qwen3-4B (1.7B on a smaller card) by an 8B: time, and peak memory against `opsd plan` |
| training | `opsd train` of the pocket pair: fp32 against a CPU, repeated, bf16, all ZeRO stages (NCCL), one process |
| own_tests | the tests marked `gpu` |

Not included, for lack of memory or of a second card: vLLM and its sleep mode, flash-attn, several ranks, paper scale.
"""
NOT_RUN = "**This has not been run.** No number of this project comes from a GPU.\n\n"
# Left out of the table of a stage: the same in every row, or too long.
LEFT_OUT = {"stage", "seed", "kernels"}
NOTES = ("failed", "missing")


def document(rows: list[Row]) -> str:
    """The page in Markdown; without rows it says that nothing was run."""
    if not rows:
        return f"# On a GPU\n\n{NOT_RUN}{HOW}"
    parts = ["# On a GPU", card(rows), aims(rows)]
    if failed := [row for row in rows if "failed" in row]:
        parts.append(
            "**Failed:**\n\n" + "\n".join(f"- {row['stage']}, {row['what']}: {row['failed']}" for row in failed)
        )
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        parts += [f"## {stage}", table(own), *kernels(own)]
    return "\n\n".join([*parts, "## How", HOW])


def card(rows: list[Row]) -> str:
    """The hardware and versions that the numbers come from."""
    found = next((row for row in rows if row["what"] == "card"), None)
    if found is None:
        return "A dry run on a CPU: the numbers are meaningless."
    versions = next((row for row in rows if row["what"] == "versions"), {})
    return f"{found['name']}, {found['gib']:.0f} GiB, CUDA {found['cuda']}, PyTorch {versions.get('torch', '?')}."


def aims(rows: list[Row]) -> str:
    """The targets for an H100, and the measurements."""
    lines = ["| target | measured |", "|:--|--:|"]
    lines += [f"| {aim} | {_shown(found(rows))} |" for aim, found in AIMS.items()]
    return "\n".join(lines)


def _loss(rows: list[Row], key: str, **wanted: Any) -> float | None:
    """A value of the first loss row that matches `wanted`; by default our loss, reverse KL, on all tokens."""
    tokens = max((row["tokens"] for row in rows if row["what"] == "loss"), default=0)
    wanted = {
        "what": "loss",
        "method": "ours",
        "selector": "all",
        "divergence": "reverse_kl",
        "tokens": tokens,
    } | wanted
    return next((row[key] for row in rows if key in row and wanted.items() <= row.items()), None)


def _layer(rows: list[Row], how: str) -> float | None:
    wanted = {"what": "one layer", "told_apart_by": how}
    return next((row["both_ms"] for row in rows if "both_ms" in row and wanted.items() <= row.items()), None)


def _ratio(value: float | None, of: float | None) -> float | None:
    return None if value is None or of is None else value / of


AIMS: dict[str, Callable[[list[Row]], float | None]] = {
    "loss of 16,384 tokens: at most 95 ms": lambda rows: _loss(rows, "ms"),
    "loss of 8,192 tokens: at most 55 ms": lambda rows: _loss(rows, "ms", tokens=8192),
    "of TRL's time: at most 0.65": lambda rows: _ratio(_loss(rows, "ms"), _loss(rows, "ms", method="trl")),
    "of Liger's time (Triton): at most 0.65": lambda rows: _ratio(
        _loss(rows, "ms"), _loss(rows, "ms", method="liger_triton")
    ),
    "memory above inputs and gradients: at most 3 GiB": lambda rows: _loss(rows, "peak_gib"),
    "Soft-OR at 50 %, of all tokens' time: at most 1": lambda rows: _ratio(
        _loss(rows, "ms", selector="soft_or", retention=0.5), _loss(rows, "ms")
    ),
    "attention by lengths, of the mask's time: at most 0.1": lambda rows: _ratio(
        _layer(rows, "lengths"), _layer(rows, "a mask")
    ),
}


def table(rows: list[Row]) -> str:
    """One stage's rows; a column for each field that any of them has."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if name not in LEFT_OUT and name not in NOTES]
    lines = ["| " + " | ".join([*(name.replace("_", " ") for name in columns), "note"]) + " |"]
    lines.append("|" + ":--|" * (len(columns) + 1))
    for row in rows:
        note = next((f"{name}: {row[name]}" for name in NOTES if name in row), "")
        lines.append("| " + " | ".join([*(_shown(row.get(name)) for name in columns), note.replace("|", "/")]) + " |")
    return "\n".join(lines)


def kernels(rows: Iterable[Row]) -> list[str]:
    """The slowest CUDA kernels, a paragraph per row that has them."""
    found = []
    for row in rows:
        if row.get("kernels"):
            about = ", ".join(
                _shown(value) for name, value in row.items() if name in ("what", "vocab", "chunk", "width")
            )
            found.append(
                f"Kernels, {about}: " + "; ".join(f"`{k}` {_shown(ms)} ms" for k, ms in row["kernels"].items())
            )
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(of)}" for name, of in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return str(value)
