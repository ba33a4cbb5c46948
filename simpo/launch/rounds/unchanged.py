"""Whether what a phase takes from earlier ones, or from the user, is as it was. Imports no torch
before it reads models or pairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

from simpo.config.errors import ConfigError, DamagedError, DataError
from simpo.config.models import ADAPTER_FILE
from simpo.config.schema import RunConfig
from simpo.launch.rounds.phases import replies_folder, static_sources
from simpo.launch.rounds.record import anew, noted
from simpo.run.cache import files_in, sha256
from simpo.run.rounds import Kind, Phase, done_file, run_folder

CHECK = Phase(1, Kind.check)
CONTENT, REWARD_CONTENT = "sha256", "reward"
"""Keys of annotate.json and train.json: hashes of the files that a later phase reads, by name; and
of the reward that gave the scores."""
PROMPTS, STATIC, FIRST = "prompts", "static pairs", "first model"
"""Keys of check.json: hashes of all prompts, of the pairs of `rounds.static_weight`, and of the
first model."""
CARD = ("README.md", "curves.png")
"""Files of a model that decide nothing, and that judging and users write anew."""
PAIRS = ("train.jsonl", "test.jsonl")
"""The files of a round's pairs."""


def content_of_first(run: RunConfig) -> str:
    """Hash of the files of the first model, or of its commit on the hub.

    Raises:
        ConfigError: it can be loaded neither from disk nor from the hub.
    """
    from simpo.model.pretrained import model_source
    from simpo.on_policy.files import content_hash, model_content

    model, adapter = run.model, run.model.lora.adapter
    source = model_source(model, Path(run.cache_dir).expanduser())
    content = [model_content("model.path", source, model.revision)]
    if adapter:
        content.append(model_content("model.lora.adapter", adapter, None, ADAPTER_FILE))
    return content_hash(content)


def content_of_static(run: RunConfig) -> str:
    """Hash of the pairs that are mixed into those of each round: of all of which a round takes its
    share, and of the held-out ones.

    Raises:
        DataError: they cannot be read.
    """
    from simpo.data.loader import read_mixture
    from simpo.data.store import pairs_fingerprint

    mixture = read_mixture(replace(run, data=replace(run.data, sources=static_sources(run))))
    return pairs_fingerprint(chain(mixture.read, mixture.test))


def content_of_pairs(root: Path, number: int) -> dict[str, str]:
    """Hashes of the files of pairs of a round, by name."""
    folder = replies_folder(root, number)
    return _content(folder, [name for name in PAIRS if (folder / name).is_file()])


def content_of_model(root: Path, number: int) -> dict[str, str]:
    """Hashes of the files of the model of a round, by name."""
    folder = run_folder(root, number) / "model"
    return _content(folder, [name for name in files_in(folder) if name not in CARD])


def _content(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: sha256(folder / name) for name in names}


def check_inputs(run: RunConfig, root: Path, phase: Phase, model: int) -> None:
    """Check that what a phase takes from others, or from the user, is as it was.

    Args:
        model: the round whose model the phase begins with; 0: the first.

    Raises:
        ConfigError, DataError: it is not.
    """
    begun = noted(root, CHECK)
    restore = "changed under these rounds (restore {}, or start anew with run_dir=NEW)"
    if model:
        check_model(root, model)
    # Replies are compared with those of the first model, and its log-probs with theirs.
    takes_first = FIRST in begun and (phase.kind is Kind.annotate or not model)
    if takes_first and content_of_first(run) != begun[FIRST]:
        raise ConfigError([f"model.path: {run.model.path} {restore.format('it')}"])
    if phase.kind is Kind.train:
        check_pairs(root, phase.round)
        if STATIC in begun and content_of_static(run) != begun[STATIC]:
            raise DataError(f"data.sources: the pairs {restore.format('them')}")


def check_pairs(root: Path, number: int) -> None:
    """Check that the pairs of a round are as they were written.

    Raises:
        DamagedError: they are not.
    """
    phase = Phase(number, Kind.annotate)
    remedy = f"remove {done_file(root, phase)}: the same command writes both anew"
    _check_content(root, phase, replies_folder(root, number), remedy)


def check_model(root: Path, number: int) -> None:
    """Check that the model of a round is as the run that trained it saved it.

    Raises:
        DamagedError: it is not.
    """
    model, remedy = run_folder(root, number) / "model", anew(root, number)
    if not any((model / name).is_file() for name in ("config.json", ADAPTER_FILE)):
        raise DamagedError(model, "holds no model", remedy)
    _check_content(root, Phase(number, Kind.train), model, remedy)


def _check_content(root: Path, phase: Phase, folder: Path, remedy: str) -> None:
    """Check that the files that a phase left in a folder are those whose hashes it noted."""
    for name, content in noted(root, phase).get(CONTENT, {}).items():
        if not (folder / name).is_file():
            raise DamagedError(folder / name, "is missing", remedy)
        if sha256(folder / name) != content:
            raise DamagedError(folder / name, "is not as it was written", remedy)


def check_reward(run: RunConfig, root: Path, number: int, content: str) -> None:
    """Check that the replies of other rounds were scored by the reward of this one.

    Args:
        content: hash of the reward.

    Raises:
        ConfigError: they were scored by another.
    """
    for other in range(1, run.rounds.number + 2):
        before = noted(root, Phase(other, Kind.annotate)).get(REWARD_CONTENT, content)
        if other != number and before != content:
            raise ConfigError(
                [
                    f"on_policy.reward: {run.on_policy.reward} changed since the replies of round "
                    f"{other} were scored (restore it, or start anew with run_dir=NEW)"
                ]
            )
