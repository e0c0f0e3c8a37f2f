"""Single updates by the real trainer, on an engine and a teacher of a test's own."""

from typing import Any

from opsd.build import Parts
from opsd.config import LossConfig, OptimConfig, TeacherConfig, TrainConfig
from opsd.train import Trainer


def trainer_of(engine, teacher, selector=None, loss=None, vocab_size=49, optim=None, steps=100) -> Trainer:
    """A trainer that can `update`; it has no folder, no prompts and no sampler."""
    config = TrainConfig(
        student="",
        teacher=TeacherConfig(""),
        prompts="",
        out="",
        steps=steps,
        loss=loss or LossConfig(),
        optim=optim or OptimConfig(),
    )
    nothing: Any = None
    parts = Parts(
        ranks=engine.ranks,
        tokenizer=nothing,
        prompts=nothing,
        dropped_prompts=0,
        sampler=nothing,
        sampling=nothing,
        teacher=teacher,
        teacher_sampler=None,
        selector=selector,
        vocab_size=vocab_size,
        engine=engine,
        evaluator=nothing,
        telemetry=[],
    )
    return Trainer(config, parts, nothing)
