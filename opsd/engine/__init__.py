"""The engines: they hold the student's weights and run the optimiser step."""

import importlib.util

import torch

from opsd.config import TrainConfig
from opsd.engine.base import Engine, learning_rate, settled
from opsd.engine.torch_engine import TorchEngine
from opsd.model.scorer import Scorer
from opsd.utils.distributed import Ranks, world_size
from opsd.utils.errors import UserError

__all__ = ["Engine", "TorchEngine", "build_engine", "check_engine", "learning_rate", "settled"]


def check_engine(config: TrainConfig) -> None:
    """Raises UserError if the engine that `config` names cannot run here."""
    kind = config.engine.kind
    if kind == "torch" and world_size() > 1:
        raise UserError(
            f"--engine.kind torch is one process, but {world_size()} were started; give --engine.kind deepspeed"
        )
    if kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise UserError("--engine.kind deepspeed: DeepSpeed is not installed; run `make setup`, or give torch")


def build_engine(config: TrainConfig, ranks: Ranks, student: Scorer, device: torch.device) -> Engine:
    """The engine that `config` names, around `student`. ZeRO-0 partitions nothing: plain torch does that."""
    if config.engine.kind == "torch" or config.engine.zero_stage == 0:
        return TorchEngine(student, config.engine, config.optim, device, ranks)
    from opsd.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(student, config.engine, config.optim, device, ranks)
