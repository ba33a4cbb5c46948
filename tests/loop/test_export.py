"""The end of a run saves and uploads the model, and loses no work if something fails.

The upload goes to a local stand-in for the hub.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.__main__ import main
from simpo.config.choices import Dtype
from simpo.config.compose import compose_run
from simpo.config.data import SourceConfig
from simpo.config.errors import ConfigError, RunError, SimpoError
from simpo.config.models import ModelConfig
from simpo.data.chats.chat import Chat
from simpo.launch.commands.export import USAGE
from simpo.loop.card import draw_curves, write_card, write_merged_card
from simpo.loop.console import Results, end_lines
from simpo.loop.train import train
from simpo.model.export import save_model
from simpo.model.merge import merge
from simpo.model.policy import Policy
from simpo.model.tokenizer import load_tokenizer
from simpo.run.folder import RunFolder
from simpo.run.tables import markdown_table, result_lines
from tests.support.whole_runs import run_command

TOKEN = "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"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Calls that would have gone to the hub, which is not reachable from a test."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Commit:
        commit_url = "https://hub.example/me/model/commit/1"

    def create_repo(self: object, repo_id: str, **options: Any) -> None:
        calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def upload_folder(self: object, **options: Any) -> Commit:
        folder = Path(options["folder_path"])
        options["files"] = {p.name: p.read_bytes() for p in folder.iterdir()}
        calls.append(("upload_folder", options))
        return Commit()

    def whoami(self: object) -> dict[str, Any]:
        return {"name": "me", "auth": {"accessToken": {"role": "write"}}}

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", whoami)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return calls


@pytest.mark.parametrize(("extra", "private"), [([], True), (["export.private=false"], False)])
def test_push_to_hub(
    extra: list[str],
    private: bool,
    hub: list[tuple[str, dict[str, Any]]],
    tiny_run: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    train(compose_run([*tiny_run, "export.push_to_hub=me/model", *extra, f"run_dir={folder}"]))
    (create, made), (upload, sent) = hub
    assert (create, upload) == ("create_repo", "upload_folder")
    assert made["repo_id"] == sent["repo_id"] == "me/model"
    assert made["private"] is private
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "curves.png"} <= set(
        sent["files"]
    )
    assert "https://hub.example/me/model/commit/1" in capsys.readouterr().out
    for file in folder.rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file


def test_nothing_is_uploaded_unless_asked_for(
    hub: list[tuple[str, dict[str, Any]]], tiny_run: list[str]
) -> None:
    train(compose_run(tiny_run))
    assert hub == []


def test_markdown_table() -> None:
    rows: list[dict[str, Any]] = [{"a": 1, "b": {"x": 2}}, {"a": 22, "b": 0}]
    assert markdown_table(rows) == [
        "| a  | b    |",
        "|----|------|",
        "| 1  | x: 2 |",
        "| 22 | 0    |",
    ]


def merged_by_hand(base: str, adapter: Path) -> Any:
    """W + scale * B A for each layer, from the files alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    for name, low in weights.items():
        if name.endswith("lora_A.weight"):
            high = weights[name.replace("lora_A", "lora_B")]
            layer = model.get_submodule(
                name.removeprefix("base_model.model.")[: -len(".lora_A.weight")]
            )
            layer.weight.data += (
                settings["lora_alpha"] / settings["r"] * (high.double() @ low.double())
            )
    return model


@pytest.mark.matrix
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merge(quantization: str, tiny_run: list[str], wide_folder: Path, tmp_path: Path) -> None:
    """A process of its own, against W + scale B A from the files."""
    run_dir = tmp_path / "run"
    overrides = [*tiny_run, f"model.path={wide_folder}", f"model.quantization={quantization}"]
    overrides += ["model.lora.rank=4", "train.learning_rate=1e-2", "sample.num_prompts=0"]
    overrides += [f"run_dir={run_dir}"]
    train(compose_run(overrides))
    told = run_command("simpo.export", str(run_dir), "merge=true")
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout == f"model  {run_dir}/model-merged\n"
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "model-merged")
    assert type(merged).__name__ == "LlamaForCausalLM" and merged.dtype is torch.float32
    assert not hasattr(merged.config, "quantization_config") and merged.config.use_cache
    assert merged.generation_config.eos_token_id in (2, [2])
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model-merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(wide_folder).chat_template

    ids = torch.arange(3, 60)[None]
    expected = merged_by_hand(str(wide_folder), run_dir / "model")(ids).logits
    # In float64, or the rounding of a forward would be all there is to see.
    whole = AutoModelForCausalLM.from_pretrained(run_dir / "model-merged", dtype=torch.float64)
    torch.testing.assert_close(whole(ids).logits, expected, rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(wide_folder)
    assert (base(ids).logits - merged(ids).logits).abs().max() > 0.01

    # A base that has moved, and weights of another type.
    moved = shutil.copytree(wide_folder, tmp_path / "moved")
    merge(run_dir, tmp_path / "b", Dtype.bfloat16, str(moved))
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert narrow.dtype is torch.bfloat16
    assert (narrow(ids).logits - merged(ids).logits).norm() < 0.05 * merged(ids).logits.norm()

    with pytest.raises(ConfigError) as error:
        merge(run_dir, run_dir / "model-merged", Dtype.auto, None)
    assert str(error.value) == (
        f"output: must not exist, got {run_dir}/model-merged (choose another)"
    )
    with pytest.raises(ConfigError, match=rf"^base: {tmp_path}/no cannot be loaded: .*$"):
        merge(run_dir, tmp_path / "c", Dtype.auto, f"{tmp_path}/no")
    settings = run_dir / "model/adapter_config.json"
    nameless = json.loads(settings.read_text()) | {"base_model_name_or_path": None}
    settings.write_text(json.dumps(nameless))
    with pytest.raises(ConfigError, match=r"^base: the adapter does not name it \(base=FOLDER"):
        merge(run_dir, tmp_path / "c", Dtype.auto, None)


USED = "usage: simpo export RUN (merge=true | push_to_hub=OWNER/NAME) [key=value ...]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], USED),
        (
            ["here"],
            "usage: simpo export RUN (merge=true | push_to_hub=OWNER/NAME) [key=value ...]\n",
        ),
        (
            ["here", "there", "merge=true"],
            "usage: simpo export RUN (merge=true | push_to_hub=OWNER/NAME) [key=value ...]\n",
        ),
        (["here", "merge=yes"], "merge: must be true, got yes (set it to true, or leave it out)\n"),
        (["here", "output=x"], "export: needs either merge=true or push_to_hub=OWNER/NAME\n"),
        (
            ["here", "merge=true", "push_to_hub=me/x"],
            "export: needs either merge=true or push_to_hub=OWNER/NAME\n",
        ),
        (["here", "push_to_hub=x"], "push_to_hub: must be owner/name, got x\n"),
        (
            ["here", "push_to_hub=me/x", "private=no"],
            "private: must be true or false, got no\n",
        ),
        (
            ["here", "push_to_hub=me/x"],
            "RUN: must hold a model, got here (no here/*.safetensors)\n",
        ),
        (["here", "merge=true", "mrege=1"], "mrege: no such key (export has merge, output, "),
        (["here", "merge=true", "dtype=fp8"], "dtype: must be one of auto, float32, bfloat16, got"),
        (["nowhere", "merge=true"], "RUN: no such folder, got nowhere\n"),
        (["--merge", "merge=true"], "--merge: no such option (settings are key=value; see --help)"),
        (["sweep/loss.beta=2", "merge=true"], "RUN: no such folder, got sweep/loss.beta=2\n"),
        (["loss=ipo", "merge=true"], "RUN: must hold an adapter, got loss=ipo (no loss=ipo/adapt"),
        (["loss.beta=2", "merge=true"], "RUN: must hold an adapter, got loss.beta=2 (no loss.be"),
        (
            ["here", "merge=true"],
            "RUN: must hold an adapter, got here (no here/adapter_config.json",
        ),
    ],
    ids=str,
)
def test_merge_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("here", "loss=ipo", "loss.beta=2"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(["export", *arguments])
    assert exit.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(message) and errors.count("\n") == 1


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", "--help"])
    assert capsys.readouterr().out == USAGE.lstrip("\n")


# --- What the base brings ------------------------------------------------------------------------


def odd_base(base: Path, folder: Path, file: str, settings: dict[str, Any]) -> Path:
    """A copy of a model with other settings in one of its files."""
    shutil.copytree(base, folder)
    path = folder / file
    before = json.loads(path.read_text()) if file != "generation_config.json" else {}
    path.write_text(json.dumps(before | settings))
    return folder


def tiny_policy(folder: Path) -> tuple[Policy, Chat]:
    config = ModelConfig(name="tiny", path=str(folder))
    return Policy(AutoModelForCausalLM.from_pretrained(folder)), Chat(
        load_tokenizer(config, folder)
    )


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, ["temperature", "top_p"]),
        ({"temperature": 0.9, "top_p": 0.6, "do_sample": True}, []),
        ({"temperature": "hot", "top_k": 3}, ["temperature", "top_k"]),
        ({"length_penalty": 2.0, "repetition_penalty": 1.5}, ["length_penalty"]),
        ({"length_penalty": 2.0, "num_beams": 2}, []),
        ({"output_scores": True, "min_length": 3, "own": "x"}, ["output_scores"]),
        ({"bad_words_ids": [[7]], "no_repeat_ngram_size": 3}, []),
    ],
)
def test_generation_settings_are_the_bases(
    settings: dict[str, Any], left_out: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    """All but those that transformers would refuse, which are told."""
    base = odd_base(tiny_folder, tmp_path / "base", "generation_config.json", settings)
    policy, chat = tiny_policy(base)
    said = save_model(policy, None, chat, tmp_path / "model")
    saved = json.loads((tmp_path / "model/generation_config.json").read_text())
    del saved["transformers_version"]
    kept = {key: value for key, value in settings.items() if key not in left_out}
    assert saved == kept | {"eos_token_id": [2], "pad_token_id": 0}
    told = (
        f"note   generation_config.json is saved without {', '.join(left_out)}, which "
        "transformers refuses with the base model's other settings"
    )
    assert said == ([told] if left_out else [])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config


@pytest.mark.parametrize("rank", [0, 4])
def test_settings_without_sampling_are_no_end(
    rank: int,
    tiny_run: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A whole run, and the merge of its adapter."""
    settings = {"temperature": 0.9, "top_p": 0.6}
    base = odd_base(tiny_folder, tmp_path / "base", "generation_config.json", settings)
    more = [f"model.path={base}", f"model.lora.rank={rank}", f"run_dir={tmp_path}/run"]
    train(compose_run([*tiny_run, *more, "train.max_steps=2"]))
    model, note = tmp_path / "run/model", "saved without temperature, top_p, which"
    assert (note in capsys.readouterr().out) is (rank == 0)
    if rank:
        assert not (model / "generation_config.json").exists()
        model = tmp_path / "merged"
        said = merge(tmp_path / "run", model, Dtype.auto, None)
        assert note in said[0] and said[1:] == [f"model  {model}"]
    saved = json.loads((model / "generation_config.json").read_text())
    assert "temperature" not in saved and saved["eos_token_id"] == [2]


def test_a_tokenizer_is_exported_as_it_was_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    given = {"model_max_length": 131072, "truncation_side": "right", "padding_side": "left"}
    base = odd_base(tiny_folder, tmp_path / "base", "tokenizer_config.json", given)
    save_model(*tiny_policy(base)[:1], None, tiny_policy(base)[1], tmp_path / "model")
    before, after = (
        json.loads((folder / "tokenizer_config.json").read_text())
        for folder in (base, tmp_path / "model")
    )
    assert after == before
    assert {file.stat().st_mode for file in (tmp_path / "model").iterdir()} == {
        (base / "config.json").stat().st_mode
    }


def test_a_tokenizer_without_eos_and_pad(
    tiny_run: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    """Its template says what ends a response; a reply ends there, in the export too."""
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    for name, keys in {
        "tokenizer_config.json": ("eos_token", "pad_token"),
        "config.json": ("eos_token_id", "pad_token_id"),
    }.items():
        settings = json.loads((base / name).read_text())
        for key in keys:
            del settings[key]
        (base / name).write_text(json.dumps(settings))
    more = [f"model.path={base}", f"run_dir={tmp_path}/run", "train.max_steps=2"]
    train(compose_run([*tiny_run, *more]))
    saved = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert saved["eos_token_id"] == [2] and "pad_token_id" not in saved


@pytest.mark.parametrize(
    ("file", "settings", "reason"),
    [
        (
            "generation_config.json",
            {"max_new_tokens": "9"},
            "TypeError: '<=' not supported between instances of 'str' and 'int'",
        ),
        (
            "generation_config.json",
            {"watermarking_config": "x"},
            "AttributeError: 'str' object has no attribute 'validate'",
        ),
        (
            "config.json",
            {"use_cache": "x"},
            "StrictDataclassFieldValidationError: Validation error for field 'use_cache': "
            "TypeError: Field 'use_cache' expected bool, got str (value: 'x')",
        ),
    ],
)
def test_settings_that_transformers_cannot_read(
    file: str,
    settings: dict[str, Any],
    reason: str,
    tiny_run: list[str],
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    base = odd_base(tiny_folder, tmp_path / "base", file, settings)
    message = refused(tiny_run, f"model.path={base}", f"run_dir={tmp_path}/run")
    assert message.startswith("model.") and message.endswith(f": {base} cannot be loaded: {reason}")
    assert "\n" not in message


# --- Before the first step -----------------------------------------------------------------------


def failure(kind: type[SimpoError], overrides: list[str]) -> str:
    """What a run ends with, of which nothing is left then but its folder."""
    with pytest.raises(kind) as error:
        train(compose_run(overrides))
    message = str(error.value)
    del error  # it holds the frames that hold the folder's lock
    gc.collect()
    return message


def refused(overrides: list[str], *more: str) -> str:
    return failure(ConfigError, [*overrides, *more])


def test_what_cannot_be_saved_is_refused_first(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer, a config, a card: whatever raises at the end raises before the first step."""
    overrides = [*tiny_run, f"run_dir={tmp_path}/run"]

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no\nway")

    for place in (
        "transformers.PreTrainedTokenizerBase.save_pretrained",
        "transformers.LlamaForCausalLM.save_pretrained",
        "simpo.loop.publish.write_card",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, refuse)
            message = refused(overrides)
        assert message == "model.path: a trained model cannot be saved: no (mend it)"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        *("run.yaml", "command.txt", "data.json", "environment.json", "git.diff", "lock")
    }


def test_room_is_asked_for_first(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full run takes its weights, and thrice as much for a checkpoint, unless one is there."""
    free = 2**40
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    overrides = [*tiny_run, f"run_dir={tmp_path}/run", "train.max_steps=2"]
    num_bytes = 40_096 * 4
    free = 4 * num_bytes - 1
    assert refused(overrides) == (
        "run_dir: the model and a checkpoint take 0.00 GiB, but "
        f"{tmp_path}/run has 0.00 GiB free (make room, or choose another output_dir)"
    )
    free += 1
    with monkeypatch.context() as patch:
        patch.setattr("simpo.loop.save.save_model", failing_at_the_end(save_model))
        failure(RunError, overrides)
    free = num_bytes - 1
    assert refused(overrides).startswith("run_dir: the model and a checkpoint take")
    free += 1
    train(compose_run(overrides))


def failing_at_the_end(save: Any) -> Any:
    """Save settings as ever; with weights, run out of disk in the middle."""

    def save_or_fail(policy: Policy, weights: Any, chat: Chat, folder: Path, *rest: Any) -> Any:
        if folder.name != "model":
            return save(policy, weights, chat, folder, *rest)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(policy.model), "save_pretrained", full)
            return save(policy, weights, chat, folder, *rest)

    return save_or_fail


def full(self: object, folder: Path, **_: object) -> None:
    """As safetensors tells of a full disk, which is no OSError there."""
    folder.mkdir()
    (folder / "config.json").write_text("{")
    raise SafetensorError("I/O error: No space left on device (os error 28)")


# --- Failures at the end -------------------------------------------------------------------------


def steps_of(run_dir: Path) -> list[int]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


def status_of(run_dir: Path) -> str:
    return str(json.loads((run_dir / "status.json").read_text())["state"])


def trained_again(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Updates made from now on."""
    from simpo.loop import step as loop_step

    updates: list[int] = []
    update = loop_step.update

    def counted(*arguments: Any) -> Any:
        updates.append(1)
        return update(*arguments)

    monkeypatch.setattr(loop_step, "update", counted)
    return updates


def test_a_disk_that_is_full_at_the_end(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line; a model that was there stays; the same command writes it without training again."""
    run_dir = tmp_path / "run"
    overrides = [*tiny_run, f"run_dir={run_dir}"]
    (run_dir / "model").mkdir(parents=True)
    (run_dir / "model" / "before").touch()
    with monkeypatch.context() as patch:
        patch.setattr("simpo.loop.save.save_model", failing_at_the_end(save_model))
        message = failure(RunError, overrides)
    assert message == (
        f"{run_dir}/model: the model could not be written: I/O error: No space left on device "
        "(os error 28) (solve this and run the same command again)"
    )
    assert [path.name for path in (run_dir / "model").iterdir()] == ["before"]
    assert not list(run_dir.glob(".*"))
    assert status_of(run_dir) == "failed"
    updates = trained_again(monkeypatch)
    train(compose_run(overrides))
    assert updates == [] and steps_of(run_dir) == [1, 2, 3, 4, 5, 6]
    assert status_of(run_dir) == "finished"
    assert AutoModelForCausalLM.from_pretrained(run_dir / "model")
    assert not (run_dir / "model" / "before").exists() and not list(run_dir.glob(".*"))


@pytest.mark.parametrize("place", ["draw_curves", "write_card"])
def test_a_card_that_fails_loses_nothing(
    place: str,
    tiny_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from simpo.loop import publish

    made = getattr(publish, place)

    def fail(*arguments: Any) -> None:
        if place == "draw_curves" or (tmp_path / "run/results.json").exists():
            raise MemoryError("no memory\nat all")
        made(*arguments)

    monkeypatch.setattr(publish, place, fail)
    train(compose_run([*tiny_run, f"run_dir={tmp_path}/run"]))
    what = {"draw_curves": "curves", "write_card": "card"}[place]
    assert f"\nnote   the model has no {what}: no memory\n" in capsys.readouterr().out
    assert status_of(tmp_path / "run") == "finished"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    names = {path.name for path in (tmp_path / "run/model").iterdir()}
    assert names & {"README.md", "curves.png"} == {
        "README.md" if place == "draw_curves" else "curves.png"
    }
    if place == "draw_curves":
        assert "curves.png" not in (tmp_path / "run/model/README.md").read_text()


def test_an_upload_that_fails(
    hub: list[tuple[str, dict[str, Any]]],
    tiny_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line; the same command uploads without training again, and so does the one it names."""
    run_dir = tmp_path / "run"
    overrides = [*tiny_run, "export.push_to_hub=me/model", f"run_dir={run_dir}"]

    def fail(self: object, **_: object) -> None:
        raise ConnectionError("503 Server Error\nRequest id")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.HfApi, "upload_folder", fail)
        message = failure(RunError, overrides)
    assert message == (
        "export.push_to_hub: the upload to me/model failed: 503 Server Error (the same command "
        f"tries again: the model is in {run_dir}/model)"
    )
    assert status_of(run_dir) == "failed" and (run_dir / "results.json").exists()
    assert [name for name, _ in hub] == ["create_repo"]
    failed = (run_dir / "status.json").read_text()

    updates = trained_again(monkeypatch)
    train(compose_run(overrides))
    assert updates == [] and steps_of(run_dir) == [1, 2, 3, 4, 5, 6]
    assert status_of(run_dir) == "finished"
    assert [name for name, _ in hub[1:]] == ["create_repo", "upload_folder"]

    (run_dir / "status.json").write_text(failed)
    capsys.readouterr()
    main(["export", str(run_dir), "push_to_hub=me/other", "private=false"])
    assert capsys.readouterr().out == "hub    https://hub.example/me/model/commit/1\n"
    (_, made), (_, sent) = hub[3:]
    assert (made["repo_id"], made["private"], sent["repo_id"]) == ("me/other", False, "me/other")
    assert {"model.safetensors", "README.md", "curves.png"} <= set(sent["files"])
    assert status_of(run_dir) == "finished"


def test_results_that_cannot_be_printed(tiny_run: list[str], tmp_path: Path) -> None:
    """The reader of the output may be gone by then; all else is done."""
    words = [*tiny_run, "train.max_steps=1", "sample.num_prompts=0", f"run_dir={tmp_path}/run"]
    folder = RunFolder(compose_run(words))
    with pytest.raises(BrokenPipeError), folder.recording_failure():
        folder.write_status("finished", 1, 1)
        raise BrokenPipeError
    assert status_of(folder.path) == "finished"


OFFER = " (mend it, or upload later: python -m simpo.export RUN push_to_hub=me/model)"


def hub_error(message: str | None) -> HfHubHTTPError:
    """As huggingface_hub raises it, with an address and an id."""
    response: Any = httpx.Response(
        403, request=httpx.Request("POST", "https://hub/api/repos/create")
    )
    text = "Client error '403 Forbidden' for url 'https://hub/api/repos/create' (Request ID: 1)"
    return HfHubHTTPError(text, response=response, server_message=message)


@pytest.mark.parametrize(
    ("name", "fault", "reason"),
    [
        ("whoami", OSError("Token is required\nbut none"), "Token is required"),
        ("create_repo", OSError("403 Forbidden\nno right"), "403 Forbidden"),
        ("whoami", hub_error("You have no right"), "403 Forbidden: You have no right"),
        ("whoami", hub_error(None), "403 Forbidden"),
        ("whoami", None, "the token may only read"),
    ],
)
def test_a_hub_that_refuses_is_asked_first(
    name: str,
    fault: Exception | None,
    reason: str,
    hub: list[tuple[str, dict[str, Any]]],
    tiny_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(self: object, *_: object, **__: object) -> dict[str, Any]:
        if fault is not None:
            raise fault
        return {"auth": {"accessToken": {"role": "read"}}}

    monkeypatch.setattr(huggingface_hub.HfApi, name, answer)
    message = refused(tiny_run, "export.push_to_hub=me/model", f"run_dir={tmp_path}/run")
    assert message == (f"export.push_to_hub: nothing can be uploaded to me/model: {reason}{OFFER}")
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_without_a_network_an_upload_is_refused_first(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_OFFLINE is set in all tests."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    message = refused(tiny_run, "export.push_to_hub=me/model", f"run_dir={tmp_path}/run")
    assert message == (
        f"export.push_to_hub: nothing can be uploaded to me/model: {constants.ENDPOINT} does not "
        f"answer, or HF_HUB_OFFLINE is set{OFFER}"
    )


def test_single_replies_show_their_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pairs there is no accuracy; with them the rewards are not shown."""
    before = {"loss": 0.5, "rewards/chosen": 0.0, "rewards/rejected": 0.0, "logps/chosen": -1.0}
    after = before | {"loss": 0.25, "rewards/chosen": 0.4, "rewards/rejected": -0.6}
    lines = [
        {"held out": "loss", "before": "0.500", "after": "0.250"},
        {"held out": "reward of desirable", "before": "0.000", "after": "0.400"},
        {"held out": "reward of undesirable", "before": "0.000", "after": "-0.600"},
    ]
    assert result_lines(before, after) == lines
    pairs = {"rewards/accuracies": 1.0, "rewards/margins": 1.0}
    labels = [line["held out"] for line in result_lines(before | pairs, after | pairs)]
    assert labels == ["loss", "accuracy", "margin"]

    titles: list[list[str]] = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda figure, *_, **__: titles.append([axis.get_title() for axis in figure.axes]),
    )
    for more in ({}, pairs):
        logged = {"step": 2, **{f"eval/{key}": value for key, value in (after | more).items()}}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(logged) + "\n")
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert titles == [[line["held out"] for line in lines], labels]


def test_other_replies_than_the_run_was_begun_with(tmp_path: Path) -> None:
    """`sample.num_prompts` may differ between a run and its continuation."""
    results = Results({"loss": 0.5}, {"loss": 0.25, "reply_repetition": 0.0})
    assert result_lines(results.before, results.after) == [
        {"held out": "loss", "before": "0.500", "after": "0.250"},
        {"held out": "repetition in replies", "before": "-", "after": "0.000"},
    ]
    (tmp_path / "samples").mkdir()
    for step, count in ((0, 1), (6, 2)):
        replies = [{"prompt": "Hi", "reply": f"at {step}", "obeys": None}] * count
        (tmp_path / f"samples/step-{step:06d}.json").write_text(json.dumps(replies))
    assert end_lines(results, tmp_path, 6, 6)[4:] == [
        *("", "prompt  Hi", "before  at 0", "after   at 6", ""),
        f"model  {tmp_path}/model",
        f"chat   python -m simpo.chat {tmp_path} base=true",
    ]


def test_a_blank_line_ends_the_table_of_a_run_without_replies(tmp_path: Path) -> None:
    assert end_lines(Results({"loss": 0.5}, {"loss": 0.25}), tmp_path, 4, 6) == [
        "| held out | before | after |",
        "|----------|--------|-------|",
        "| loss     | 0.500  | 0.250 |",
        "",
        f"model  {tmp_path}/model, the best: after step 4",
        f"chat   python -m simpo.chat {tmp_path} base=true",
    ]


def test_the_rule_of_a_reply_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends of a long prompt, and the rule, in the columns there are; nothing steers them."""
    prompt = "Saturn is a giant.\n\n" + "It has many moons. " * 9 + "Answer in capitals."
    (tmp_path / "samples").mkdir()
    for step, reply in ((0, "a \x1b[2Jred\n\nplanet " + "b" * 99), (6, "RED")):
        obeys = {"obeys": step == 6, "rule": "capital letters only"}
        text = json.dumps([{"prompt": prompt, "reply": reply, **obeys}])
        (tmp_path / f"samples/step-{step:06d}.json").write_text(text)
    monkeypatch.setenv("COLUMNS", "60")
    assert end_lines(Results({}, {}), tmp_path, 6, 6) == [
        "prompt  Saturn is a giant. / It ... ons. Answer in capitals.",
        "rule    capital letters only",
        f"before  [fails] a \ufffd[2Jred / planet {'b' * 22}...",
        "after   [obeys] RED",
        "",
        f"model  {tmp_path}/model",
        f"chat   python -m simpo.chat {tmp_path} base=true",
    ]
    monkeypatch.delenv("COLUMNS")
    shown = end_lines(Results({}, {}), tmp_path, 6, 6)[0]
    assert len(shown) == 160 and shown.endswith(" moons. Answer in capitals.")


# --- The card ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_uploaded_holds_nothing_of_the_machine(
    rank: int,
    hub: list[tuple[str, dict[str, Any]]],
    tiny_run: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text((tiny_folder / "chat_template.jinja").read_text())
    overrides = [
        *tiny_run,
        *(f"model.lora.rank={rank}", f"model.chat_template={template}"),
        *("export.push_to_hub=me/model", "tracker=console", f"run_dir={tmp_path}/run"),
        *("launcher=slurm", f"launcher.setup=['export HF_TOKEN={TOKEN}']"),
    ]
    run = compose_run(overrides)
    monkeypatch.setattr(sys, "argv", ["simpo train", *overrides])
    train(run)
    sent = hub[-1][1]["files"]
    for name, content in sent.items():
        machine = (str(tmp_path), str(tiny_folder), str(Path.home()))
        for text in (TOKEN, "HF_TOKEN", *machine, "simpo.train", "slurm"):
            assert text.encode() not in content, (name, text)
    card = sent["README.md"].decode()
    assert "| train.jsonl | train | 24 " in card and "\nmodel.chat_template: own.jinja\n" in card
    assert '"me/model"' in card and "OWNER/NAME" not in card
    assert '"OWNER/NAME"' in (tmp_path / "run/model/README.md").read_text()
    header = ModelCard(card).data.to_dict()
    assert header["library_name"] == ("peft" if rank else "transformers")
    assert header.get("base_model") is None and header.get("datasets") is None
    if rank:
        note = "note   the adapter's base is a local folder; uploaded it is named "
        assert f"\n{note}{tiny_folder.name}\n" in capsys.readouterr().out
        here = json.loads((tmp_path / "run/model/adapter_config.json").read_text())
        there = json.loads(sent["adapter_config.json"])
        assert here["base_model_name_or_path"] == str(tiny_folder)
        assert there == here | {"base_model_name_or_path": tiny_folder.name}
        assert sent["adapter_model.safetensors"]
    for name in ("run.yaml", "command.txt"):
        file = tmp_path / "run" / name
        assert TOKEN in file.read_text() and file.stat().st_mode & 0o777 == 0o600


def test_a_card_names_what_lies_on_the_hub(tiny_run: list[str], tmp_path: Path) -> None:
    run = compose_run(tiny_run)
    (tmp_path / "mine").mkdir()
    paths = ["org/pairs", f"{tmp_path}/mine", "builtin:demo", "hf://datasets/me/own/a/b.jsonl"]
    run.data.sources = [SourceConfig(path=path) for path in paths]
    run.model.path, run.model.lora.rank = "org/base", 4
    mixture = [{"source": path, "split": "train"} for path in paths]
    data: dict[str, Any] = dict.fromkeys(
        ("train_fingerprint", "test_fingerprint", "template_sha256"), "0"
    )
    data |= {"mixture": mixture, "train_tokens": {"pairs": 9}, "test_tokens": {"pairs": 5}}
    (tmp_path / "data.json").write_text(json.dumps(data))
    environment = {"packages": {}, "python": "3", "device": "1 CPU", "git_commit": ""}
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    for base, name in {
        "org/base": "org/base",
        "gpt2": "gpt2",
        "builtin:smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }.items():
        run.model.path = base
        write_card(run, tmp_path, Results({}, {}), tmp_path)
        card = (tmp_path / "README.md").read_text()
        header = ModelCard(card).data
        assert header.to_dict() == {
            "library_name": "peft",
            "pipeline_tag": "text-generation",
            "base_model": name,
            "base_model_relation": "adapter",
            "datasets": ["me/own", "org/pairs"],
            "tags": ["simpo", "preference-optimization", "lora"],
            **({"license": "apache-2.0"} if base == "builtin:smollm2" else {}),
        }
        assert f"\n{name} after preference optimisation" in card
        assert str(tmp_path) not in card and "| mine " in card
        assert "| hf://datasets/me/own/a/b.jsonl |" in card
        assert f'base = AutoModelForCausalLM.from_pretrained("{name}")\n' in card


def test_a_merged_model_has_the_card_of_its_adapter(tmp_path: Path) -> None:
    adapter, output = tmp_path / "adapter", tmp_path / "merged"
    adapter.mkdir()
    output.mkdir()
    settings = adapter / "adapter_config.json"
    settings.write_text('{"base_model_name_or_path": "org/base"}')
    (adapter / "README.md").write_text(
        "---\nbase_model: org/base\nlibrary_name: peft\nlicense: mit\ntags: [simpo, lora]\n---\n"
        "# mine\n\norg/base after preference optimisation.\n"
    )
    (adapter / "curves.png").write_bytes(b"png")
    write_merged_card(adapter, output)
    card = ModelCard((output / "README.md").read_text())
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "mit",
        "tags": ["simpo", "merged"],
    }
    assert card.text.strip() == (
        "# mine\n\nThe adapter described here is merged into the weights of org/base.\n\n"
        "org/base after preference optimisation."
    )
    assert (output / "curves.png").read_bytes() == b"png"

    # An adapter of somebody else, without a card, of a base on this machine.
    settings.write_text(json.dumps({"base_model_name_or_path": f"{tmp_path}/base"}))
    (adapter / "README.md").unlink()
    write_merged_card(adapter, output)
    card = ModelCard((output / "README.md").read_text())
    assert card.data.to_dict() == {"library_name": "transformers", "tags": ["merged"]}
    assert card.text.strip() == (
        "# base with an adapter\n\nThe adapter described here is merged into the weights of base."
    )


@pytest.mark.parametrize(
    ("override", "private"),
    [
        ("launcher.setup=['export WANDB_API_KEY=0123']", True),
        ("launcher.setup=['wandb login 0123']", True),
        ("launcher.options=['--export=AWS_SECRET_ACCESS_KEY=0123']", True),
        ("launcher.setup=['export http_proxy=http://me:0123@proxy']", True),
        ("launcher.setup=['module load cuda']", False),
        ("train.tokens_per_row=512", False),
    ],
)
def test_settings_with_a_secret_are_their_owners(
    override: str, private: bool, tiny_run: list[str], tmp_path: Path
) -> None:
    run = compose_run([*tiny_run, "launcher=slurm", override, f"run_dir={tmp_path}/run"])
    folder = RunFolder(run).path
    for name in ("run.yaml", "command.txt"):
        assert (folder / name).stat().st_mode & 0o077 == (0 if private else 0o044)
