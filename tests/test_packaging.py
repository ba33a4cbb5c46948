"""The wheel is complete and works in an environment with its dependencies only."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.small_hub import COMMIT, small_hub

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = (
    *("wandb", "trackio", "tensorboard", "mlflow", "submitit", "deepspeed", "bitsandbytes"),
    *("flash_attn", "vllm", "trl", "optuna"),
)

COMMANDS = """
import json, sys
from simpo.__main__ import main
for words in map(json.loads, sys.argv[1:]):
    main(words)
    print("END")
"""
"""A program that runs the commands of `simpo` that it is given, each as a list in JSON."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; dependencies are seen, this checkout and extras are not."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel],
        check=True,
    )
    (site,) = folder.glob("lib/python*/site-packages")
    # A path named in a .pth file is searched, but the .pth files in it (the editable install of
    # this checkout) are not read. The dependencies may lie in several such folders.
    installed = [sysconfig.get_path("purelib"), *sys.path]
    dependencies = [path for path in installed if Path(path).name.endswith("-packages")]
    (site / "dependencies.pth").write_text("\n".join(dict.fromkeys(dependencies)) + "\n")
    blocked = "\n".join(f"sys.modules[{name!r}] = None" for name in OPTIONAL)
    (site / "sitecustomize.py").write_text(f"import sys\n{blocked}\n")
    return folder


def test_wheel_carries_every_menu_and_template(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("conf", "experiments", "simpo/data/templates"):
        for file in (ROOT / folder).rglob("*.*"):
            inside = f"simpo/{file.relative_to(ROOT)}".replace("simpo/simpo/", "simpo/")
            assert inside in names
    assert {"hydra_plugins/simpo_launcher.py", "hydra_plugins/simpo_sweepers.py"} <= names
    read = {
        "simpo/previewing/page.html.jinja",
        "simpo/report/page.html.jinja",
        "simpo/report/content.html.jinja",
        "simpo/report/waiting.html.jinja",
        "simpo/report/page.css",
        "simpo/report/page.js",
        "simpo/report/published.yaml",
    }
    assert read <= names


@pytest.mark.process
def test_works_from_an_empty_folder(
    clean_venv: Path, tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    empty = tmp_path_factory.mktemp("empty")

    def run(*command: str, **variables: str) -> str:
        result = subprocess.run(
            [str(clean_venv / "bin" / command[0]), *command[1:]],
            cwd=empty,
            env=os.environ | {"PYTHONPATH": ""} | variables,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    where = run("python", "-c", "import simpo; print(simpo.__file__)")
    assert str(clean_venv) in where
    assert "path: builtin:smollm2" in run("simpo-train", "--cfg", "job")
    assert "group=choice" in run("simpo-train", "--help")
    assert "on_policy.*" in run("simpo-generate", "--help") + run("simpo-annotate", "--help")
    assert "assistant" in run("simpo-preview", *tiny_run, "pairs=1", "cleaning=none")
    shown = run("python", "-m", "simpo.train", "experiments=demo_full", "--cfg", "job")
    assert "rank: 0" in shown
    assert list(empty.iterdir()) == []
    # A sweep of one: the launcher is found, too. It trains an adapter.
    sweep = ("output_dir=outputs", "model.lora.rank=2", "loss.beta=choice(2)")
    run("simpo-train", "-m", *tiny_run, *sweep)
    (member,) = (empty / "outputs" / "sweeps").glob("*/*")
    folder = str(member.relative_to(empty))
    assert (member / "model" / "adapter_model.safetensors").is_file()
    assert "| accuracy |" in run("simpo-report", "outputs")
    assert (empty / "outputs" / "report.html").is_file()
    # Talked to beside its base, merged, and uploaded: in one process, which imports torch once.
    merged = f"{folder}/model-merged"
    commands = [
        ["chat", folder, "prompt=Hi", "base=true", "max_new_tokens=8"],
        ["export", folder, "merge=true"],
        ["export", merged, "push_to_hub=me/model"],
    ]
    with small_hub() as hub:
        reach = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none"}
        told = run("python", "-c", COMMANDS, *map(json.dumps, commands), **reach)
    said, wrote, pushed = told.split("END\n")[:-1]
    assert said.startswith("[base]\n") and "\n[trained]\n" in said
    assert wrote == f"model  {merged}\n"
    assert pushed == f"hub    {hub.address}/me/model/commit/{COMMIT}\n"
    assert "simpo chat RUN" in run("simpo-chat", "--help")
    assert "simpo export RUN" in run("simpo-export", "--help")
    files = {path.name: path.read_bytes() for path in (empty / merged).iterdir()}
    files["README.md"] = files["README.md"].replace(b"OWNER/NAME", b"me/model")
    assert hub.files == {"me/model": files} and hub.private == {"me/model": True}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files.keys()


def locked() -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of each package of the lock, by name."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        pin, *hashes = line.split()
        name, version = pin.split("==")
        found[re.sub(r"[-_.]+", "-", name).lower()] = version, hashes
    return found


def test_lock_pins_every_dependency_of_the_project_and_its_tests() -> None:
    """By version and hashes; torch, whose build is the machine's, is installed before it."""
    pinned = {name: version for name, (version, _) in locked().items()}
    assert "torch" not in pinned
    assert "TORCH := torch==2.13.0\n" in (ROOT / "Makefile").read_text()
    pinned["torch"] = "2.13.0"
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[requirement.name], prereleases=True), text


def test_lock_has_hashes_and_names_no_host() -> None:
    for name, (_, hashes) in locked().items():
        assert hashes, name
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", text) for text in hashes), name
    assert "/" not in (ROOT / "requirements.lock").read_text()


def test_lock_is_whole() -> None:
    """What a locked package needs is locked too, in a version that it admits: pip is told to
    install the lock alone, without a look at what it needs.
    """
    versions = {name: version for name, (version, _) in locked().items()}
    versions["torch"] = distribution("torch").version
    lacking = set()
    for name in versions:
        for text in distribution(name).requires or []:
            needed = Requirement(text)
            wanted = needed.marker is None or needed.marker.evaluate({"extra": ""})
            plain = re.sub(r"[-_.]+", "-", needed.name).lower()
            there = versions.get(plain)
            if wanted and (there is None or not needed.specifier.contains(there, prereleases=True)):
                lacking.add(f"{name} needs {needed}, not {there}")
    assert lacking == set()


def test_conda_users_get_the_same_versions() -> None:
    text = (ROOT / "environment.yml").read_text()
    assert "python=3.11" in text and "make install" in text


def test_extras() -> None:
    assert set(PROJECT["optional-dependencies"]) == {
        "gpu",
        "deepspeed",
        "wandb",
        "trackio",
        "tensorboard",
        "mlflow",
        "slurm",
        "optuna",
        "judge",
        "vllm",
        "site",
        "bench",
        "dev",
    }
    assert PROJECT["requires-python"] == ">=3.10"
