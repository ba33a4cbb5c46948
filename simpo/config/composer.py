"""Composes settings with Hydra from conf/, experiments/ and a folder of the user's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from simpo.config.check import register_own_losses, register_schemas
from simpo.config.data import SourceConfig
from simpo.config.errors import ConfigError, first_line
from simpo.config.paths import config_dir
from simpo.config.renamed import renamed_config
from simpo.config.suggest import unknown_key

# Where Hydra finds the group `experiments`; conf/train.yaml reads it.
os.environ["SIMPO_MENUS"] = str(config_dir("experiments").parent)
register_schemas()


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's reader of YAML files, which also replaces old names of settings."""

    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(config_path)
        group = config_path.rpartition("/")[0].replace("/", ".")
        section = "" if result.header.get("package") == "_global_" else group
        if isinstance(result.config, DictConfig):
            result.config = renamed_config(result.config, section)
        return result


# Hydra registers sources by scheme: this one takes the place of its own.
SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource


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
        ConfigError: `config_dir` is not a folder.
    """

    config_dir: str | None = None
    config_name: str = "train"
    searchpath: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.config_dir is not None and not os.path.isdir(self.config_dir):
            raise ConfigError([f"--config-dir: no such folder, got {self.config_dir}"])

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
            with self.loader():
                return compose(
                    self.config_name,
                    [*self.searchpath, *overrides],
                    return_hydra_config=with_hydra,
                )
        # Of any type: ValueError for a group set to a number, TypeError for a list of numbers.
        except Exception as error:
            raise NotComposedError(_fault(error)) from error

    def choices(self, group: str) -> list[str]:
        """The choices of a group and of its subfolders; empty if there is no such group."""
        if not all(part.strip(".") for part in group.split("/")):
            return []
        with self.loader() as loader:
            return sorted(self._choices(loader, group))

    @contextmanager
    def loader(self) -> Iterator[ConfigLoaderImpl]:
        """Hydra's loader of the files, as the command line has it."""
        with initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
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


CONF = Composer()
"""Composes from the files that come with simpo alone."""


def _fault(error: Exception) -> str:
    """One line; a key in a file that is no setting is answered as one on the command line is."""
    found = re.match(r"(In '.*'): ConfigKeyError .*\n.*\n\s*full_key: (\S+)", str(error))
    if found is None:
        return first_line(error)
    place, key = found.groups()
    is_source = f"object_type={SourceConfig.__name__}" in str(error)
    base = OmegaConf.structured(SourceConfig) if is_source else CONF.compose([])
    return f"{place}: {key}: {unknown_key(base, key)}"
