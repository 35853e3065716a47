"""The run, as frozen dataclasses: what a config file may say, checked once at the door.

In: a Python file with `get_config() -> ml_collections.ConfigDict` and overrides `a.b=value`. Out: a `RunConfig`; past
the door nobody reads a string key.
"""

from jax_sft.config.checks import RESERVED_ARGUMENTS, TEMPLATES, is_hub_name, layer_numbers
from jax_sft.config.deciding import deciding_key, is_better_low
from jax_sft.config.door import ConfigError, default, export_dtype, from_config_dict, known_keys, load
from jax_sft.config.evaluation import METRICS, OWN_PROMPTS, did_you_mean
from jax_sft.config.sections import (
    RULES_OF_ALL,
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    ForgettingConfig,
    LevelConfig,
    LogConfig,
    LoraConfig,
    MeshConfig,
    ModelSource,
    NewRowsStart,
    OptimConfig,
    QualityConfig,
    RunConfig,
    SetConfig,
    StageConfig,
    StreamConfig,
    TrainConfig,
)

__all__ = [
    "METRICS",
    "OWN_PROMPTS",
    "RESERVED_ARGUMENTS",
    "RULES_OF_ALL",
    "TEMPLATES",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ForgettingConfig",
    "LevelConfig",
    "LogConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelSource",
    "NewRowsStart",
    "OptimConfig",
    "QualityConfig",
    "RunConfig",
    "SetConfig",
    "StageConfig",
    "StreamConfig",
    "TrainConfig",
    "deciding_key",
    "default",
    "did_you_mean",
    "export_dtype",
    "from_config_dict",
    "is_better_low",
    "is_hub_name",
    "known_keys",
    "layer_numbers",
    "load",
]
