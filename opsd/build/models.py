"""The student and the teachers, loaded and checked."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from opsd.config import LoraConfig, TrainConfig
from opsd.engine import settled
from opsd.model.checks import Reach
from opsd.model.files import check_sampled, make_savable
from opsd.model.loading import load_scorer, load_tokenizer
from opsd.model.lora import ADAPTER_FOLDER, add_adapters, coverage, load_adapters
from opsd.model.scorer import Scorer
from opsd.model.vocabulary import check_tokenizers
from opsd.teacher import LocalTeacher, Teacher
from opsd.utils.distributed import Ranks
from opsd.utils.errors import UserError


def check_student(config: TrainConfig, student: Scorer, tokenizer: Any, path: str) -> list[str]:
    """Checks now that the student can be saved and that vLLM accepts its weights. Returns lines to print.

    Raises UserError.
    """
    model = student.model
    notes = make_savable(model, tokenizer, path, "--student")
    if student.alone and config.environment.kind != "none":
        raise UserError(f"--student {path}: batching changes its outputs; an environment cannot use it")
    if student.alone and config.rollout.engine != "hf":
        raise UserError(
            f"--student {path}: its outputs change with sequence length, but not in vLLM; give --rollout.engine hf"
        )
    if student.alone:
        notes.append("the student's sequences are computed one by one, because batching changes its outputs")
    if config.rollout.engine != "hf":
        check_sampled(model, path, "--student")
    if config.lora.rank:
        notes.append(coverage(model))
    return notes


def load_student(config: TrainConfig, path: str, device: torch.device, reach: Reach | None = None) -> Scorer:
    """The student of `path`: config.student, or a checkpoint of this run.

    With LoRA a checkpoint's weights have the adapters merged in; training resumes from the base model and the adapters.
    """
    # The same condition as in DeepSpeedEngine: what is checked here must be what is used.
    packed = config.engine.kind == "deepspeed" and config.engine.zero_stage == 3

    compute = getattr(torch, settled(config.engine, device).dtype)

    def load(folder: str) -> Scorer:
        trust = config.trust_remote_code
        return load_scorer(folder, "--student", torch.float32, device, trust, packed, compute, reach)

    if not config.lora.rank:
        return load(path)
    student = load(config.student)
    add_adapters(student.model, config.lora, config.seed, config.student)
    if path != config.student:
        load_adapters(student.model, Path(path) / ADAPTER_FOLDER)
    return student


def check_adapters(lora: LoraConfig) -> None:
    """Raises UserError if adapters are requested and peft is not installed."""
    if lora.rank and importlib.util.find_spec("peft") is None:
        raise UserError(f"--lora.rank {lora.rank}: peft is not installed; run `make setup`, or give 0")


def read_folders(config: TrainConfig, checkpoint: Path | None) -> dict[str, str]:
    """The folders that a run's weights are read from, by flag; without those whose weights the checkpoint holds."""
    anew = checkpoint is None
    student = {"--student": config.student} if anew or config.lora.rank else {}
    teachers = config.teacher_paths() if anew or not config.teacher.follows else {}
    return student | {f"--teachers {name}" if name else "--teacher": path for name, path in teachers.items()}


def load_teacher_tokenizers(config: TrainConfig, tokenizer: Any) -> list[Any]:
    """Each teacher's tokenizer. Raises UserError if one maps tokens to other ids than the student's, `tokenizer`."""
    found = []
    for name, path in config.teacher_paths().items():
        found.append(load_tokenizer(path, f"--teachers {name}" if name else "--teacher", config.trust_remote_code))
        check_tokenizers(tokenizer, found[-1])
    return found


def build_teachers(config: TrainConfig, ranks: Ranks, device: torch.device, reach: Reach) -> dict[str, Teacher]:
    """The teachers that `config` names, by name; a single one has the name ""."""
    return {name: build_teacher(config, ranks, device, reach, name) for name in config.teacher_paths()}


def build_teacher(config: TrainConfig, ranks: Ranks, device: torch.device, reach: Reach, name: str) -> Teacher:
    """The teacher of that name, loaded and checked, or connected."""
    t, dtype = config.teacher_of(name), getattr(torch, settled(config.engine, device).dtype)
    if t.shard:
        from opsd.teacher.sharded import ShardedTeacher

        return ShardedTeacher(t.model, dtype, device, t.offload, t.cache, config.trust_remote_code, reach)
    if t.kind == "local":
        scorer = load_scorer(t.model, "--teacher", dtype, device, config.trust_remote_code, reach=reach)
        return LocalTeacher(scorer, device, t.offload, t.cache)
    if t.kind == "logprobs":
        from opsd.teacher.logprobs import LogprobsTeacher

        served = LogprobsTeacher(t, device, ranks.rank)
    else:
        from opsd.teacher.vllm import VLLMTeacher, read_head

        served = VLLMTeacher(t, read_head(t.model, dtype, config.trust_remote_code, reach), device, ranks.rank)
    served.connect(reach.longest)
    return served


def lies_in_student(config: TrainConfig) -> bool:
    """Whether the teacher is the student's model with other weights, not a separate model."""
    t = config.teacher
    here = t.kind == "local" and not t.shard and not t.offload
    return t.follows or (t.is_student and config.lora.rank > 0 and here)
