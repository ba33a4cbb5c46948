"""Every setting of a run: the dataclasses, and what turns composed YAML into checked ones.

Hydra composes `conf/train.yaml`, its groups and the command line against the dataclasses of
`inputs` and `schema`; `build_run` turns the result into plain objects and `check_run` collects
*all* faults into one `ConfigError`. Imports no torch: a typing mistake is answered in well under a
second.
"""

from simpo.config.check import (
    FREE,
    GROUPS,
    TRAJECTORY,
    build_run,
    check_run,
    load_run,
    register_schemas,
    run_id,
    run_yaml,
    trajectory,
)
from simpo.config.choices import (
    Attention,
    Compat,
    Device,
    Dtype,
    OnBadRow,
    Precision,
    PromptTruncation,
    Schedule,
    WandbMode,
)
from simpo.config.inputs import (
    PACKAGE,
    TEMPLATES,
    ConfigError,
    DataConfig,
    DataError,
    LoraConfig,
    ModelConfig,
    SourceConfig,
    menu_dir,
    template_file,
)
from simpo.config.schema import (
    BackendConfig,
    ExportConfig,
    HingeConfig,
    LauncherConfig,
    LossConfig,
    RunConfig,
    SampleConfig,
    SigmoidConfig,
    TrackerConfig,
    TrainConfig,
    WandbConfig,
)

__all__ = [
    "FREE",
    "GROUPS",
    "PACKAGE",
    "TEMPLATES",
    "TRAJECTORY",
    "Attention",
    "BackendConfig",
    "Compat",
    "ConfigError",
    "DataConfig",
    "DataError",
    "Device",
    "Dtype",
    "ExportConfig",
    "HingeConfig",
    "LauncherConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OnBadRow",
    "Precision",
    "PromptTruncation",
    "RunConfig",
    "SampleConfig",
    "Schedule",
    "SigmoidConfig",
    "SourceConfig",
    "TrackerConfig",
    "TrainConfig",
    "WandbConfig",
    "WandbMode",
    "build_run",
    "check_run",
    "load_run",
    "menu_dir",
    "register_schemas",
    "run_id",
    "run_yaml",
    "template_file",
    "trajectory",
]
