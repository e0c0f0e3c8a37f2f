"""Settings of a run: the schema, its checks, and the command line made from them."""

from opsd.config.schema import (
    CheckpointConfig,
    EngineConfig,
    EnvironmentConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    RolloutConfig,
    SelectConfig,
    TeacherConfig,
    TelemetryConfig,
    TrackConfig,
)
from opsd.config.train import TrainConfig, from_json, to_json

__all__ = [
    "CheckpointConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "LoraConfig",
    "LossConfig",
    "OptimConfig",
    "RolloutConfig",
    "SelectConfig",
    "TeacherConfig",
    "TelemetryConfig",
    "TrackConfig",
    "TrainConfig",
    "from_json",
    "to_json",
]
