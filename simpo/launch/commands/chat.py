"""`simpo chat`: talk to a trained model in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from simpo.config.choices import Device, Dtype
from simpo.config.errors import ConfigError, DataError
from simpo.config.models import names_a_model
from simpo.launch.run_words import no_folder, split_run_words
from simpo.run.signals import exit_on_signals

NUMBERS: dict[str, tuple[Callable[[str], float], Callable[[float], bool], str]] = {
    "temperature": (float, lambda value: 0 <= value < float("inf"), "a number, 0 or more"),
    "top_p": (float, lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "max_new_tokens": (int, lambda value: value >= 1, "a whole number, 1 or more"),
    "seed": (int, lambda value: 0 <= value < 2**63, "a whole number, 0 or more"),
}
CHOICES = {
    "dtype": tuple(choice.value for choice in Dtype),
    "device": tuple(choice.value for choice in Device),
}
KEYS: dict[str, tuple[str, ...]] = {
    "base": ("true",),
    **dict.fromkeys(("prompt", "system", *NUMBERS), ()),
    **CHOICES,
}
USAGE = """
usage: simpo chat RUN [key=value ...]

Talk to the model of a run in a terminal. It gets the token ids of training. Without a terminal,
each line of the input is a question, and the replies alone are on stdout.

  RUN                the folder of a run, a model or an adapter; a hub id, or builtin:smollm2
  base=true          show the base model's answer above each reply
  base=MODEL         the same with another model, or where the base is now: as RUN
  prompt=TEXT        print the reply to this question and end
  system=TEXT        a system prompt
  temperature=0.8    of sampling; 0 is greedy
  top_p=0.95         tokens come from the likeliest ones that sum to this probability
  max_new_tokens=512 longest reply
  seed=0             the same seed and questions give the same replies
  dtype=auto         float32, bfloat16; auto: bfloat16 on a GPU, else that of the files
  device=auto        cpu, cuda
"""


@dataclass(frozen=True)
class Words:
    """A command line. `base` is None without a base, and empty for the one that is known."""

    source: str
    base: str | None = None
    prompt: str | None = None
    system: str = ""
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 512
    seed: int = 0
    dtype: Dtype = Dtype.auto
    device: Device = Device.auto


def main(words: Sequence[str]) -> None:
    """Talk, or answer one question.

    Raises:
        ConfigError: the words cannot be used, or there is no model.
        DataError: a question cannot be asked, without a terminal.
    """
    asked = _arguments(words)
    exit_on_signals("interrupted", "stopped")
    # Imported here, so that a fault in the words is answered before torch is loaded.
    from simpo.loop.console import libraries_quiet

    with libraries_quiet():
        _talk(asked)


def _talk(asked: Words) -> None:
    from simpo.launch.conversation import Conversation, talk
    from simpo.model.generate import Sampling
    from simpo.model.talk import load_talking_model

    model = load_talking_model(asked.source, asked.base, asked.dtype, asked.device)
    sampling = Sampling(asked.temperature, asked.top_p, asked.max_new_tokens, asked.seed)
    try:
        conversation = Conversation(model, sampling, asked.system)
    except DataError as error:
        raise ConfigError([f"system: {error}"]) from error
    if asked.prompt is not None:
        conversation.ask(asked.prompt)
        return
    shown = [f"model  {model.name} ({model.dtype}, {model.device})"]
    shown += [f"base   {model.base_name}"] if model.base_name else []
    print(*shown, sep="\n", file=sys.stderr)
    talk(conversation)


def _arguments(words: Sequence[str]) -> Words:
    """
    Raises:
        ConfigError: they cannot be used; with the usage if RUN is missing.
    """
    sources, given = split_run_words(words)
    if len(sources) != 1:
        raise ConfigError([USAGE.strip().splitlines()[0]])
    source = sources[0]
    if problems := list(_problems(source, given)):
        raise ConfigError(problems)
    base = given.get("base", "false")
    known = {"false": None, "true": ""}  # also as Python and Hydra write them: base=True
    return Words(
        source,
        base=known.get(base.lower(), base),
        prompt=given.get("prompt"),
        system=given.get("system", ""),
        dtype=Dtype(given.get("dtype", "auto")),
        device=Device(given.get("device", "auto")),
        **{key: kind(given[key]) for key, (kind, _, _) in NUMBERS.items() if key in given},  # type: ignore[arg-type]
    )


def _problems(source: str, given: Mapping[str, str]) -> Iterator[str]:
    for key in given:
        if key not in KEYS:
            yield f"{key}: no such key (chat has {', '.join(KEYS)})"
    if given.get("base") == "":
        yield "base: must be true, false, or a folder or hub id, got nothing"
    if "prompt" in given and not given["prompt"].strip():
        yield "prompt: must not be empty"
    for key, (kind, fits, rule) in NUMBERS.items():
        try:
            good = key not in given or fits(kind(given[key]))
        except ValueError:
            good = False
        if not good:
            yield f"{key}: must be {rule}, got {given[key]}"
    for key, choices in CHOICES.items():
        if key in given and given[key] not in choices:
            yield f"{key}: must be one of {', '.join(choices)}, got {given[key]}"
    if not names_a_model(source):
        yield no_folder("RUN", source)


if __name__ == "__main__":
    from simpo.__main__ import main as dispatch

    dispatch(["chat", *sys.argv[1:]])
