# ruff: noqa: E501
"""Imports between modules go down only, and what is meant to be light stays so."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "simpo"

# A module may import those in lines above its own, never beside or below.
ORDER = """
config.errors
config.choices config.launchers config.losses
data.hub data.pairs data.demo.topics data.plan data.rules run.tables
config.backends config.inputs run.files run.sealed run.signals
config.schema
config.check
config
config.compose
config.explain
compose data.demo.records data.records data.packing model.adapters model.attention model.head loss run.best loop.optim
run.slurm model.smollm2 loop.tracker loop.watch
data.sources data.template run.processes
data.mixture data.paper model.load
data.chat backend.base model.cost model.check
data.checks data.tokens
data.loader backend.fsdp backend.zero
backend
loop.checkpoint loop.console loop.reference model.generate loop.step
run.folder
loop.card
loop.upload
model.export loop.history
loop.setup
loop.evaluate
on_policy.files run.runs stages train
compare member on_policy.draw on_policy.score published rank
annotate generate launcher page preview
report
"""
FLOOR = {name: floor for floor, line in enumerate(ORDER.split("\n")) for name in line.split()}

HEAVY = {"transformers", "accelerate", "peft", "datasets", "hydra", "wandb"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" or path.parent.name in ("backend", "config")
}


def imported(nodes) -> set[str]:
    """Full names of what import statements name, `from a import b` as a.b."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def everywhere(tree: ast.Module) -> set[str]:
    return imported(ast.walk(tree))


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def of_ours(names: set[str]) -> set[str]:
    """Our modules among full names, each by its longest part that is a module."""
    found: set[str] = set()
    for name in names:
        if packages({name}) == {"simpo"}:
            parts = name.split(".")[1:]
            heads = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
            found.add(next(head for head in heads if head in MODULES))
    return found


def test_every_module_has_a_floor():
    assert set(MODULES) == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    # Down only leaves no way back up, so there is no circle either.
    upward = [
        other for other in of_ours(everywhere(MODULES[module])) if FLOOR[other] >= FLOOR[module]
    ]
    assert upward == []


@pytest.mark.parametrize(
    "module",
    [
        "loss",
        "model.head",
        "data.pairs",
        "loop.optim",
        "data.packing",
        "data.plan",
        "data.records",
        "loop.watch",
    ],
)
def test_the_mathematics_knows_no_framework(module):
    assert packages(everywhere(MODULES[module])) & HEAVY == set()


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        ("accelerate", {"backend.base", "backend.fsdp", "backend.zero"}),
        ("deepspeed", {"backend.zero"}),
        ("submitit", {"member", "run.processes", "run.slurm"}),
        ("plotly", {"page"}),
        ("wandb", {"loop.tracker"}),
        ("peft", {"model.adapters"}),
        ("hydra", {"config.check", "config.explain", "config.compose", "train"}),
        (
            "omegaconf",
            {
                *("config.inputs", "config.losses", "config.schema", "config.check"),
                *("compose", "config.explain", "config.compose", "published", "train"),
            },
        ),
    ],
)
def test_one_place_for_each_framework(package, modules):
    assert {
        name for name, tree in MODULES.items() if package in packages(everywhere(tree))
    } == modules


@pytest.mark.parametrize("module", ["config.schema", "config.check", "config", "compose", "train"])
def test_settings_are_read_without_torch(module):
    heavy = {"torch", "transformers", "datasets", "accelerate", "peft", "wandb", "numpy"}
    assert packages(imported(MODULES[module].body)) & heavy == set()


def test_the_command_starts_without_torch():
    code = (
        "import sys, simpo.train\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stdout == "[]\n"


def test_launcher_and_report_do_without_torch():
    """They run on login nodes, and answer at once."""
    code = "import sys, simpo.launcher, simpo.page\nprint('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stdout == "False\n"
