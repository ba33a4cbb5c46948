"""Builds a `RunConfig` from a composed configuration, checks it, and writes and reads run.yaml."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from simpo.config.backends import (
    DdpConfig,
    FsdpConfig,
    SingleConfig,
    Zero2Config,
    Zero3Config,
    ZeroConfig,
)
from simpo.config.benchmarks import BenchmarkConfig
from simpo.config.choices import Dtype, Precision
from simpo.config.data import DataConfig
from simpo.config.errors import ConfigError, first_line
from simpo.config.launchers import LocalConfig, SlurmConfig
from simpo.config.losses import (
    LOSSES,
    is_of,
    losses_of,
    made_of,
    own_losses,
    problems_of,
    read_only,
    terms_problems,
)
from simpo.config.models import ModelConfig
from simpo.config.own_code import OwnCodeError, is_function, load_function
from simpo.config.plain import NotPlain, plain_run, plain_text, read_plain
from simpo.config.renamed import renamed_config
from simpo.config.rounds import RoundsConfig
from simpo.config.rules import cross_problems
from simpo.config.schema import RunConfig
from simpo.config.trackers import (
    MlflowConfig,
    TensorBoardConfig,
    TrackerConfig,
    TrackioConfig,
    WandbConfig,
)
from simpo.loss import LossConfig

GROUPS: dict[str, dict[str, type]] = {
    "model": {"base": ModelConfig},
    "data": {"base": DataConfig},
    "loss": {**LOSSES},
    "benchmark": {"base": BenchmarkConfig},
    "backend": {
        "single": SingleConfig,
        "ddp": DdpConfig,
        "fsdp": FsdpConfig,
        "zero2": Zero2Config,
        "zero3": Zero3Config,
    },
    "launcher": {"local": LocalConfig, "slurm": SlurmConfig},
    "tracker": {
        "console": TrackerConfig,
        "wandb": WandbConfig,
        "trackio": TrackioConfig,
        "tensorboard": TensorBoardConfig,
        "mlflow": MlflowConfig,
    },
}
"""The schemas of each group. If a group has several, `name` in its YAML says which."""

LONGEST_SHOWN = 160
LONGEST_NAME_BYTES = 200
LARGEST = 2**32 - 1
"""Largest whole number of any setting: the limit of seeds, and too large for all others."""


def register_schemas() -> None:
    """Register the dataclasses with Hydra as `run_schema` and `schema/<group>/<name>`."""
    store = ConfigStore.instance()
    whole = OmegaConf.structured(RunConfig)
    _open_dicts(whole.rounds, RoundsConfig)
    store.store(name="run_schema", node=whole)
    for group, schemas in GROUPS.items():
        for name, schema in schemas.items():
            node = OmegaConf.structured(schema)
            _open_dicts(node, schema)
            store.store(group=f"schema/{group}", name=name, node=node)


def _open_dicts(node: DictConfig, schema: type) -> None:
    """Let the dicts of a section take any names: a template's, a tracker's, a launcher's."""
    for item in fields(schema):
        if item.default_factory is dict:
            OmegaConf.set_struct(node[item.name], False)


def register_own_losses(overrides: Iterable[str]) -> None:
    """Register the losses of each `loss.module=MODULE` among overrides as choices of `loss=`.

    Raises:
        OwnCodeError: a module cannot be imported, or what it defines cannot be used.
    """
    for key, _, value in (text.partition("=") for text in overrides):
        if key.lstrip("+") == "loss.module" and (name := value.strip("'\"")) != "null":
            for module in name.split(","):
                _register(module)


def _register(module: str) -> None:
    store = ConfigStore.instance()
    for name, kind in own_losses(module).items():
        try:
            for group in ("loss", "schema/loss"):
                store.store(group=group, name=name, node=kind)
        # Also NameError, for a type that is not imported.
        except Exception as error:
            place = f"loss.module: {module}:{kind.__name__}"
            if key := getattr(error, "full_key", None):
                place += f".{key}"
            raise OwnCodeError([f"{place} cannot be settings: {first_line(error)}"]) from error
        GROUPS["loss"][name] = kind


def build_run(cfg: DictConfig) -> RunConfig:
    """Turn a composed configuration into a checked `RunConfig`.

    Raises:
        ConfigError: a required key is missing, or `check_run` finds faults.
        OmegaConfBaseException: an interpolation cannot be resolved or gives a value of the wrong
            type, or a key is not in the schemas. `fault_line` shortens it to one line.
    """
    _refuse_missing(cfg)
    kinds: dict[str, Any] = {group: OmegaConf.get_type(cfg, group) for group in GROUPS}
    raw: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    with made_of(kinds["loss"]):
        try:
            run = plain_run(raw, {group: {"base": kind} for group, kind in kinds.items()})
        except (NotPlain, KeyError, TypeError, AttributeError):
            merged: Any = OmegaConf.to_object(_resolved(cfg, kinds))
            run = merged
    check_run(run)
    return run


def _refuse_missing(cfg: DictConfig | ListConfig) -> None:
    missing = sorted(_missing_keys(cfg))
    if missing:
        raise ConfigError([f"{key}: required, but not given" for key in missing])


def _resolved(cfg: DictConfig, kinds: dict[str, Any]) -> DictConfig | ListConfig:
    """The configuration with its interpolations resolved and checked against the schemas again,
    because a resolved value may be of the wrong type.
    """
    return OmegaConf.merge(_schema(**kinds), OmegaConf.to_container(cfg, resolve=True))


def fault_line(error: OmegaConfBaseException) -> str:
    """The key and the fault that OmegaConf found, as one line."""
    if isinstance(error, ConfigKeyError):
        return f"{error.full_key}: no such key (leave out the +)"
    # Shortened: it may show a whole section as the value of a setting.
    reason = textwrap.shorten(first_line(error), LONGEST_SHOWN, placeholder=" ...")
    return f"{error.full_key}: {reason}" if error.full_key else reason


def load_run(path: Path, check: bool = True) -> RunConfig:
    """Read a run.yaml back, through the same schemas and checks as a composed configuration.

    Args:
        check: also apply `check_run`, and import the module of a user's loss.

    Raises:
        ConfigError: the file does not fit the schemas.
    """
    remedy = "restore it, or remove it: the run's own command writes it anew"
    try:
        run = read_plain(path, GROUPS) or _merged_run(path, check)
    except OwnCodeError:
        raise
    except ConfigError as error:
        problems = error.problems
    except PermissionError as error:
        raise ConfigError([f"{path}: {error.strerror} (let this user read it)"]) from error
    except OSError as error:
        problems = [error.strerror or first_line(error)]
    except ConfigKeyError as error:
        remedy = "restore it; if a newer simpo wrote it, use that one"
        problems = [first_line(error)]
    except (OmegaConfBaseException, KeyError) as error:
        problems = [first_line(error)]
    # On a damaged file the YAML parser and OmegaConf raise almost any error.
    except Exception as error:
        problems = [f"not the settings of a run ({type(error).__name__})"]
    else:
        if check:
            check_run(run)
        return run
    raise ConfigError([f"{path}: {problem} ({remedy})" for problem in problems])


_HAVE_DEFAULTS = {item.name for item in fields(RunConfig) if item.default is not MISSING}


def _merged_run(path: Path, check: bool) -> RunConfig:
    raw, kinds = OmegaConf.load(path), {}
    raw = renamed_config(raw, note=False) if isinstance(raw, DictConfig) else DictConfig({})
    for group, schemas in GROUPS.items():
        if group not in raw and group in _HAVE_DEFAULTS:  # written before the group existed
            kinds[group] = schemas["base"]
            continue
        if not isinstance(raw.get(group), DictConfig):
            raise ConfigError([f"lacks the section {group}"])
        kinds[group] = schemas.get("base") or _choice(group, raw[group], check)
    merged = _resolved(raw, kinds)
    _refuse_missing(merged)
    run = OmegaConf.to_object(merged)
    assert isinstance(run, RunConfig)
    return run


def _choice(group: str, section: DictConfig, check: bool) -> type:
    """The schema that a section of a run.yaml was written with."""
    if group == "loss" and section.get("module") is not None:
        if not check:  # reading a run's settings must not run its code
            return GROUPS[group].get(section.name) or read_only(dict(section))
        _register(section.module)
    return GROUPS[group][section.name]


def check_training(run: RunConfig, bf16: bool = True) -> None:
    """Check what training needs, but generating replies does not.

    Args:
        bf16: whether the forward computes in bf16, as far as that is known.

    Raises:
        ConfigError: all weights are trained in bf16 without fp32 copies; most updates would be
            rounded away.
    """
    copies = isinstance(run.backend, ZeroConfig) and bf16 and run.train.precision != Precision.fp32
    if run.model.dtype is Dtype.bfloat16 and not run.model.lora.used and not copies:
        raise ConfigError(
            [
                "model.dtype: bfloat16 rounds updates away where all weights are trained (leave it "
                "at auto: fp32 weights, computed in bf16 with train.precision=bf16)"
            ]
        )


def run_yaml(run: RunConfig) -> str:
    """The whole run as YAML, which `load_run` reads back."""
    return plain_text(run)


def check_run(run: RunConfig) -> None:
    """Check ranges and rules that cross sections.

    Raises:
        ConfigError: with every fault, each a line `key: rule, got value (remedy)`.
    """
    problems = list(_section_problems(run, ""))
    for group, schemas in GROUPS.items():
        section = getattr(run, group)
        # `name` says to `load_run` which schema a run.yaml was written with.
        if "base" not in schemas and schemas.get(section.name) is not type(section):
            problems.append(
                f"{group}.name: set by the group, got {section.name} "
                f"({group}= takes {', '.join(schemas)})"
            )
    if run.loss.module is not None and not is_of(type(run.loss), run.loss.module):
        own = " or ".join(f"loss={name}" for name in losses_of(run.loss.module))
        problems.append(
            f"loss.module: {run.loss.module} defines no loss {run.loss.name} (write {own})"
        )
    problems += cross_problems(run)
    if not problems and run.loss.module is not None:
        problems += terms_problems(run.loss)
    if not problems:
        problems += _format_problems(run.data)
    if problems:
        raise ConfigError(problems)


def _format_problems(data: DataConfig) -> Iterator[str]:
    for index, source in enumerate(data.sources):
        if source.format is not None and is_function(source.format):
            try:
                load_function(f"data.sources[{index}].format", source.format)
            except OwnCodeError as error:
                yield str(error)


@lru_cache(maxsize=32)
def _schema(**kinds: type) -> DictConfig:
    """The schema of a run whose groups have these schemas; not to be changed."""
    schema = OmegaConf.structured(RunConfig)
    for group, kind in kinds.items():
        schema[group] = OmegaConf.structured(kind)
    return schema


def _missing_keys(cfg: DictConfig | ListConfig, prefix: str = "") -> Iterator[str]:
    # OmegaConf.missing_keys raises if an interpolation points to a missing key.
    keys: Iterable[Any] = range(len(cfg)) if isinstance(cfg, ListConfig) else cfg
    for key in keys:
        name = f"{prefix}[{key}]" if isinstance(cfg, ListConfig) else f"{prefix}.{key}".lstrip(".")
        if OmegaConf.is_interpolation(cfg, key):
            continue
        if OmegaConf.is_missing(cfg, key):
            yield name
        elif OmegaConf.is_config(cfg[key]):
            yield from _missing_keys(cfg[key], name)


def _section_problems(section: Any, prefix: str) -> Iterator[str]:
    names = [item.name for item in fields(section)]
    values = {name: getattr(section, name) for name in names}
    if faults := [f"{prefix}{key}: {p}" for key, v in values.items() for p in _plain(key, v)]:
        yield from faults
    elif hasattr(section, "problems"):
        try:
            own = isinstance(section, LossConfig)
            found = problems_of(section) if own else section.problems()
            yield from [f"{prefix}{problem}" for problem in found]
        except (OSError, RuntimeError) as error:  # a path too long, or ~ of an unknown user
            yield f"{prefix.rstrip('.') or 'settings'}: {first_line(error)}"
    # Hydra's `+key=value` adds keys that nothing would ever read.
    yield from (
        f"{prefix}{key}: no such key (leave out the +)" for key in vars(section) if key not in names
    )
    for name, value in values.items():
        if is_dataclass(value):
            yield from _section_problems(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if is_dataclass(item):
                    yield from _section_problems(item, f"{prefix}{name}[{index}].")


def _plain(key: str, value: Any) -> Iterator[str]:
    """Faults of a value that do not depend on which section the setting is in."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _plain("", item)
    # Every comparison with nan is false, so no rule would find it.
    if isinstance(value, float) and not math.isfinite(value):
        yield f"must be a finite number, got {value}"
    if isinstance(value, int) and abs(value) > LARGEST:
        yield f"must be at most {LARGEST} in size, got {value}"
    if isinstance(value, str) and any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        yield f"must be a line of readable text, got {value[:LONGEST_SHOWN]!a}"
    # A name is, or is part of, the name of a folder.
    if key == "name" and isinstance(value, str):
        if not value or value in (".", "..") or "/" in value:
            yield f"must be the name of a folder, without /, got {value or repr(value)}"
        elif len(value.encode(errors="replace")) > LONGEST_NAME_BYTES:
            yield f"must be at most {LONGEST_NAME_BYTES} bytes long, got {len(value.encode())}"
