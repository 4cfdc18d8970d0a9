"""Every table of the configuration: typed, documented, unknown keys refused. Imports neither torch nor vllm."""

from rlvr_landscape_plugin.config.base import StrictConfig, load_config
from rlvr_landscape_plugin.config.designs import (
    AxisConfig,
    CensusConfig,
    DirectionConfig,
    FindRangeConfig,
    GridConfig,
    PathConfig,
    SliceConfig,
)
from rlvr_landscape_plugin.config.sweep import (
    EnvConfig,
    LaunchConfig,
    SamplingConfig,
    ServerConfig,
    SurrogateConfig,
    SweepConfig,
)
from rlvr_landscape_plugin.config.train import (
    EvaluationConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReferenceConfig,
    TrainConfig,
    TrainEnvConfig,
    train_report,
)
from rlvr_landscape_plugin.files import digest

__all__ = [
    "AxisConfig",
    "CensusConfig",
    "DirectionConfig",
    "EnvConfig",
    "EvaluationConfig",
    "FindRangeConfig",
    "GridConfig",
    "LaunchConfig",
    "LoraConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PathConfig",
    "ReferenceConfig",
    "SamplingConfig",
    "ServerConfig",
    "SliceConfig",
    "StrictConfig",
    "SurrogateConfig",
    "SweepConfig",
    "TrainConfig",
    "TrainEnvConfig",
    "digest",
    "load_config",
    "train_report",
]
