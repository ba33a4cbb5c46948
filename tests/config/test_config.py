"""All shipped settings compose, run.yaml restores a run's settings, and run ids identify them."""

import runpy
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from simpo.config.check import check_run, load_run, run_yaml
from simpo.config.choices import WandbMode
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError
from simpo.config.flat import MAY_DIFFER, RESULT_SECTIONS, run_id, trajectory
from simpo.config.paths import config_dir
from simpo.config.schema import RunConfig
from simpo.config.trackers import WandbConfig
from simpo.loss.simpo import HingeConfig, SigmoidConfig

ROOT = Path(__file__).resolve().parents[2]
CONF, EXPERIMENTS = config_dir("conf"), config_dir("experiments")
# The one choice that is not whole by itself: its files are the user's.
NEEDS = {
    "data=jsonl": ["data.sources=[{path: builtin:demo}]"],
    "loss=mix": ["loss.parts={sigmoid: 0.8, bco: 0.2}"],
}

ALIASES = {"loss=simpo": "sigmoid", "loss=simpo_hinge": "hinge"}

CHOICES = [
    f"{path.parent.relative_to(CONF).as_posix()}={path.stem}"
    for path in sorted(CONF.rglob("*/*.yaml"))
] + [
    f"experiments={path.relative_to(EXPERIMENTS).with_suffix('').as_posix()}"
    for path in sorted(EXPERIMENTS.rglob("*.yaml"))
]

# Checkpoint and learning rate of the published recipes,
# https://github.com/princeton-nlp/SimPO (training_configs and the README's table).
PAPER = {
    "mistral_base": ("alignment-handbook/zephyr-7b-sft-full", 3e-7),
    "mistral_instruct": ("mistralai/Mistral-7B-Instruct-v0.2", 5e-7),
    "llama3_base": ("princeton-nlp/Llama-3-Base-8B-SFT", 6e-7),
    "llama3_instruct": ("meta-llama/Meta-Llama-3-8B-Instruct", 1e-6),
    "gemma2_it": ("google/gemma-2-9b-it", 8e-7),
}


def test_the_menu_is_whole():
    groups = {choice.partition("=")[0] for choice in CHOICES}
    assert groups >= {"model", "data", "loss", "benchmark", "backend", "launcher", "tracker"}
    assert len(list(CONF.glob("*.yaml"))) == 1, "only train.yaml lies beside the groups"


@pytest.mark.parametrize("choice", ["", *CHOICES])
def test_every_choice_composes(choice):
    run = compose_run([choice, *NEEDS.get(choice, [])] if choice else [])
    assert isinstance(run, RunConfig)
    check_run(run)
    group, _, name = choice.partition("=")
    if choice and group != "experiments":
        assert getattr(run, group).name == ALIASES.get(choice, name)


@pytest.mark.parametrize("model", PAPER)
def test_models_of_the_paper(model):
    run = compose_run([f"model={model}"])
    assert (run.model.path, run.train.learning_rate) == PAPER[model]
    assert run.model.lora.rank == 0
    assert run.model.gradient_checkpointing.value == "full"


def test_every_model_but_the_small_one_is_of_the_paper():
    assert {path.stem for path in (CONF / "model").glob("*.yaml")} == {*PAPER, "smollm2"}


def test_training_as_the_paper_does():
    run = compose_run(["model=mistral_base", "data=ultrafeedback"])
    assert run.train.pairs_per_step == 128
    assert run.train.epochs == 1
    assert run.train.warmup_ratio == 0.1
    assert run.train.schedule.value == "cosine"
    assert (run.data.max_length_tokens, run.data.max_prompt_tokens) == (2048, 1800)
    assert run.name == "mistral_base-ultrafeedback-sigmoid"


def test_choices_become_their_classes():
    assert type(compose_run([]).loss) is SigmoidConfig
    assert type(compose_run(["loss=hinge"]).loss) is HingeConfig
    tracker = compose_run(["tracker=wandb", "tracker.mode=offline"]).tracker
    assert isinstance(tracker, WandbConfig)
    assert tracker.mode is WandbMode.offline


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss=sigmoid", "loss.label_smoothing=0.1"],
        ["loss=hinge", "loss.beta=2.5"],
        ["tracker=wandb", "tracker.tags=[a,'1']", "tracker.entity=me"],
        ["tracker=mlflow", "tracker.tags={a b: c}", "tracker.tags.team=me"],
        ["model=gemma2_it", "data=ultrafeedback_gemma2_it"],
        ["train.learning_rate=3e-7", "train.max_steps=5", "data.compat=paper", "run_dir='007'"],
        ["data.sources=[{path: builtin:demo, weight: 2.5}, {path: a/b, subset: 'no'}]"],
    ],
    ids=" ".join,
)
def test_run_yaml_round_trip(overrides, tmp_path):
    run = compose_run(overrides)
    path = tmp_path / "run.yaml"
    path.write_text(run_yaml(run))
    loaded = load_run(path)
    assert loaded == run
    assert type(loaded.loss) is type(run.loss)
    assert type(loaded.tracker) is type(run.tracker)
    assert run_id(loaded) == run_id(run)
    # An interpolation would mean something else where the file is read.
    assert "${" not in path.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("beta: 2.0", "beta: 0.0"), "loss.beta: must be above 0"),
        (("beta: 2.0", "betaa: 2.0"), "run.yaml: Key 'betaa' not in 'SigmoidConfig'"),
        (("name: sigmoid", "name: cosine"), "run.yaml: 'cosine'"),
        (("epochs: 1", "epochs: some"), "run.yaml: Value 'some' of type 'str'"),
    ],
)
def test_a_changed_run_yaml_is_checked(change, message, tmp_path):
    path = tmp_path / "run.yaml"
    text = run_yaml(compose_run([]))
    assert change[0] in text
    path.write_text(text.replace(change[0], change[1], 1))
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        "loss.beta=2.5",
        "loss=hinge",
        "model.lora.rank=8",
        "model.revision=v2",
        "data.seed=1",
        "data.sources.0.weight=0.5",
        "train.seed=1",
        "train.tokens_per_row=2048",
        "train.max_steps=3",
    ],
)
def test_run_id_changes(change):
    assert run_id(compose_run([change])) != run_id(compose_run([]))


@pytest.mark.parametrize(
    "change",
    [
        "train.log_every=7",
        "train.eval_every=7",
        "train.checkpoint_every=7",
        "train.keep_checkpoints=7",
        "backend.device=cpu",
        "backend=fsdp",
        "output_dir=elsewhere",
        "run_dir=elsewhere/7",
        "cache_dir=elsewhere",
        "sample.num_prompts=7",
        "watch.action=stop",
        "tracker=wandb",
        "export.push_to_hub=me/mine",
    ],
)
def test_run_id_stays(change):
    assert run_id(compose_run([change])) == run_id(compose_run([]))


def test_run_id_is_the_same_in_another_process(tmp_path):
    code = (
        "from simpo.config.compose import compose_run; from simpo.config.flat import run_id; "
        "print(run_id(compose_run([])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == run_id(compose_run([]))


@pytest.mark.parametrize("choice", ALIASES)
def test_another_name_is_the_same_run(choice):
    """The same settings, so the same numbers, folder and id; settings of the group go with it."""
    named = compose_run([choice, "loss.beta=3"])
    run = compose_run([f"loss={ALIASES[choice]}", "loss.beta=3"])
    assert named == run and run_id(named) == run_id(run)


def test_trajectory_is_flat_and_holds_every_setting():
    run = compose_run(["data.sources=[{path: builtin:demo}, {path: a/b}]"])
    flat = trajectory(run)
    assert flat["data.sources[1].path"] == "a/b"
    assert flat["model.lora.rank"] == 16
    assert flat["train.schedule"] == "cosine"
    assert not any(is_dataclass(value) for value in flat.values())
    for section in RESULT_SECTIONS:
        for item in fields(getattr(run, section)):
            key = f"{section}.{item.name}"
            held = any(k == key or k.startswith((f"{key}.", f"{key}[")) for k in flat)
            assert held is (item.name not in MAY_DIFFER.get(section, ())), key


def test_composes_from_another_directory(tmp_path, monkeypatch):
    here = compose_run(["model=mistral_base", "data=ultrafeedback"])
    monkeypatch.chdir(tmp_path)
    assert compose_run(["model=mistral_base", "data=ultrafeedback"]) == here


def test_docs_are_up_to_date():
    written = runpy.run_path(str(ROOT / "docs" / "build_config_docs.py"))
    for file, text in (("PAGE", written["render"]()), ("SCHEMA", written["schema_text"]())):
        path = written[file]
        assert path.read_text(encoding="utf-8") == text, "python docs/build_config_docs.py"


def test_docs_name_every_key():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    sections = {"": RunConfig, "tracker.": WandbConfig}
    run = compose_run([])
    sections |= {f"{item.name}.": type(getattr(run, item.name)) for item in fields(run)}
    keys = [
        f"{prefix}{item.name}"
        for prefix, schema in sections.items()
        if is_dataclass(schema)
        for item in fields(schema)
        if not is_dataclass(getattr(run, item.name, None)) and item.name not in ("lora", "filter")
    ]
    keys += ["data.sources.0.weight", "model.lora.rank", "loss.label_smoothing", "tracker.mode"]
    keys += [f"data.filter.{item.name}" for item in fields(run.data.filter)]
    assert len(keys) > 50
    assert [key for key in keys if f"| `{key}` |" not in page] == []
    for choices in ("`none`, `paper`", "`cosine`, `linear`, `constant`", "`online`, `offline`"):
        assert choices in page
