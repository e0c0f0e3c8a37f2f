"""Settings of a run, and the command line that is made from them."""

from opsd.config.rollout import RolloutConfig as RolloutConfig
from opsd.config.schema import CheckpointConfig as CheckpointConfig
from opsd.config.schema import EnvironmentConfig as EnvironmentConfig
from opsd.config.schema import EvalConfig as EvalConfig
from opsd.config.schema import TelemetryConfig as TelemetryConfig
from opsd.config.schema import TrackConfig as TrackConfig
from opsd.config.schema import TrainConfig as TrainConfig
from opsd.config.schema import from_json as from_json
from opsd.config.schema import to_json as to_json
from opsd.config.teacher import TeacherConfig as TeacherConfig
from opsd.config.training import EngineConfig as EngineConfig
from opsd.config.training import LoraConfig as LoraConfig
from opsd.config.training import LossConfig as LossConfig
from opsd.config.training import OptimConfig as OptimConfig
from opsd.config.training import SelectConfig as SelectConfig
