"""Folders import from lower floors only, and light modules import nothing heavy.

`python tests/test_imports.py` prints the folders by floor with their imports.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "simpo"

# A folder, or a module that lies beside the folders, may import those in lines above its own.
FLOORS = """
loss
config
run
data
model report
backend
loop
on_policy previewing
judging
launch
__main__
"""
FLOOR = {name: floor for floor, line in enumerate(FLOORS.split("\n")) for name in line.split()}

STARTED = "if __name__ == '__main__':"
TRACKERS = {"wandb", "trackio", "tensorboard", "mlflow"}
HEAVY = {"transformers", "accelerate", "peft", "datasets", "hydra", *TRACKERS}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def imported(nodes: Iterable[ast.AST]) -> set[str]:
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
    """What a module imports; not where it is started as a command, which is another way in."""
    used = [part for part in tree.body if ast.unparse(part).partition("\n")[0] != STARTED]
    return imported(node for part in used for node in ast.walk(part))


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


def folder(module: str) -> str:
    return module.partition(".")[0]


IMPORTS = {module: of_ours(everywhere(tree)) for module, tree in MODULES.items()}


def arrows() -> Iterator[tuple[str, str]]:
    """Which folder imports which other."""
    pairs = {(folder(a), folder(b)) for a, others in IMPORTS.items() for b in others}
    return iter(sorted((a, b) for a, b in pairs if a != b))


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, in its order; empty where there is none."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := search(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := search(name, []))), [])


def test_every_folder_has_a_floor() -> None:
    assert {folder(module) for module in MODULES} == set(FLOOR)


def test_few_entries_at_the_top() -> None:
    shown = {path.name for path in PACKAGE.iterdir() if path.suffix != ".pyc"}
    assert len(shown - {"__init__.py", "__pycache__", "py.typed"}) <= 13


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    above = FLOOR[folder(module)]
    upward = {
        other
        for other in IMPORTS[module]
        if folder(other) != folder(module) and FLOOR[folder(other)] >= above
    }
    assert upward == set()


@pytest.mark.parametrize("name", FLOOR)
def test_no_circle_inside_a_folder(name: str) -> None:
    inside = [module for module in MODULES if folder(module) == name]
    assert circle({module: IMPORTS[module] & set(inside) for module in inside}) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module: str) -> None:
    tree = MODULES[module]
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (module, node.name) != ("loop.train", "train")
    }
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}
    assert max((getattr(node, "end_lineno", 0) for node in ast.walk(tree)), default=0) <= 400


@pytest.mark.parametrize(
    "module",
    [
        *(
            "loss",
            "loss.simpo",
            "loss.with_reference",
            "loss.without_reference",
            "data.pairs",
            "data.packing",
            "data.plan",
            "data.reading.records",
        ),
        *("loop.optim", "loop.watch", "model.head"),
    ],
)
def test_the_mathematics_knows_no_framework(module: str) -> None:
    assert packages(everywhere(MODULES[module])) & HEAVY == set()


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        ("accelerate", {"backend.base", "backend.fsdp", "backend.zero"}),
        ("deepspeed", {"backend.zero"}),
        ("submitit", {"launch.member", "launch.submit", "run.processes"}),
        ("plotly", {"report.page"}),
        ("wandb", {"loop.sinks"}),
        ("trackio", {"loop.sinks"}),
        ("mlflow", {"loop.sinks"}),
        ("peft", {"model.adapters"}),
        (
            "hydra",
            {
                *("config.alike", "config.check", "config.composer", "config.explain"),
                *("launch.commands.train", "launch.completion"),
            },
        ),
        (
            "omegaconf",
            {
                *("loss", "config.data", "config.models", "config.schema", "config.check"),
                *("config.compose", "config.composer", "config.explain", "config.suggest"),
                *("config.meanings", "config.renamed", "config.json_schema", "config.trackers"),
                *("config.alike", "config.plain"),
                *("launch.commands.train", "launch.completion", "report.published"),
            },
        ),
    ],
)
def test_one_place_for_each_framework(package: str, modules: set[str]) -> None:
    assert {
        name for name, tree in MODULES.items() if package in packages(everywhere(tree))
    } == modules


@pytest.mark.parametrize(
    "module",
    [name for name in MODULES if folder(name) in ("loss", "config", "run", "report")],
)
def test_settings_folders_and_reports_do_without_torch(module: str) -> None:
    heavy = {"torch", "transformers", "datasets", "accelerate", "peft", "numpy", *TRACKERS}
    assert packages(imported(MODULES[module].body)) & heavy == set()


@pytest.mark.parametrize(
    "module",
    [
        *("simpo.launch.commands.train", "simpo.launch.sweep"),
        *("simpo.report.page", "simpo.__main__", "simpo.launch.api"),
    ],
)
def test_commands_start_without_torch(module: str) -> None:
    """They answer at once, also on login nodes."""
    code = (
        f"import sys, {module}\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stdout == "[]\n"


@pytest.mark.process
def test_a_run_imports_only_what_it_uses(tiny_run: list[str]) -> None:
    """Without LoRA neither peft nor what it takes along; with LoRA no library of quantisation."""
    code = (
        "import sys\n"
        "from simpo.launch.commands.train import main\n"
        "heavy = {'peft', 'bitsandbytes', 'deepspeed', 'datasets', 'pandas', 'pyarrow',\n"
        "         'sklearn', 'scipy', 'trl', 'plotly', 'submitit',\n"
        "         'wandb', 'trackio', 'tensorboard', 'mlflow',\n"
        "         'matplotlib.pyplot', 'transformers.trainer', 'torch._inductor.compile_fx'}\n"
        "def used(*more):\n"
        "    main([*words, *more])\n"
        "    loaded = {name for name, module in sys.modules.items() if module}\n"
        "    print('USED', *sorted(heavy & loaded))\n"
        "words = [*sys.argv[1:], 'train.max_steps=2']\n"
        "used()\n"
        "used('model.lora.rank=2')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *tiny_run], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stdout.splitlines() if line.startswith("USED")]
    assert shown == ["USED", "USED peft"]


def print_house() -> None:
    for line in reversed(FLOORS.split("\n")[1:-1]):
        print(f"{FLOOR[line.split()[0]]}  {line}")
    print()
    for name in FLOOR:
        print(f"{name:10} imports  {' '.join(b for a, b in arrows() if a == name)}")
    print(f"\n{len(FLOOR)} rooms, {len(set(FLOOR.values()))} floors, {len(list(arrows()))} arrows")


if __name__ == "__main__":
    print_house()
