"""Where settings are composed from: the folders conf/ and experiments/, and one of the user's."""

from __future__ import annotations

import os
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
from omegaconf import DictConfig

from simpo.config.check import register_own_losses, register_schemas
from simpo.config.errors import ConfigError, first_line
from simpo.config.inputs import config_dir
from simpo.config.renamed import renamed_config

# Where Hydra finds the group `experiments`; conf/train.yaml reads it.
os.environ["SIMPO_MENUS"] = str(config_dir("experiments").parent)
register_schemas()


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's reader of YAML files; settings with an old name get their new one."""

    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(config_path)
        group = config_path.rpartition("/")[0].replace("/", ".")
        section = "" if result.header.get("package") == "_global_" else group
        if isinstance(result.config, DictConfig):
            result.config = renamed_config(result.config, section)
        return result


# Hydra keeps a source that is there under the name of its own.
SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource


class NotComposedError(Exception):
    """What Hydra or OmegaConf says of overrides that it cannot compose, as one line."""


@dataclass(frozen=True)
class Composer:
    """What Hydra composes from.

    Attributes:
        config_dir: a folder of further choices (`--config-dir`), read beside conf/.
        config_name: the file, in one of the folders, that lists the defaults (`--config-name`).
        searchpath: an override of hydra.searchpath, in a list; empty leaves experiments/ there.

    Raises:
        ConfigError: there is no such folder.
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
        with self.loader():
            try:
                return compose(
                    self.config_name,
                    [*self.searchpath, *overrides],
                    return_hydra_config=with_hydra,
                )
            # Of any type: a group set to a number is a ValueError, to a list of them a TypeError.
            except Exception as error:
                raise NotComposedError(first_line(error)) from error

    def choices(self, group: str) -> list[str]:
        """The choices of a group, those in folders below it too; empty where there is no group."""
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
"""What comes with simpo."""
