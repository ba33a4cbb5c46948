"""README and docs say what is so: commands can be typed, links lead somewhere, names are there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from simpo.config.compose import run_of_words
from simpo.config.explain import explain
from simpo.config.losses import LOSSES
from simpo.data.demo.records import demo_records
from simpo.launch.commands import chat, export, plan, preview, report

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# Its blocks are run by test_extending.py, with the files that they want.
EXTENDING = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:\s]+)\)")
NAMED_FILE = re.compile(r"`((?:simpo|tests|conf|docs|examples|benchmarks|hydra_plugins)/[\w./]+)`")
COMMAND = re.compile(
    r"(?:python -m simpo[. ]|simpo[- ])"
    r"(train|preview|plan|report|generate|annotate|export|chat)\b(.*)"
)
# What stands for something of the reader's.
PLACEHOLDERS = {"RUN": "run", "S": "7", "DIR": "run"}


def commands() -> list[str]:
    """Command and words, as a page shows them: a line of a block, or between backquotes."""
    found = []
    run_elsewhere = EXTENDING.read_text(encoding="utf-8")
    for page in PAGES:
        text = re.sub(r"\\\n +", "", page.read_text(encoding="utf-8"))
        lines = [line.strip() for line in text.splitlines() if line[:4] == " " * 4]
        if page != EXTENDING:
            lines += [line for block in BLOCK.findall(text) for line in block.splitlines()]
        # Two blanks come before what a line says about its command.
        shown = [re.sub(r"^srun (--\S+ )+", "", line).split("  ")[0] for line in lines]
        shown += [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", text)]
        lines = [m[1] + m[2] for line in shown if (m := COMMAND.match(line))]
        found += [line for line in lines if page == EXTENDING or line not in run_elsewhere]
    return list(dict.fromkeys(found))


def test_the_pages_show_commands() -> None:
    assert {line.split()[0] for line in commands()} == {
        *("train", "preview", "plan", "report", "generate", "annotate", "export", "chat")
    }


@pytest.mark.parametrize("line", commands())
def test_a_command_composes(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder where the files and runs lie that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    # Behind --help come sections, of which test_commands.py knows.
    command, *words = shlex.split(line.partition("--help")[0])
    words = [re.sub(r"(?<=[=/ ])[A-Z]+\b|^[A-Z]+$", _example, word) for word in words]
    words = [word for word in words if "..." not in word and word not in ("--cfg", "job")]
    for pattern in re.findall(r"[\w/*]+\.jsonl", " ".join(words)):
        name = pattern.replace("*", "a")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(demo_records(0, "train")[0]) + "\n")
    (tmp_path / "run").mkdir()
    if command == "export":
        if words:
            export._arguments(words)
    elif command == "chat":
        chat._arguments(words)
    elif command == "report":
        report._arguments([*[w for w in words if "=" in w], "run"])
    elif words[:1] == ["-m"]:
        assert explain(words[1:], multirun=True) == []
    else:
        own = {"preview": preview.KEYS, "plan": plan.KEYS}.get(command, ())
        run_of_words([word for word in words if word.partition("=")[0] not in own])


def _example(match: re.Match[str]) -> str:
    return PLACEHOLDERS.get(match[0], match[0])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    places = [page.parent / link for link in LINK.findall(text)]
    places += [
        ROOT / name for name in NAMED_FILE.findall(text) if page != EXTENDING and "NAME" not in name
    ]
    assert [str(place) for place in places if not place.exists()] == []


def test_the_readme_leads_to_every_page() -> None:
    linked = {(ROOT / link).resolve() for link in LINK.findall(README.read_text(encoding="utf-8"))}
    assert {*PAGES} - {README} <= linked


def test_lines_of_the_readme_are_short() -> None:
    assert [
        line for line in README.read_text(encoding="utf-8").splitlines() if len(line) > 100
    ] == []


def test_every_loss_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    table = page[: page.index("\n\n- ")].splitlines()
    lines = {name: line for line in table for name in re.findall(r"`(\w+)`", line)}
    for name, kind in LOSSES.items():
        loss, line = kind(), lines[name]
        if name == "mix":  # what it needs depends on its parts
            continue
        assert f"| {loss.sft_weight:g} | {'yes' if loss.needs_reference else 'no'} |" in line
        assert name == "sft" or f"`{loss.terms()[0]}`" in line


def test_the_tour_names_what_is_there() -> None:
    tour = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for file, name in (stops := re.findall(r"`(simpo/[\w/]+\.py)`:\s+`(\w+)`", tour)):
        code = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *(def|class) {name}\b", code, re.MULTILINE), f"{file}: {name}"
    assert len(stops) > 20
    folders = {path.parent.name for path in ROOT.glob("simpo/*/__init__.py")}
    assert {name for name in folders if f"`{name}/`" not in tour} == set()
