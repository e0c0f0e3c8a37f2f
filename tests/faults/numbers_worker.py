"""Two ranks: steps that cannot be trained on, put between good ones, under every ZeRO stage.

For each engine: two good steps; and the same with an unusable step in front of each, the cause on the last rank alone.
What came out is JSON: whether weights and optimiser state are equal to the bit, and what the ranks said.
"""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from two_ranks import on_ranks

from opsd.config import EngineConfig
from opsd.data.packing import empty
from opsd.utils.distributed import join
from opsd.utils.errors import StepUnusable

HELPERS = runpy.run_path(str(Path(__file__).parents[1] / "scale" / "worker.py"))
CAUSES = ("loss", "gradient", "teacher", "empty")
ENGINES = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero2, offloaded": {"zero_stage": 2, "offload_optimizer": True},
    "zero3, bfloat16": {"zero_stage": 3, "dtype": "bfloat16"},
}


def state(engine) -> dict[str, torch.Tensor]:
    """Whole weights and optimiser state, copied."""
    tensors = {**HELPERS["weights"](engine), **engine.optimizer_state()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def good(case, ranks, built, step: int) -> None:
    _, trainer, teacher = built
    batches = HELPERS["layout"](case, ranks)
    trainer.update(batches, teacher.hidden(batches), step)


def bad(case, ranks, built, cause: str) -> str:
    """An unusable step; what this rank said."""
    engine, trainer, teacher = built
    batches = HELPERS["layout"](case, ranks)
    hidden, last = teacher.hidden(batches), ranks.rank == ranks.world_size - 1
    backward, head = engine.backward, teacher.head_for(empty()).weight_VD.clone()
    if cause == "loss" and last:
        teacher.head_for(empty()).weight_VD[7] = math.nan
    if cause == "gradient" and last:
        engine.backward = lambda loss_sum, count: backward(loss_sum * math.inf, count)
    if cause == "teacher" and last:
        hidden[0][0, 0] = -math.inf
    if cause == "empty":
        batches, hidden = [], []
    try:
        trainer.update(batches, hidden, 1)
    except StepUnusable as problem:
        return str(problem)
    finally:
        teacher.head_for(empty()).weight_VD.copy_(head)
        engine.backward = backward
    return "the step was taken"


def main(out: Path) -> None:
    ranks, results = join(torch.device("cpu")), {}
    for name, settings in ENGINES.items():
        case = HELPERS["Case"](
            "", EngineConfig(kind="deepspeed", **settings), "soft_or", options={"normalise_over": "running"}
        )
        clean, spoilt = HELPERS["build"](case, ranks), HELPERS["build"](case, ranks)
        said: dict[str, list[str]] = {}
        for step in (1, 2):
            for cause in CAUSES:
                said[cause] = ranks.gather(bad(case, ranks, spoilt, cause))
            for built in (clean, spoilt):
                good(case, ranks, built, step)
        ours, theirs = state(spoilt[0]), state(clean[0])
        results[name] = {"said": said, "equal": all(torch.equal(ours[key], theirs[key]) for key in theirs)}
    if ranks.is_main:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    on_ranks(2, lambda: main(Path(sys.argv[1])))
