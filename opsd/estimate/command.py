"""`opsd plan`: whether a run fits its GPUs, what uses the most memory, and roughly how long a step takes."""

from __future__ import annotations

import dataclasses
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
from opsd.estimate.hardware import SHEET_SHARE, SHEETS, Hardware, sheet_hardware, this_hardware
from opsd.estimate.memory import MemoryEstimate
from opsd.estimate.shapes import ModelShape, find_shape
from opsd.utils.durations import in_words
from opsd.utils.errors import UserError, said

# How to reduce each part that can be the largest of a phase.
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
    """Estimate a training run's memory and time. Takes the flags of `opsd train` and those below. Loads no weights."""

    run: Annotated[TrainConfig, arg(name="")] = _ANY_RUN
    gpus: PositiveInt = 1
    """Ranks, one per GPU."""
    hardware: Literal["this", "cpu", "h200", "h100", "a100", "a100-40", "b200", "l40s", "rtx4090"] = "this"
    """What each rank runs on. this: this machine's GPU, or its CPU if it has none; cpu: its CPU. Their rates are
    measured, in about half a second. A GPU's name: as in its data sheet."""
    gpu_gib: PositiveFloat | None = None
    """Memory per rank in GiB; overrides the hardware's."""
    tflops: PositiveFloat | None = None
    """Dense bf16 TFLOP/s of a GPU; overrides the data sheet. A step is assumed to reach 0.4 of it."""
    bandwidth_gbs: PositiveFloat | None = None
    """Memory bandwidth of a GPU in GB/s; overrides the data sheet. A step is assumed to reach 0.6 of it."""
    attention: Literal["sdpa", "flash"] = "flash"
    """flash: variable-length attention, which the trainer uses on CUDA with bfloat16. sdpa: for GPUs before Ampere, or
    a model that torch's kernel does not support."""
    brief: bool = False
    """Print only the phases' sums and the verdict."""
    json: bool = False
    """Print one JSON object."""

    def check(self) -> None:
        if self.gpus > 1 and self.run.engine.kind == "torch":
            raise UserError(f"--gpus {self.gpus} needs --engine.kind deepspeed: the torch engine is one process")
        if self.hardware in SHEETS and self.run.engine.device == "cpu":
            raise UserError(f"--hardware {self.hardware} and --engine.device cpu: give one of them")


def plan(config: PlanConfig) -> bool:
    """Print the plan; returns whether the run fits. Raises UserError for impossible settings."""
    found = planned(config)
    if config.json:
        print(json.dumps(found))
    else:
        if not config.brief:
            _show(found)
        print(in_short(found))
    return found["fits"]


def planned(config: PlanConfig, adapters: bool = True) -> dict[str, Any]:
    """The plan as JSON values: GiB by phase and part, rough seconds, the verdict. Raises UserError as `plan`.

    adapters: report how much of the student they cover, which takes seconds.
    """
    run, coverage = config.run, _adapters(config.run) if adapters else []
    (teacher, *others) = run.teacher_paths().values()
    if others:
        raise UserError("a plan supports one teacher: give the largest of --teachers as --teacher")
    try:
        shapes = find_shape(run.student, "--student"), find_shape(teacher, "--teacher")
    except UserError as error:
        raise UserError("; ".join([str(error), *coverage])) from error
    _check_weights(run.student, "--student")
    if run.teacher.kind != "logprobs":
        _check_weights(teacher, "--teacher")
    hardware = hardware_of(config, shapes[0])
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
        "hardware": hardware.name,
        "gpu_gib": hardware.gib,
        "phases_gib": phases,
        "peak_gib": totals[peak],
        "peak_phase": peak,
        "decides": decides,
        "knob": KNOBS[decides],
        "positions": _positions(run, shapes),
        "fits": totals[peak] <= hardware.gib,
        "tokens_per_step": estimate.step_tokens,
        "micro_batch_tokens": estimate.micro_tokens,
        "steps": run.steps,
        "rough_seconds": estimate.seconds(),
        "adapters": coverage,
        "hint": _hint(config, hardware),
    }


def _check_weights(path: str, flag: str) -> None:
    """Raises UserError for a folder whose weights are quantised in a way that a run refuses."""
    from opsd.model.tensors import QUANTISED, dequantised, json_object

    values = json_object(Path(path) / "config.json")
    if not values.keys().isdisjoint(QUANTISED):
        from transformers import PretrainedConfig

        dequantised(PretrainedConfig.from_dict(values), f"{flag} {path}")


def hardware_of(config: PlanConfig, shape: ModelShape) -> Hardware:
    """The hardware that the plan assumes; flags override parts of it. shape: the student's, used for measuring."""
    name, device = config.hardware, "cpu" if config.hardware == "cpu" else config.run.engine.device
    flash = config.attention == "flash" and config.run.engine.dtype != "float32"
    if name in SHEETS:
        hardware = sheet_hardware(name, config.gpus, flash)
    else:
        hardware = this_hardware(device, config.gpus, flash, (shape.ffn, shape.hidden))
    stated: dict[str, Any] = {
        "gib": config.gpu_gib,
        "tflops": config.tflops and SHEET_SHARE[0] * config.tflops,
        "bandwidth_gbs": config.bandwidth_gbs and SHEET_SHARE[1] * config.bandwidth_gbs,
    }
    return dataclasses.replace(hardware, **{key: value for key, value in stated.items() if value is not None})


def _hint(config: PlanConfig, hardware: Hardware) -> str | None:
    """How to plan for GPUs, if several ranks were requested and this machine has only its CPU."""
    if config.gpus == 1 or config.hardware != "this" or hardware.kind != "cpu" or config.run.engine.device == "cpu":
        return None
    return f"there is no GPU here: for {config.gpus} GPUs add --hardware {', '.join([*SHEETS][:-1])} or {[*SHEETS][-1]}"


def _positions(run: TrainConfig, shapes: tuple[ModelShape, ModelShape]) -> str | None:
    """A warning if a model has too few positions for the longest sequence; a run checks its actual prompts instead."""
    asked, new = run.rollout.max_prompt_tokens, run.rollout.max_new_tokens
    for flag, shape in zip(("--student", "--teacher"), shapes, strict=True):
        if shape.positions is not None and asked + new > shape.positions:
            return (
                f"{flag} {shape.name} has {shape.positions:,} positions, and --rollout.max_prompt_tokens {asked} with "
                f"--rollout.max_new_tokens {new} exceed them: a run starts only if its longest prompt leaves room"
            )
    return None


def _adapters(config: TrainConfig) -> list[str]:
    """How much of the student the adapters cover, in one line; empty without adapters, or without a model folder."""
    if not config.lora.rank or not (Path(config.student) / "config.json").is_file():
        return []
    from opsd.model.loading import check_folder
    from opsd.model.lora import coverage_of

    check_folder(config.student, "--student", config.trust_remote_code)
    with said(f"--student {config.student}: its configuration cannot be read", "fix its config.json"):
        return [coverage_of(config.student, config.lora, config.trust_remote_code)]


def _show(found: dict[str, Any]) -> None:
    console, phases = Console(width=110), found["phases_gib"]
    # As Text, so that brackets in a folder's name are not taken for markup.
    title = Text(f"{found['student']} ← {found['teacher']}, {_ranks(found)}")
    table = Table("GiB per rank", *phases, title=title)
    parts = list(dict.fromkeys(part for of_phase in phases.values() for part in of_phase))
    for part in parts:
        cells = (f"{phases[phase][part]:.2f}" if part in phases[phase] else "" for phase in phases)
        table.add_row(part, *cells)
    table.add_section()
    table.add_row("sum", *(f"{sum(of_phase.values()):.2f}" for of_phase in phases.values()))
    console.print(table)


def in_short(found: dict[str, Any]) -> str:
    """The phases' sums, tokens and rough times, the adapters' coverage, missing positions, and the verdict."""
    sums = ", ".join(f"{phase} {sum(parts.values()):.1f}" for phase, parts in found["phases_gib"].items())
    seconds = ", ".join(f"{phase} {_span(value)}" for phase, value in found["rough_seconds"].items())
    lines = [
        f"GiB per rank: {sums}",
        f"at most {found['tokens_per_step']:,} tokens per step; very roughly {seconds}",
        *found["adapters"],
        *([found["positions"]] if found["positions"] else []),
        "; ".join(filter(None, (verdict(found), found["hint"]))),
    ]
    return "\n".join(lines)


def verdict(found: dict[str, Any]) -> str:
    """One line: whether the run fits, what uses most of the memory, what reduces it, and how long the run may take."""
    knob = f" ({found['knob']} reduces it)" if not found["fits"] else ""
    step_s, steps = sum(found["rough_seconds"].values()), found["steps"]
    return (
        f"{'fits' if found['fits'] else 'does not fit'} on {_ranks(found)}: peak {found['peak_gib']:.1f} of "
        f"{found['gpu_gib']:.1f} GiB, in the {found['peak_phase']} phase, mostly {found['decides']}{knob}; if all "
        f"answers reach the limit, very roughly {_span(step_s)} per step, {_span(step_s * steps)} for {steps} steps"
    )


def _ranks(found: dict[str, Any]) -> str:
    name, ranks = found["hardware"], found["gpus"]
    return name if ranks == 1 else f"{name} per rank, {ranks} ranks"


def _span(seconds: float) -> str:
    return in_words(seconds) if seconds >= 1 else "under a second"
