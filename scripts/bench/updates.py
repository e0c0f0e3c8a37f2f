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
    unused = ("began", "tokenizer", "prompts", "sampler", "evaluator")
    parts = Parts(
        **dict.fromkeys(unused, nothing),
        ranks=engine.ranks,
        dropped_prompts=0,
        teacher=teacher,
        teacher_sampler=None,
        selector=selector,
        vocab_size=vocab_size,
        engine=engine,
        telemetry=[],
    )
    return Trainer(config, parts, nothing)
