"""Single updates by the trainer itself, with a given engine and teacher."""

from typing import Any

from opsd.build import Parts
from opsd.config import LossConfig, OptimConfig, TeacherConfig, TrainConfig
from opsd.engine import Engine
from opsd.selection import TokenSelector
from opsd.teacher import Teacher
from opsd.train import Trainer


def trainer_of(
    engine: Engine,
    teacher: Teacher,
    selector: TokenSelector | None = None,
    loss: LossConfig | None = None,
    vocab_size: int = 49,
    optim: OptimConfig | None = None,
    steps: int = 100,
) -> Trainer:
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
        began=nothing,
        tokenizer=nothing,
        prompts=nothing,
        dropped_prompts=0,
        sampler=nothing,
        teacher=teacher,
        teacher_sampler=None,
        selector=selector,
        vocab_size=vocab_size,
        engine=engine,
        evaluator=nothing,
        telemetry=[],
    )
    return Trainer(config, parts, nothing)
