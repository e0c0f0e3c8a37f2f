"""Settings of a run, and the command line made from them."""

from opsd.config.schema import CheckpointConfig as CheckpointConfig
from opsd.config.schema import EngineConfig as EngineConfig
from opsd.config.schema import EnvironmentConfig as EnvironmentConfig
from opsd.config.schema import EvalConfig as EvalConfig
from opsd.config.schema import LoraConfig as LoraConfig
from opsd.config.schema import LossConfig as LossConfig
from opsd.config.schema import OptimConfig as OptimConfig
from opsd.config.schema import RolloutConfig as RolloutConfig
from opsd.config.schema import SelectConfig as SelectConfig
from opsd.config.schema import TeacherConfig as TeacherConfig
from opsd.config.schema import TelemetryConfig as TelemetryConfig
from opsd.config.schema import TrackConfig as TrackConfig
from opsd.config.schema import TrainConfig as TrainConfig
from opsd.config.schema import from_json as from_json
from opsd.config.schema import to_json as to_json
