"""Composes settings with Hydra from conf/, experiments/ and a folder of the user's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields
from enum import Enum
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from threading import Lock
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins import file_config_source, structured_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from yaml import MarkedYAMLError

from simpo.config.check import GROUPS, register_own_losses, register_schemas
from simpo.config.data import SourceConfig
from simpo.config.errors import ConfigError, first_line
from simpo.config.paths import config_dir
from simpo.config.renamed import renamed_config
from simpo.config.schema import RunConfig
from simpo.config.suggest import all_keys, unknown_key

OWN_LOSS = "a loss of your own needs loss.module=MODULE"

# Where Hydra finds the group `experiments`; conf/train.yaml reads it.
os.environ["SIMPO_MENUS"] = str(config_dir("experiments").parent)
register_schemas()


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's reader of YAML files, which also replaces old names of settings.

    A file of experiments/ sets keys of the whole run, with or without `# @package _global_`.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(config_path)
        group = config_path.rpartition("/")[0].replace("/", ".")
        if group.partition(".")[0] == "experiments" and result.header.get("package") is None:
            result.header["package"] = "_global_"
        section = "" if result.header.get("package") == "_global_" else group
        if isinstance(result.config, DictConfig):
            result.config = renamed_config(result.config, section)
        return result


class StructuredConfigSource(structured_config_source.StructuredConfigSource):
    """Hydra's reader of dataclasses. Hydra copies it for each composition, with all of them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> StructuredConfigSource:
        return self  # nothing changes it


# Hydra registers sources by scheme: these take the place of its own.
for source in (FileConfigSource, StructuredConfigSource):
    SourcesRegistry.instance().types[source.scheme()] = source


class NotComposedError(Exception):
    """Hydra or OmegaConf cannot compose the overrides; `str()` is its message in one line."""


@dataclass(frozen=True)
class Composer:
    """The folders and the file that Hydra composes from.

    Attributes:
        config_dir: a folder of further choices (`--config-dir`), read beside conf/.
        config_name: the file, in one of the folders, that lists the defaults (`--config-name`).
        searchpath: the override of hydra.searchpath; empty: experiments/ is searched.

    Raises:
        ConfigError: `config_dir` is not a folder, or has files that Hydra would not read.
    """

    config_dir: str | None = None
    config_name: str = "train"
    searchpath: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.config_dir is None:
            return
        folder, ours = Path(self.config_dir), config_dir("conf")
        if not folder.is_dir():
            raise ConfigError([f"--config-dir: no such folder, got {folder}"])
        both = ((folder / file.relative_to(ours), file) for file in sorted(ours.rglob("*.yaml")))
        if hidden := [own for own, file in both if own.is_file() and not own.samefile(file)]:
            fault = "has the name of a file of simpo, which is read instead (rename it)"
            raise ConfigError([f"--config-dir: {own} {fault}" for own in hidden])

    def compose(self, overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
        """Compose overrides as the command line does.

        Args:
            with_hydra: keep the section `hydra` in the result.

        Raises:
            NotComposedError: they cannot be composed.
            OwnCodeError: the module of a loss cannot be loaded.
        """
        register_own_losses(overrides)
        try:
            if with_hydra or self != CONF:
                return self._composed(overrides, with_hydra)
            return _changed(overrides)
        # Of any type: ValueError for a group set to a number, TypeError for a list of numbers.
        except Exception as error:
            raise NotComposedError(_fault(error)) from error

    def _composed(self, overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
        with self.loader():
            words = [*self.searchpath, *overrides]
            return compose(self.config_name, words, return_hydra_config=with_hydra)

    def choices(self, group: str) -> list[str]:
        """The choices of a group and of its subfolders; empty if there is no such group."""
        if not all(part.strip(".") for part in group.split("/")):
            return []
        with self.loader() as loader:
            return sorted(self._choices(loader, group))

    @contextmanager
    def loader(self) -> Iterator[ConfigLoaderImpl]:
        """Hydra's loader of the files, as the command line has it.

        Hydra has one in a process: that of a program which composes settings of its own is put
        back, and threads wait for each other.
        """
        with (
            _ALONE,
            _without_hydra(),
            initialize_config_dir(str(config_dir("conf")), version_base="1.3"),
        ):
            loader = GlobalHydra.instance().config_loader()
            assert isinstance(loader, ConfigLoaderImpl)
            if self.config_dir is not None:
                path = loader.get_search_path()
                path.prepend(
                    "command-line",
                    f"file://{os.path.abspath(self.config_dir)}",
                    SearchPathQuery(provider="schema"),
                )
                loader.repository.initialize_sources(path)
            yield loader

    def _choices(self, loader: ConfigLoaderImpl, group: str) -> Iterator[str]:
        def listed(kind: ObjectType) -> list[str]:
            return loader.get_group_options(group, kind, self.config_name, list(self.searchpath))

        yield from listed(ObjectType.CONFIG)
        for below in listed(ObjectType.GROUP):
            yield from (f"{below}/{name}" for name in self._choices(loader, f"{group}/{below}"))


_ALONE = Lock()


@contextmanager
def _without_hydra() -> Iterator[None]:
    before, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = before


CONF = Composer()
"""Composes from the files that come with simpo alone."""


def _changed(overrides: Sequence[str]) -> DictConfig:
    """Compose from `CONF`: the choices once in a process, then the values of settings in a copy.

    Hydra needs 0.15 s for the choices. It sets values after all of them too.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if any(one.is_sweep_override() or one.key_or_group.startswith("hydra") for one in parsed):
        return CONF._composed(overrides)
    choices = tuple(str(one.input_line) for one in parsed if not _sets_value(one))
    config = deepcopy(_chosen(choices, _state_of_files()))
    ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if _sets_value(o)], config)
    return config


def _sets_value(override: Override) -> bool:
    """Whether it chooses no file: the name of a group does, or one not known, with any value but a
    mapping.
    """
    section, dot, _ = override.key_or_group.partition(".")
    chooses = section in GROUPS and not dot and not isinstance(override.value(), dict)
    return section in _SETTINGS and not chooses


_SETTINGS = frozenset(item.name for item in fields(RunConfig))


@lru_cache(maxsize=32)
def _chosen(choices: tuple[str, ...], _state: object) -> DictConfig:
    return CONF._composed(choices)


def _state_of_files() -> tuple[object, ...]:
    """What the files that come with simpo and the losses of a user's module are just now."""
    paths = (path for name in ("conf", "experiments") for path in config_dir(name).rglob("*.yaml"))
    stats = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(paths))
    return *stats, *GROUPS["loss"].items()


def _fault(error: Exception) -> str:
    """One line; a key in a file that is no setting is answered as one on the command line is."""
    if isinstance(error, RecursionError):
        return "a file has itself in its defaults"
    if isinstance(error, UnicodeDecodeError):
        return f"a file is not UTF-8: {error}"
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark):
        return f"{mark.name}: line {mark.line + 1}: {error.problem}"
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        missing = str(error.missing_cfg_file)  # without a folder it is the primary config
        group, _, name = missing.rpartition("/")
        if error.options:
            return no_such_choice(group, name, error.options)
        own = f" ({OWN_LOSS})" if group.endswith("loss") else ""
        return f"its defaults name {missing}, which does not exist{own}"
    found = re.match(r"(In '.*'): (\w+) raised .*\n(.*)\n\s*full_key: (\S+)", str(error))
    if found is None:
        return first_line(error)
    place, kind, reason, key = found.groups()
    if kind != "ConfigKeyError":
        return f"{place}: {key}: {reason}"
    is_source = f"object_type={SourceConfig.__name__}" in str(error)
    base = OmegaConf.structured(SourceConfig) if is_source else CONF.compose([])
    # For a nested key, Hydra's reason has its last part only.
    if f"'{key}'" in reason and key in all_keys(base):
        section, _, name = key.rpartition(".")
        nested = f"{section.replace('.', ': {')}: {{{name}: ...{'}' * len(section.split('.'))}"
        return f"{place}: {key}: dots are for the command line (write {nested})"
    return f"{place}: {key}: {unknown_key(base, key)}"


def no_such_choice(group: str, name: str, choices: Sequence[str]) -> str:
    """The message for a choice that a group lacks."""
    known = f"choose from {', '.join(choices)}" if choices else f"{group}/ has none"
    known += f"; {OWN_LOSS}" if group == "loss" else ""
    return f"{group}: no such choice, got {name} ({known})"


def set_in_files(words: Sequence[str], keys: Sequence[str], composer: Composer) -> set[str]:
    """Which keys the files that words choose set or sweep, such as those of experiments/.

    What the file of a loss sets is that loss's default. Words that cannot be composed choose none.
    """
    parse = OverridesParser.create().parse_override
    try:
        single = [word for word in words if not parse(word).is_sweep_override()]
        composed = composer.compose(single, with_hydra=True)
        loss = composed.loss.name
        plain = CONF.compose([f"loss={loss}"] if loss in CONF.choices("loss") else [])
    except (HydraException, NotComposedError):
        return set()
    sweeper = composed.hydra.sweeper
    swept = (sweeper.get("params"), *sweeper.get("stages", ()))
    found = {key for key in keys if any(key in (settings or ()) for settings in swept)}
    select = OmegaConf.select
    return found | {key for key in keys if select(composed, key) != select(plain, key)}


def written(key: str, value: Any) -> str:
    """The override `key=value` that gives a setting a Python value.

    Args:
        value: text (in which `${...}` is read as in YAML), a number, a truth value, None, or a
            list or mapping of these.

    Raises:
        ConfigError: a value or a key of a mapping cannot be written as an override.
    """
    text = Override._get_value_element_as_str(_element(key, value))
    try:
        OverridesParser.create().parse_overrides([f"{key}={text}"])
    except HydraException as error:
        names = f"the names in {value}" if isinstance(value, Mapping | list) else "the key"
        raise ConfigError(
            [f"{key}: {names} must be plain letters, digits and _ (use a file of config_dir)"]
        ) from error
    return f"{key}={text}"


def _element(key: str, value: Any) -> Any:
    """A Python value as Hydra's parser would give it."""
    if isinstance(value, Enum):
        return _element(key, value.value)
    if isinstance(value, str | Path):
        return QuotedString(str(value), Quote.single)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Real):  # also a number of NumPy
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Mapping):
        return {str(name): _element(key, item) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [_element(key, item) for item in value]
    raise ConfigError(
        [f"{key}: must be text, a number, true or false, None, a list or a dict, got {value!r}"]
    )
