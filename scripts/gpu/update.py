"""Whole updates of a random Qwen3 by a random Qwen3-8B at the paper's size: time and peak memory, against the plan."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from bench.updates import trainer_of
from gpu.check import Check, Row
from opsd.config import EngineConfig, LossConfig, OptimConfig
from opsd.config.cli import parse
from opsd.data.packing import pack
from opsd.engine import TorchEngine
from opsd.estimate.command import PlanConfig, planned
from opsd.estimate.memory import PROCESS_GIB
from opsd.estimate.shapes import BUILT_IN, ModelShape
from opsd.model.attention import attention_for
from opsd.model.loading import disable_dropout
from opsd.model.scorer import Scorer
from opsd.selection import load_selector
from opsd.teacher import LocalTeacher
from opsd.types import MicroBatch, Prompt, Rollout

Result = TypeVar("Result")
TEACHER = "qwen3-8b"
STUDENTS = ("qwen3-4b", "qwen3-1.7b")
TINY = ModelShape("tiny", "qwen3", 512, 64, 2, 4, 2, 16, 128, True)
ROLLOUTS, PROMPT_TOKENS = 4, 8
CELLS = (
    *(("fused", rule, kept) for rule, kept in (("all", 1.0), ("soft_or", 0.5), ("entropy_sample", 0.2))),
    *(("whole", "entropy_sample", kept) for kept in (0.1, 0.2, 0.5)),
    ("whole", "all", 1.0),
)


def update(check: Check) -> None:
    """The teacher's states, then one update per cell; cells that do not fit according to the plan are left out."""
    name = student_of(check)
    step = _Step(check, TINY if check.small else BUILT_IN[name], TINY if check.small else BUILT_IN[TEACHER])
    check.say("models", student=step.student.name, teacher=step.teacher.name, attention=step.attention)
    check.tried("teacher's states", step.score, tokens=check.sizes.tokens)
    # It compiles kernels and creates the optimiser's moments.
    check.tried("first update", lambda: step.update("fused", "all", 1.0))
    for memory, rule, retention in CELLS:
        cell = {"memory": memory, "rule": rule, "retention": retention}
        plan = {} if check.small else plan_of(check, name, **cell)
        if plan and not fits(plan):
            check.say(
                "update", **cell, **plan, missing=f"the plan leaves too little of the card's {card_gib():.0f} GiB"
            )
        else:
            check.tried("update", lambda cell=cell: step.update(**cell), **cell, **plan)


def card_gib() -> float:
    """Memory of the card."""
    return torch.cuda.mem_get_info()[1] / 2**30


def fits(plan: Row) -> bool:
    """Whether the plan leaves a tenth of the card for what it does not count."""
    return plan["planned_gib"] <= 0.9 * card_gib()


def student_of(check: Check) -> str:
    """The larger student, if the plan of a fused update on all tokens fits."""
    if check.small:
        return TINY.name
    return next((name for name in STUDENTS if fits(plan_of(check, name, "fused", "all", 1.0))), STUDENTS[-1])


def plan_of(check: Check, student: str, memory: str, rule: str, retention: float) -> Row:
    """The peak that `opsd plan` gives for the student's and the optimiser's phase, without the process's own GiB."""
    tokens = check.sizes.tokens
    flags = {
        "--student": student,
        "--teacher": TEACHER,
        "--hardware": "h200",
        "--gpu_gib": card_gib(),
        "--engine.dtype": "bfloat16",
        "--engine.gradient_checkpointing": True,
        "--engine.micro_batch_tokens": tokens,
        "--prompts_per_step": ROLLOUTS,
        "--rollout.samples_per_prompt": 1,
        "--rollout.max_prompt_tokens": PROMPT_TOKENS,
        "--rollout.max_new_tokens": tokens // ROLLOUTS - PROMPT_TOKENS,
        "--loss.memory": memory,
        "--select.by": rule,
        "--select.retention": retention,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    phases = planned(parse(PlanConfig, words, "opsd plan"))["phases_gib"]
    return {"planned_gib": max(sum(phases[phase].values()) for phase in ("student", "step")) - PROCESS_GIB["cuda"]}


class _Step:
    """Both models on the card, and a micro-batch of four rollouts of equal length."""

    def __init__(self, check: Check, student: ModelShape, teacher: ModelShape) -> None:
        self._check, self.student, self.teacher = check, student, teacher
        self._teacher = LocalTeacher(self._model(teacher, torch.bfloat16), check.device)
        config = EngineConfig(dtype="bfloat16", gradient_checkpointing=True)
        scorer = self._model(student, torch.float32)
        self.attention = str(scorer.model.config._attn_implementation)
        self._engine = TorchEngine(scorer, config, OptimConfig(lr=1e-6), check.device)
        self._micro, self._states = self._packed(), []

    def _model(self, shape: ModelShape, dtype: torch.dtype) -> Scorer:
        config = Qwen3Config(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            tie_word_embeddings=shape.tied,
            max_position_embeddings=40_960,
        )
        with torch.device(self._check.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        disable_dropout(model)
        attention = attention_for(model, torch.bfloat16, self._check.device)
        if attention != "sdpa":
            model.set_attn_implementation(attention)
        return Scorer(model)

    def _packed(self) -> MicroBatch:
        tokens = self._check.sizes.tokens
        ids = torch.randint(self.student.vocab, (ROLLOUTS, tokens // ROLLOUTS)).tolist()
        rollouts = [
            Rollout(number, Prompt(str(number), "", row[:PROMPT_TOKENS], None), row[PROMPT_TOKENS:], truncated=True)
            for number, row in enumerate(ids)
        ]
        (micro,) = pack(rollouts, tokens)
        return micro

    def score(self) -> Row:
        """The teacher's part of the step."""
        found = self._clocked(lambda: self._teacher.hidden([self._micro]))
        self._states = found.result
        return {"seconds": found.seconds, "peak_gib": found.peak_gib}

    def update(self, memory: str, rule: str, retention: float) -> Row:
        """Forward, loss, backward and AdamW."""
        self._engine.discard()  # left by an update that ran out of memory
        selector = load_selector(rule, **({} if rule == "all" else {"retention": retention}))
        loss = LossConfig(memory=memory)  # pyrefly: ignore[bad-argument-type]
        trainer = trainer_of(self._engine, self._teacher, selector, loss, self.student.vocab)
        found = self._clocked(lambda: trainer.update([self._micro], self._states, 1))
        done = found.result
        return {
            "seconds": found.seconds,
            "peak_gib": found.peak_gib,
            "kept": done.kept,
            "loss_nats": done.loss_nats,
            "chunk_halvings": done.chunk_halvings,
        }

    def _clocked(self, run: Callable[[], Result]) -> _Clocked:
        if self._check.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = run()
        if self._check.on_cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30 if self._check.on_cuda else None
        return _Clocked(result, time.perf_counter() - start, peak)


@dataclass(frozen=True)
class _Clocked:
    """peak_gib: peak memory allocated on the card; None on a CPU."""

    result: Any
    seconds: float
    peak_gib: float | None
