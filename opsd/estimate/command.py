"""`opsd plan`: whether a run fits its GPUs, what decides, and roughly how long a step takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro import MISSING
from tyro.conf import arg

from opsd.config import TeacherConfig, TrainConfig
from opsd.config.settings import PositiveFloat, PositiveInt, Settings
from opsd.estimate.memory import Hardware, MemoryEstimate
from opsd.estimate.shapes import find_shape
from opsd.utils.errors import UserError, first_line

# What takes less of a part, of the phase's largest ones.
KNOBS = {
    "activations": "--engine.gradient_checkpointing True or a smaller --engine.micro_batch_tokens",
    "attention masks": "--engine.dtype bfloat16 on CUDA, or a smaller --engine.micro_batch_tokens",
    "one layer's backward": "a smaller --engine.micro_batch_tokens",
    "autocast's copies": "--engine.kind deepspeed with --engine.zero_stage 1 or more",
    "loss stage": "--loss.memory fused and a smaller --loss.chunk_tokens",
    "student weights": "--engine.kind deepspeed with --engine.zero_stage 3 over more --gpus",
    "gradients": "--engine.kind deepspeed with --engine.zero_stage 2 or 3 over more --gpus",
    "optimiser": "--engine.offload_optimizer True, or a higher --engine.zero_stage over more --gpus",
    "one update's copies": "--engine.offload_optimizer True",
    "teacher weights": "--teacher.offload True, --teacher.shard True or --teacher.kind vllm",
    "teacher's states": "--teacher.cache host",
    "teacher's layer": "a smaller --engine.micro_batch_tokens",
    "sampler (vLLM's share)": "a smaller --rollout.gpu_memory_share",
    "sampler (key-value cache)": "a smaller --rollout.generate_batch",
    "evaluation's key-value cache": "a smaller --eval.generate_batch",
    "sampler (whole weights)": "--rollout.engine vllm",
}


# A plan needs two models, no prompts and no run folder.
_ANY_RUN = TrainConfig(student=MISSING, teacher=TeacherConfig(model=MISSING), prompts="", out="")


@dataclass(frozen=True)
class PlanConfig(Settings):
    """Estimate a training run's memory and time; takes the flags of `opsd train` and these. Loads no weights."""

    run: Annotated[TrainConfig, arg(name="")] = _ANY_RUN
    gpus: PositiveInt = 1
    """Ranks, one a GPU."""
    gpu_gib: PositiveFloat = 131.3
    """Memory of a GPU in GiB; an H200's 141 GB are 131.3."""
    tflops: PositiveFloat = 989.0
    """Dense bf16 TFLOP/s of a GPU (H200's data sheet); 0.4 of it are assumed to be reached."""
    bandwidth_gbs: PositiveFloat = 4800.0
    """Memory bandwidth of a GPU in GB/s (H200's data sheet); 0.6 of it are assumed to be reached."""
    attention: Literal["sdpa", "flash"] = "flash"
    """flash: of variable length, which the trainer takes on CUDA under bfloat16. sdpa: GPUs before Ampere, or a model
    that torch's kernel does not fit."""
    brief: bool = False
    """Print the phases' sums and the verdict alone."""
    json: bool = False
    """Print one JSON object."""

    def check(self) -> None:
        if self.gpus > 1 and self.run.engine.kind == "torch":
            raise UserError(f"--gpus {self.gpus} needs --engine.kind deepspeed: the torch engine is one process")


def plan(config: PlanConfig) -> bool:
    """Print the plan; whether it fits. Raises UserError for settings that cannot be."""
    found = planned(config)
    if config.json:
        print(json.dumps(found))
    else:
        if not config.brief:
            _show(found)
        print(in_short(found))
    return found["fits"]


def planned(config: PlanConfig) -> dict[str, Any]:
    """The plan as JSON values: GiB by phase and part, rough seconds, the verdict. Raises UserError as `plan`."""
    run = config.run
    kind = "cpu" if run.engine.device == "cpu" else "cuda"
    flash = config.attention == "flash" and run.engine.dtype == "bfloat16" and kind == "cuda"
    hardware = Hardware(
        config.gpus, config.gpu_gib, 0.4 * config.tflops, 0.6 * config.bandwidth_gbs, flash=flash, kind=kind
    )
    adapters = _adapters(run)
    (teacher, *others) = run.teacher_paths().values()
    if others:
        raise UserError("a plan knows one teacher: give the largest of --teachers as --teacher")
    try:
        shapes = find_shape(run.student, "--student"), find_shape(teacher, "--teacher")
    except UserError as error:
        raise UserError("; ".join([str(error), *adapters])) from error
    estimate = MemoryEstimate(run, *shapes, hardware)
    phases = estimate.phases()
    totals = {phase: sum(parts.values()) for phase, parts in phases.items()}
    peak = max(totals, key=lambda phase: totals[phase])
    # The process itself has no knob.
    decides = max((part for part in phases[peak] if part in KNOBS), key=lambda part: phases[peak][part])
    return {
        "student": shapes[0].name,
        "teacher": shapes[1].name,
        "gpus": config.gpus,
        "gpu_gib": config.gpu_gib,
        "phases_gib": phases,
        "peak_gib": totals[peak],
        "peak_phase": peak,
        "decides": decides,
        "knob": KNOBS[decides],
        "fits": totals[peak] <= config.gpu_gib,
        "tokens_per_step": estimate.step_tokens,
        "micro_batch_tokens": estimate.micro_tokens,
        "rough_seconds": estimate.seconds(),
        "adapters": adapters,
    }


def _adapters(config: TrainConfig) -> list[str]:
    """How much of a student's folder adapters lie on, in a line; none without adapters, or without a folder."""
    if not config.lora.rank or not (Path(config.student) / "config.json").is_file():
        return []
    from opsd.model.loading import check_folder
    from opsd.model.lora import coverage_of

    check_folder(config.student, "--student", config.trust_remote_code)
    try:
        return [coverage_of(config.student, config.lora, config.trust_remote_code)]
    except UserError:
        raise
    except Exception as error:  # whatever a damaged configuration makes transformers raise
        raise UserError(
            f"--student {config.student}: its configuration cannot be read ({first_line(error)})"
        ) from error


def _show(found: dict[str, Any]) -> None:
    console, phases = Console(width=110), found["phases_gib"]
    # As Text: a bracket in a folder's name is a bracket.
    title = Text(f"{found['student']} ← {found['teacher']}, {found['gpus']} GPUs")
    table = Table("GiB per GPU", *phases, title=title)
    parts = list(dict.fromkeys(part for of_phase in phases.values() for part in of_phase))
    for part in parts:
        cells = (f"{phases[phase][part]:.2f}" if part in phases[phase] else "" for phase in phases)
        table.add_row(part, *cells)
    table.add_section()
    table.add_row("sum", *(f"{sum(of_phase.values()):.2f}" for of_phase in phases.values()))
    console.print(table)


def in_short(found: dict[str, Any]) -> str:
    """Three lines: the phases' sums, tokens and rough times, and whether it fits, what decides and what helps.

    Before the last one, with adapters on a student's folder, how much of it they lie on.
    """
    sums = ", ".join(f"{phase} {sum(parts.values()):.1f}" for phase, parts in found["phases_gib"].items())
    seconds = ", ".join(f"{phase} {value:.3g} s" for phase, value in found["rough_seconds"].items())
    fits = "fits" if found["fits"] else "does not fit"
    adapters = "".join(f"{line}\n" for line in found["adapters"])
    knob = f"; with {found['knob']} it takes less" if not found["fits"] else ""
    return (
        f"GiB per GPU: {sums}\n"
        f"at most {found['tokens_per_step']:,} tokens per step; very roughly {seconds}\n"
        f"{adapters}"
        f"{fits}: peak {found['peak_gib']:.1f} of {found['gpu_gib']:.1f} GiB, in the {found['peak_phase']} phase; "
        f"{found['decides']} decides{knob}"
    )
