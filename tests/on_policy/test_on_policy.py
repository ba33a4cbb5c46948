"""On-policy data: replies are generated, scored, paired and trained on."""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.config.choices import Dtype
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, DamagedError, DataError, RunError
from simpo.config.models import ModelConfig
from simpo.data.chats.chat import Chat
from simpo.data.demo.records import demo_records
from simpo.data.mixture import load_mixture
from simpo.data.reading.records import to_pair, to_prompt
from simpo.data.rules import obeys
from simpo.model.generate import Sampling
from simpo.model.load import load_policy
from simpo.model.policy import Policy
from simpo.model.tokenizer import load_tokenizer
from simpo.on_policy import annotate as annotating
from simpo.on_policy import engines
from simpo.on_policy import generate as generating
from simpo.on_policy.files import content_hash, model_content, working_in
from simpo.run import folder as run_folder
from tests.support.forked import Forked
from tests.support.tiny_models import tiny_reward_model
from tests.support.whole_runs import finish, run_command, wait_for

HI = [{"role": "user", "content": "Hi"}]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def drawing(tiny_run: list[str], tmp_path: Path) -> list[str]:
    """Overrides that draw two replies to 40 prompts."""
    return [
        *tiny_run,
        f"on_policy.folder={tmp_path}/own",
        "on_policy.seeds=[1,2]",
        "on_policy.max_new_tokens=8",
        "on_policy.batch_prompts=7",
    ]


def generate(overrides: list[str], *more: str) -> list[dict[str, Any]]:
    return lines(generating.generate(compose_run([*overrides, *more])) / "responses.jsonl")


def test_a_stopped_drawing_goes_on_to_the_same_replies(drawing: list[str], tmp_path: Path) -> None:
    whole = generate(drawing)
    assert len({(row["id"], row["seed"]) for row in whole}) == len(whole) == 80
    prompts = lines(tmp_path / "own" / "prompts.jsonl")
    assert {row["split"] for row in prompts} == {"train", "test"}
    assert {row["id"] for row in whole} == {row["id"] for row in prompts}
    assert all(row["id"] == content_hash(row["prompt"]) for row in prompts)

    file = tmp_path / "own" / "responses.jsonl"
    text = file.read_text()
    # In the middle of a batch, and of a line.
    file.write_text(text[: text.index("\n", len(text) // 2) + 20])
    assert generate(drawing) == whole
    # A seed more is drawn beside those that are there.
    more = generate(drawing, "on_policy.seeds=[1,2,3]")
    assert more[:80] == whole and {row["seed"] for row in more[80:]} == {3}


def test_replies_of_another_folder_are_taken_if_nothing_that_decides_them_differs(
    drawing: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(drawing)
    others = [tmp_path / "none", tmp_path / "own"]
    # As a process leaves it that is writing.
    with (tmp_path / "own/responses.jsonl").open("a") as file:
        file.write('{"id": "hal')

    def none_drawn(*_: Any) -> Any:
        raise AssertionError("a reply is drawn")

    monkeypatch.setattr(generating, "with_transformers", none_drawn)

    def taken(name: str, *more: str) -> Path:
        words = [*drawing, f"on_policy.folder={tmp_path}/{name}", *more]
        return generating.generate(compose_run(words), others)

    # How the model is trained does not matter.
    assert lines(taken("same", "train.epochs=3", "loss.beta=3") / "responses.jsonl") == whole
    for name, word in (("hot", "on_policy.temperature=0.5"), ("seed", "on_policy.seeds=[1,3]")):
        with pytest.raises(AssertionError, match="a reply is drawn"):
            taken(name, word)
    (tmp_path / "own/responses.jsonl").write_text("{}\n")
    with pytest.raises(AssertionError, match="a reply is drawn"):
        taken("damaged")


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 75, "SIGTERM: stopped (the same command continues)\n"),
        (signal.SIGINT, 130, "interrupted: the same command continues\n"),
    ],
)
def test_a_signal_while_drawing(
    number: signal.Signals, code: int, said: str, drawing: list[str], tmp_path: Path
) -> None:
    process = Forked(["-m", "simpo.generate", *drawing, "on_policy.max_new_tokens=200"])
    wait_for((tmp_path / "own" / "responses.jsonl").is_file, process)
    process.send_signal(number)
    assert finish(process, code).endswith(said)


def test_replies_differ_by_seed_and_temperature(drawing: list[str], tmp_path: Path) -> None:
    def texts(*more: str) -> dict[int, list[str]]:
        name = f"on_policy.folder={tmp_path}/{len(list(tmp_path.iterdir()))}"
        rows = generate(drawing, name, *more)
        return {seed: [r["response"] for r in rows if r["seed"] == seed] for seed in (1, 2)}

    free = texts()
    assert free[1] != free[2]
    # Of the likeliest token alone, whatever the seed, as transformers' own greedy search does.
    sure = texts("on_policy.top_p=1e-9", "on_policy.batch_prompts=1")
    assert sure[1] == sure[2]
    run = compose_run(drawing)
    tokenizer = AutoTokenizer.from_pretrained(run.model.path)
    tokenizer.chat_template = Path("simpo/data/templates/chatml.jinja").read_text()
    model: Any = AutoModelForCausalLM.from_pretrained(run.model.path)
    pair = min(load_mixture(run.data).train, key=lambda pair: len(str(pair.prompt)))
    ids: Any = tokenizer.apply_chat_template(
        list(pair.prompt), add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(greedy, skip_special_tokens=True) in sure[1]


def test_train_prompts_are_dealt_into_slices(
    drawing: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dealt by hand: the first, fourth, ... of the prompts in the mixture's order."""

    def asked(*more: str) -> dict[str, list[str]]:
        name = f"on_policy.folder={tmp_path}/{len(list(tmp_path.iterdir()))}"
        words = ["on_policy.seeds=[1,2]", "on_policy.max_new_tokens=1", name, *more]
        rows = generate(drawing, *words)
        prompts = lines(Path(name.partition("=")[2]) / "prompts.jsonl")
        assert {row["id"] for row in rows} == {row["id"] for row in prompts}
        return {s: [row["id"] for row in prompts if row["split"] == s] for s in ("train", "test")}

    few = "on_policy.num_prompts=8"
    whole = asked(few)
    assert len(whole["train"]) == len(whole["test"]) == 8
    capsys.readouterr()
    for one, indices in ((1, (0, 3, 6)), (2, (1, 4, 7)), (3, (2, 5))):
        found = asked(few, "on_policy.slices=3", f"on_policy.slice={one}")
        assert found["test"] == whole["test"]
        assert found["train"] == [whole["train"][i] for i in indices]
        n = len(indices)
        assert (
            f"\n{8 + n} prompts (8 held out, {n} of 8 to train on: slice {one} of 3), "
            "2 replies each\n"
        ) in capsys.readouterr().out
    assert asked(few, "on_policy.held_out_only=true") == {"train": [], "test": whole["test"]}
    assert "\n8 prompts (held out only), 2 replies each\n" in capsys.readouterr().out
    with pytest.raises(ConfigError) as caught:
        generate(drawing, few, "on_policy.slices=9", "on_policy.slice=9")
    assert str(caught.value) == (
        "on_policy.slice: slice 9 of 9 has no prompt, there are 8 to train on "
        "(set fewer on_policy.slices, or more on_policy.num_prompts)"
    )


def test_another_slice_in_the_same_folder_is_refused(drawing: list[str], tmp_path: Path) -> None:
    few = ["on_policy.num_prompts=2", "on_policy.max_new_tokens=1", "on_policy.slices=2"]
    generate(drawing, *few)
    with pytest.raises(ConfigError) as caught:
        generate(drawing, *few, "on_policy.slice=2")
    assert str(caught.value).startswith(
        f"on_policy.slice: the replies in {tmp_path}/own were generated with 1, got 2 "
        "(restore it, or choose another on_policy.folder)\n"
    )


def test_held_out_prompts_alone_need_some(drawing: list[str], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "A cat?"}) + "\n")
    with pytest.raises(ConfigError) as caught:
        generate(drawing, f"data.sources=[{{path: {file}}}]", "on_policy.held_out_only=true")
    assert str(caught.value) == (
        "on_policy.held_out_only: there is no held-out prompt (data.sources: test_path)"
    )


def test_other_settings_are_refused(drawing: list[str], tmp_path: Path) -> None:
    generate(drawing, "on_policy.num_prompts=2")
    with pytest.raises(ConfigError) as caught:
        generate(drawing, "on_policy.num_prompts=2", "on_policy.temperature=1.5")
    assert str(caught.value) == (
        f"on_policy.temperature: the replies in {tmp_path}/own were generated with 0.8, got 1.5 "
        "(restore it, or choose another on_policy.folder)"
    )


def test_temperatures_that_are_left_out_are_refused(drawing: list[str], tmp_path: Path) -> None:
    few = ["on_policy.num_prompts=2", "on_policy.max_new_tokens=1"]
    generate(drawing, *few, "on_policy.temperatures=[0.5,1.5]")
    with pytest.raises(ConfigError) as caught:
        generate(drawing, *few, "on_policy.seeds=[1,2,3]")
    assert str(caught.value) == (
        f"on_policy.temperatures: the replies in {tmp_path}/own were generated with [[1, 0.5], "
        "[2, 1.5]], got None (restore it, or choose another on_policy.folder)"
    )


def test_other_weights_under_the_same_path_are_refused(
    drawing: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    few = [f"model.path={model}", "on_policy.num_prompts=2"]
    first = generate(drawing, *few)
    (model / "README.md").write_text("another text")
    assert generate(drawing, *few) == first
    own = tmp_path / "own"
    before = json.loads((own / "settings.json").read_text())
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError) as caught:
        generate(drawing, *few, "on_policy.seeds=[1,2,3]")
    key = "content of model.path"
    now = model_content("model.path", str(model), None)
    assert now != before[key]
    assert str(caught.value) == (
        f"{key}: the replies in {own} were generated with {before[key]}, got {now} "
        "(restore it, or choose another on_policy.folder)"
    )
    assert lines(own / "responses.jsonl") == first
    for nothing in ("", "{}\n", "{}\n{}\n"):
        (own / "settings.json").write_text(nothing)
        with pytest.raises(ConfigError) as caught:
            generate(drawing, *few)
        assert str(caught.value) == (
            f"on_policy.folder: the settings.json of the replies in {own} is missing or empty "
            "(choose another on_policy.folder)"
        )
    (own / "settings.json").write_text(json.dumps(before | {"template_date": "x"}) + "\n")
    with pytest.raises(ConfigError) as caught:
        generate(drawing, *few)
    assert str(caught.value).startswith(f"{key}: the replies in {own} were generated with ")


def test_a_model_of_the_hub_is_known_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked up in a cache that is laid out as the hub's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    root = tmp_path / "models--me--mine"
    (root / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        (root / "snapshots" / commit).mkdir(parents=True)
        (root / "snapshots" / commit / "config.json").write_text("{}")
        (root / "refs" / "main").write_text(commit)
        assert model_content("model.path", "me/mine", None) == commit
    with pytest.raises(ConfigError) as caught:
        model_content("model.path", "me/none", None)
    assert str(caught.value).startswith("model.path: me/none cannot be loaded: ")


@pytest.mark.parametrize("command", ["generate", "annotate"])
def test_one_command_at_a_time_works_in_a_folder(
    drawing: list[str], folder: Path, command: str
) -> None:
    run = compose_run([*drawing, f"on_policy.folder={folder}", "on_policy.reward=rules"])
    work = {"generate": generating.generate, "annotate": annotating.annotate}[command]
    with working_in(folder), pytest.raises(ConfigError) as caught:
        work(run)
    told = f"on_policy.folder: another process works in {folder} (wait for it)"
    assert str(caught.value) == told


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    with working_in(tmp_path):
        (tmp_path / "made").touch()
    assert capsys.readouterr().out == (
        f"note   {tmp_path} cannot be locked, so run only one command in it: "
        "Function not implemented\n"
    )


def test_a_full_disk_and_a_folder_that_cannot_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(annotating, "append_lines", full)
    with pytest.raises(RunError) as caught:
        annotate(folder, "rules")
    assert str(caught.value) == (
        f"{folder}: No space left on device (make room, and the same command continues)"
    )
    below = folder / "prompts.jsonl" / "own"
    with pytest.raises(RunError) as caught, working_in(below):
        pass
    assert str(caught.value) == (
        f"{below}: Not a directory (something else lies in its place: move that away)"
    )


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        ("prompts", '{"id": "a"}', "not a prompt"),
        ("prompts", '{"id": "a", "split": "x", "prompt": [{}], "rule": null}', "not a prompt"),
        ("prompts", '{"id": "a", "split": "test", "prompt": "b", "rule": null}', "not a prompt"),
        (
            "prompts",
            '{"id": "a", "split": "test", "prompt": [{}], "rule": null, "tools": 5}',
            "not a prompt",
        ),
        (
            "prompts",
            '{"id": "a", "split": "test", "prompt": [{}], "rule": null, "reference_answer": 3}',
            "not a prompt",
        ),
        ("prompts", "[]", "not a JSON object"),
        ("responses", '{"id": "a", "reply": "b"}', "not a reply"),
        (
            "responses",
            '{"id": ["a"], "seed": 1, "response": "b", "tokens": 1, "ended": true}',
            "not a reply",
        ),
        (
            "responses",
            '{"id": "a", "seed": 1, "response": null, "tokens": 1, "ended": true}',
            "not a reply",
        ),
        ("responses", "nothing", "not a JSON object"),
        ("scores-rules", "\x00", "not a JSON object"),
    ],
)
def test_damaged_files(folder: Path, file: str, line: str, told: str) -> None:
    path = folder / f"{file}.jsonl"
    with path.open("a") as written:
        written.write(f"{line}\n")
    with pytest.raises(DamagedError) as caught:
        annotate(folder, "rules")
    number = len(path.read_text().splitlines())
    assert str(caught.value) == (f"{path}: line {number} is {told} (remove that line)")


@pytest.mark.parametrize("harm", [{"scores": 3}, {"scores": ["1", "2"]}, {"id": ["a"]}, {}])
def test_scores_that_are_none_are_given_again(folder: Path, harm: dict[str, Any]) -> None:
    annotate(folder, "rules")
    pairs, file = lines(folder / "train.jsonl"), folder / "scores-rules.jsonl"
    first, *others = lines(file)
    damaged = first | harm if harm else {key: first[key] for key in first if key != "scores"}
    file.write_text("".join(json.dumps(row) + "\n" for row in [damaged, *others]))
    annotate(folder, "rules")
    assert lines(folder / "train.jsonl") == pairs


def test_a_reply_to_no_prompt(folder: Path) -> None:
    file = folder / "responses.jsonl"
    file.write_text(file.read_text().replace('"id": "d"', '"id": "e"', 1))
    with pytest.raises(ConfigError) as caught:
        annotate(folder, "rules")
    assert str(caught.value) == (
        f"on_policy.folder: {folder} has a reply to e, which is not in its prompts.jsonl "
        "(simpo.generate writes that again)"
    )


def test_a_prompt_that_the_template_refuses(
    drawing: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}"
        "{% if 'owl' in m.content %}{{ raise_exception('no owls') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    )
    rows = [{"prompt": "An owl?"}, {"prompt": "A cat?"}, {"prompt": " "}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    strict = [f"model.chat_template={template}", f"data.sources=[{{path: {file}}}]"]
    rows = generate(drawing, *strict, "data.on_bad_record=drop")
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("note ")] == [
        f"note   {file} train: read as prompts, 3 records",
        "note   1 records left out: the chat template refuses it: no owls",
        "note   1 records left out: prompt: the last turn is empty",
        "note   2 of 2 replies are cut off by on_policy.max_new_tokens: simpo annotate leaves them "
        "out, unless on_policy.keep_cut=true",
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in [{"prompt": "An owl?"}]))
    with pytest.raises(DataError) as caught:
        generate(drawing, *strict)
    assert str(caught.value).startswith(
        f"{file} train record 1: the chat template refuses it: no owls\n"
    )
    assert len({row["id"] for row in rows}) == 1 and len(rows) == 2


def test_prompts_alone_will_do() -> None:
    pair = to_prompt({"prompt": "Hi"}, "data.jsonl record 1")
    assert pair.prompt == ({"role": "user", "content": "Hi"},)
    assert to_prompt({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "x").prompt == pair.prompt


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Replies written by hand: two prompts to train on, two held out."""
    rules = [
        ("a", "train", {"name": "bullets", "count": 1}, ["- Owls.", "Owls.", " Owls. ", "Mice."]),
        ("b", "train", {"name": "bullets", "count": 1}, ["Owls.", "Mice."]),  # a tie
        ("c", "test", {"name": "bullets", "count": 1}, ["Owls.", "- Owls."]),
        ("d", "test", {"name": "bullets", "count": 1}, ["Same.", "Same."]),
    ]
    prompts, responses = [], []
    for name, split, rule, texts in rules:
        prompts.append({"id": name, "split": split, "prompt": HI, "rule": rule})
        for seed, text in enumerate(texts):
            row = {"id": name, "seed": seed, "response": text, "tokens": 2, "ended": True}
            responses.append(row)
    responses += [responses[0] | {"seed": 9, "response": "- Cut", "ended": False}]
    responses += [responses[0] | {"seed": 10, "response": " "}]
    for name, rows in (("prompts", prompts), ("responses", responses)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def annotate(folder: Path, reward: str, *more: str) -> None:
    overrides = [f"on_policy.folder={folder}", f"on_policy.reward={reward}"]
    annotating.annotate(compose_run([*overrides, "backend.device=cpu", *more]))


def test_the_best_is_chosen_and_the_worst_rejected(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotate(folder, "rules")
    (pair,) = lines(folder / "train.jsonl")
    assert pair == {
        "prompt": HI,
        "chosen": "- Owls.",
        "rejected": "Owls.",
        "rule": {"name": "bullets", "count": 1},
        "chosen_score": 1.0,
        "rejected_score": 0.0,
        "scores": [1.0, 0.0, 0.0],  # " Owls. " is "Owls." again; the cut and the empty are out
    }
    (held_out,) = lines(folder / "test.jsonl")
    assert (held_out["chosen"], held_out["rejected"]) == ("- Owls.", "Owls.")
    assert to_pair(pair, "train.jsonl record 1").chosen[0]["content"] == "- Owls."
    shown = capsys.readouterr().out
    assert "| train | 2       | 1     | 1    | 0                                |" in shown
    assert "| test  | 2       | 1     | 0    | 1                                |" in shown
    assert "1 replies left out: cut off by on_policy.max_new_tokens" in shown
    annotate(folder, "rules", "on_policy.keep_cut=true")
    assert lines(folder / "train.jsonl")[0]["scores"] == [1.0, 0.0, 0.0, 1.0]


def test_a_prompt_without_a_rule_has_no_score_by_rules(folder: Path) -> None:
    file = folder / "prompts.jsonl"
    *others, last = lines(file)
    rows = [*others, last | {"rule": None}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunError) as caught:
        annotate(folder, "rules")
    assert str(caught.value) == (
        "on_policy.reward: rules failed on prompt d: ValueError: the prompt has no rule"
    )


def test_a_function_scores_what_is_not_scored_yet(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "my_rewards.py").write_text(
        "asked = []\n"
        "def length(prompt, responses, rule):\n"
        "    asked.append((prompt[0]['content'], list(responses)))\n"
        "    if len(asked) == 2:\n"
        "        raise KeyError('gone')\n"
        "    return [len(text) for text in responses]\n"
        "def number(prompt, responses, rule):\n    return 1.5\n"
        "def short(prompt, responses, rule):\n"
        "    return [1.0]\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(RunError) as caught:
        annotate(folder, "my_rewards:length")
    assert str(caught.value) == (
        "on_policy.reward: my_rewards:length failed on prompt b: KeyError: 'gone' "
        "(my_rewards.py, line 5)"
    )
    assert not (folder / "train.jsonl").exists()
    annotate(folder, "my_rewards:length")
    assert lines(folder / "train.jsonl")[0]["chosen"] == "- Owls."
    asked = sys.modules["my_rewards"].asked
    assert [texts[0] for _, texts in asked] == [
        *("- Owls.", "Owls.", "Owls.", "Owls.", "Same."),
    ]
    assert len(asked[0][1]) == 3 and asked[0][0] == "Hi"
    with pytest.raises(RunError, match="must give 3 finite scores for prompt a, gave"):
        annotate(folder, "my_rewards:short")
    with pytest.raises(RunError, match=r"must give 3 finite scores for prompt a, gave 1\.5"):
        annotate(folder, "my_rewards:number")


def test_a_function_that_was_edited_scores_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its own file, or in the one that its module has it from."""
    code = "def length(prompt, responses, rule):\n    return [{}len(text) for text in responses]\n"
    (folder / "first.py").write_text(code.format(""))
    (folder / "second.py").write_text("from first import length\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # known by the second it was written in

    def chosen(name: str) -> str:
        for module in ("first", "second"):
            sys.modules.pop(module, None)  # as in another process
        annotate(folder, f"{name}:length")
        return str(lines(folder / "train.jsonl")[0]["chosen"])

    for name in ("first", "second"):
        assert chosen(name) == chosen(name) == "- Owls."
    assert "scored anew" not in capsys.readouterr().out
    (folder / "first.py").write_text(code.format("-"))
    for name in ("first", "second"):
        assert chosen(name) == "Owls."
        told = f"note   {name}:length has changed since scores-{name}_length.jsonl: "
        assert told + "all replies are scored anew\n" in capsys.readouterr().out


def test_a_reward_model(
    folder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classifier with one score, against its own forward on the rendered dialogue."""
    judge = tiny_reward_model(tiny_folder, tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    annotate(folder, str(tmp_path / "judge"), "train.precision=fp32")
    (row, *_) = lines(folder / "train.jsonl")
    expected = []
    for reply in ("- Owls.", "Owls.", "Mice."):
        text = f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>\n"
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected.append(judge(ids).logits.item())
    assert row["scores"] == pytest.approx(expected, rel=1e-5)
    assert row["chosen"] == ["- Owls.", "Owls.", "Mice."][expected.index(max(expected))]
    # Below the home of the user.
    monkeypatch.setenv("HOME", str(tmp_path))
    annotate(folder, '"~/judge"', "train.precision=fp32")
    assert lines(folder / "train.jsonl")[0]["scores"] == row["scores"]
    # Other weights under its name.
    torch.nn.init.normal_(judge.score.weight)
    judge.save_pretrained(tmp_path / "judge")
    annotate(folder, str(tmp_path / "judge"), "train.precision=fp32")
    again = lines(folder / "train.jsonl")[0]["scores"]
    assert again != pytest.approx(row["scores"], rel=1e-2)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("null", "on_policy.reward: required, but not given"),
        (
            "no_such_module:reward",
            "on_policy.reward: no_such_module:reward cannot be imported: "
            "No module named 'no_such_module'",
        ),
        ("json:nothing", "on_policy.reward: json:nothing cannot be imported: module 'json' has no"),
        ("json:__doc__", "on_policy.reward: json:__doc__ must be a function, got "),
        ("", "on_policy.reward: required, but not given"),
        ("./nothing", "on_policy.reward: no such folder, got ./nothing"),
        ("one/of/mine", "on_policy.reward: no such folder, got one/of/mine"),
        (
            "nobody/nothing",
            "on_policy.reward: nobody/nothing cannot be loaded: it is not in the cache, and ",
        ),
        (
            "my_rewards.py",
            "on_policy.reward: must not be a file, got my_rewards.py (a function is "
            "module:function)",
        ),
    ],
)
def test_rewards_that_cannot_be(folder: Path, reward: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        annotate(folder, reward)
    assert str(caught.value).startswith(message)


def test_a_dot_for_the_colon_of_a_function(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "dotted.py").write_text("def score(prompt, texts, rule):\n    return [1.0]\n")
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError) as caught:
        annotate(folder, "dotted.score")
    assert str(caught.value) == "on_policy.reward: must be dotted:score, got dotted.score"


def test_replies_that_are_missing_are_counted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a stopped `simpo.generate` leaves them: one more of them, and nothing is missing."""
    file = folder / "responses.jsonl"
    replies = [line for line in file.read_text().splitlines() if json.loads(line)["seed"] < 2]
    file.write_text("\n".join(replies[:-1]) + "\n")
    annotate(folder, "rules")
    assert capsys.readouterr().out.startswith(
        "note   1 of 4 prompts lack replies with some of the on_policy.seeds [0, 1]: "
        "simpo.generate was stopped (its command continues it)\n|"
    )
    file.write_text("\n".join(replies) + "\n")
    annotate(folder, "rules")
    assert "scored anew" not in capsys.readouterr().out


class OnGpu:
    """A backend, to who only loads a model."""

    device = torch.device("cuda")
    bf16 = True


def test_adapters_that_training_adds_are_not_generated_with(
    tiny_run: list[str], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replies are those of a policy with its new adapters, and the weights as wide."""
    run = compose_run([*tiny_run, "model.lora.rank=4"])
    chat = Chat(load_tokenizer(run.model, tmp_path))
    prompts, sampling = chat.encode(["Hi", "Owls are birds"]), Sampling(1.0, 1.0, 12, seed=7)
    device = torch.device("cpu")
    adapted = load_policy(run.model, tmp_path, device, seed=0)
    assert any("lora" in name for name, _ in adapted.named_parameters())
    loaded = []

    def load(model: ModelConfig, *rest: Any, **more: Any) -> Policy:
        loaded.append(model)
        return load_policy(model, *rest, **more)

    monkeypatch.setattr(engines, "load_policy", load)
    got = engines.with_transformers(run, chat)(prompts, sampling)
    assert got == engines.with_policy(adapted, chat, device)(prompts, sampling)
    assert (loaded[0].lora.used, loaded[0].dtype) == (False, Dtype.float32)
    # On a GPU weights that adapters leave as they are need half as many bytes.
    monkeypatch.setattr(engines, "build_backend", lambda *_: OnGpu())
    monkeypatch.setattr(engines, "load_policy", lambda model, *_, **__: loaded.append(model))
    engines.with_transformers(run, chat)
    assert (loaded[1].lora.used, loaded[1].dtype) == (False, Dtype.bfloat16)


def test_nothing_to_score(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        annotate(tmp_path, "rules")
    assert str(caught.value) == (f"on_policy.folder: no replies in {tmp_path} (run simpo.generate)")


def test_a_wrong_setting_is_answered_without_torch(tmp_path: Path) -> None:
    for module in ("simpo.generate", "simpo.annotate"):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", module, "on_policy.seeds=[1]"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 2
        assert "on_policy.seeds: must be two or more different ones, got [1]\n" in done.stderr
        imported = re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE)
        assert "omegaconf" in imported and "torch" not in imported


@pytest.mark.matrix
def test_replies_to_report_on_the_real_model(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2 answers prompts of the demo, a program judges, training on that is reported."""
    own = tmp_path / "own"
    folder = f"on_policy.folder={own}"
    for split, count in (("train", 8), ("test", 4)):
        # What it obeys now and then.
        rows = [
            row
            for row in demo_records(0, split)
            if row["rule"]["name"] in ("one_sentence", "yes_no_first")
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows[:count])))
    sources = f"data.sources=[{{path: {tmp_path}/train.jsonl, test_path: {tmp_path}/test.jsonl}}]"

    def command(module: str, *words: str) -> str:
        told = run_command(module, *words)
        assert told.returncode == 0, told.stderr[-2000:]
        return told.stdout

    drawn = command(
        "simpo.generate", "data=jsonl", sources, folder, "on_policy.seeds=[1,2,3,4]",
        "on_policy.max_new_tokens=16", "model.dtype=bfloat16",
    )  # fmt: skip
    assert "12 prompts, 4 replies each" in drawn
    judged = [folder, "on_policy.reward=rules", "on_policy.keep_cut=true"]
    told = command("simpo.annotate", *judged)
    (made,) = re.findall(r"'(data\.sources=.*)'", told)
    pairs = lines(own / "train.jsonl")
    assert pairs
    for pair in pairs:
        assert obeys(pair["rule"], pair["chosen"]) and not obeys(pair["rule"], pair["rejected"])
    command(
        "simpo.train", "data=jsonl", made, f"run_dir={tmp_path}/run", "train.pairs_per_step=2",
        "train.max_steps=2", "train.epochs=2", "train.tokens_per_row=1024",
        "sample.num_prompts=2", "sample.max_new_tokens=16",
    )  # fmt: skip
    assert "finished, step 2 of 2" in command("simpo.report", str(tmp_path / "run"))
    assert (tmp_path / "run" / "report.html").is_file()
