"""Every command that README and docs show is one that can be typed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from simpo.config.compose import run_of_words
from simpo.config.explain import explain
from simpo.data.demo.records import demo_records
from simpo.launch.commands import export, report

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(
    r"(?:python -m simpo[. ]|simpo[- ])(train|preview|report|generate|annotate|export)\b(.*)"
)
# What stands for something of the reader's.
PLACEHOLDERS = {"RUN": "run", "S": "7", "DIR": "run"}


def commands() -> list[str]:
    """Command and words, as a page shows them: a line of a block, or between backquotes."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n +", "", page.read_text(encoding="utf-8"))
        # Two blanks come before what a line says about its command.
        shown = [line.strip().split("  ")[0] for line in text.splitlines() if line[:4] == " " * 4]
        shown += [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", text)]
        found += [m[1] + m[2] for line in shown if (m := COMMAND.match(line))]
    return list(dict.fromkeys(found))


def test_the_pages_show_commands() -> None:
    assert {line.split()[0] for line in commands()} == {
        *("train", "preview", "report", "generate", "annotate", "export")
    }


@pytest.mark.parametrize("line", commands())
def test_a_command_composes(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder where the files and runs lie that it names."""
    monkeypatch.chdir(tmp_path)
    command, *words = shlex.split(line)
    words = [re.sub(r"(?<=[=/ ])[A-Z]+\b|^[A-Z]+$", _example, word) for word in words]
    words = [word for word in words if "..." not in word and word not in ("--help", "--cfg", "job")]
    for name in re.findall(r"[\w/]+\.jsonl", " ".join(words)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(demo_records(0, "train")[0]) + "\n")
    (tmp_path / "run").mkdir()
    if command == "export":
        if words:
            export._arguments(words)
    elif command == "report":
        report._arguments([*[w for w in words if "=" in w], "run"])
    elif words[:1] == ["-m"]:
        assert explain(words[1:], multirun=True) == []
    else:
        own = ("pairs", "html") if command == "preview" else ()
        run_of_words([word for word in words if word.partition("=")[0] not in own])


def _example(match: re.Match[str]) -> str:
    return PLACEHOLDERS.get(match[0], match[0])
