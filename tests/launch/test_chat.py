"""`simpo chat` says what the trained model says: ids, replies, dialogue, a real terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_api
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import hub as transformers_hub

from simpo.__main__ import main
from simpo.config.check import load_run
from simpo.config.choices import Device, Dtype
from simpo.config.compose import compose_run
from simpo.data.chats.chat import Chat
from simpo.data.hub import go_offline_if_unreachable
from simpo.data.mixture import load_mixture
from simpo.data.pairs import Tokenized
from simpo.data.reading.records import to_dialogue
from simpo.launch.commands.chat import USAGE, Words, _arguments
from simpo.launch.conversation import HELP, Conversation, _show
from simpo.loop.train import train
from simpo.model import talk
from simpo.model.generate import Sampling
from simpo.model.tokenizer import load_tokenizer
from simpo.run.files import read_replies
from tests.support.small_hub import small_hub
from tests.support.whole_runs import tiny_overrides

GREEDY = ("temperature=0", "max_new_tokens=8")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs that changed what the model says: of all weights, and of an adapter."""
    folder = tmp_path_factory.mktemp("runs")
    words = [*tiny_overrides(tiny_folder, folder), "train.learning_rate=1e-2"]
    words += ["train.eval_every=6", "train.checkpoint_every=6"]
    for name, rank in (("full", 0), ("lora", 4)):
        train(compose_run([*words, f"model.lora.rank={rank}", f"run_dir={folder}/{name}"]))
    return {name: folder / name for name in ("full", "lora")}


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Token ids that reach the model, in order."""
    seen: list[list[int]] = []
    generate = talk.generate_replies

    def recorded(policy: Any, chat: Chat, ids: list[list[int]], *more: Any) -> Any:
        seen.extend(ids)
        return generate(policy, chat, ids, *more)

    monkeypatch.setattr(talk, "generate_replies", recorded)
    return seen


def ask(source: Path, *words: str) -> None:
    main(["chat", str(source), *words])


def pipe(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Let the command read lines that no terminal sends."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["chat", *map(str, words)])
    assert ended.value.code == 2
    return capsys.readouterr().err


def rendered(model: Path, *turns: tuple[str, str]) -> Any:
    """The prompt of a dialogue as transformers alone renders and tokenizes it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


# --- The model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "lora"])
def test_prompts_have_the_ids_of_training(
    name: str, runs: dict[str, Path], tiny_folder: Path
) -> None:
    run = load_run(runs[name] / "run.yaml")
    pairs = load_mixture(run.data).test
    chat = Chat(load_tokenizer(run.model, tiny_folder))
    model = talk.load_talking_model(str(runs[name]), None, Dtype.auto, Device.cpu)
    for pair, tokenized in zip(pairs, chat.tokenize(pairs, run.data), strict=True):
        assert isinstance(tokenized, Tokenized)
        assert model.prompt_ids(pair.prompt) == tokenized.pair.prompt_ids.tolist()
    assert model.chat.end_id == chat.end_id == 2


@pytest.mark.parametrize("name", ["full", "lora"])
def test_replies_are_those_of_the_run(
    name: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before and after training, as the run itself wrote them; some follow a dialogue."""
    pairs = load_mixture(load_run(runs[name] / "run.yaml").data).test
    model = talk.load_talking_model(str(runs[name]), "", Dtype.auto, Device.cpu)
    sampling = Sampling(temperature=0, top_p=1, max_new_tokens=8, seed=0)
    capsys.readouterr()
    for pair, old, new in zip(pairs, *replies_of(runs[name]), strict=False):
        assert old["reply"] != new["reply"]
        system, turns = "", [*pair.prompt]
        if turns[0]["role"] == "system":
            system = turns.pop(0)["content"]
        conversation = Conversation(model, sampling, system)
        conversation.messages = turns[:-1]
        conversation.ask(turns[-1]["content"])
        assert capsys.readouterr().out == f"[base]\n{old['reply']}\n[trained]\n{new['reply']}\n"
        assert conversation.messages[-1]["content"] == new["reply"]
    assert {len(pair.prompt) for pair in pairs[:3]} == {1, 3, 4}


def replies_of(run: Path) -> list[list[dict[str, Any]]]:
    """Replies of the model before and after training."""
    return [read_replies(run / f"samples/step-{step:06d}.json") for step in (0, 6)]


def test_a_model_and_an_adapter_away_from_their_run(
    runs: dict[str, Path], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base is the one that is named, or that the adapter names."""
    old, new = (replies[0] for replies in replies_of(runs["lora"]))
    adapter = shutil.copytree(runs["lora"] / "model", tmp_path / "adapter")
    words = (f"prompt={new['prompt']}", *GREEDY)
    both = f"[base]\n{old['reply']}\n[trained]\n{new['reply']}\n"
    capsys.readouterr()
    ask(adapter, *words, "base=true")
    assert capsys.readouterr().out == both
    settings = adapter / "adapter_config.json"
    for base, fault in (
        (None, "the adapter does not name it"),
        (f"{tmp_path}/gone", f"no such folder, got {tmp_path}/gone"),
    ):
        moved = json.loads(settings.read_text()) | {"base_model_name_or_path": base}
        settings.write_text(json.dumps(moved))
        assert refused(capsys, adapter, *words) == f"base: {fault} (base=FOLDER_OR_HUB_ID)\n"
    ask(adapter, *words, f"base={tiny_folder}")
    assert capsys.readouterr().out == both

    main(["export", str(runs["lora"]), "merge=true", f"output={tmp_path}/merged"])
    capsys.readouterr()
    assert refused(capsys, tmp_path / "merged", *words, "base=true") == (
        f"base: {tmp_path}/merged does not name its base (base=FOLDER_OR_HUB_ID)\n"
    )
    ask(tmp_path / "merged", *words, f"base={tiny_folder}")
    assert capsys.readouterr().out == both


def test_another_run_as_base(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, new = (replies[0] for replies in replies_of(runs["full"]))
    capsys.readouterr()
    ask(runs["full"], f"prompt={new['prompt']}", *GREEDY, f"base={runs['full']}")
    assert capsys.readouterr().out == f"[base]\n{new['reply']}\n[trained]\n{new['reply']}\n"


def test_models_of_a_hub(
    runs: dict[str, Path],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Uploaded by `simpo export` and talked to by their names."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    go_offline_if_unreachable.cache_clear()
    with small_hub() as hub:
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.address)
        # transformers keeps a client, which would ask the hub of an earlier test for 94 s.
        monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        for name, run in runs.items():
            old, new = (replies[0] for replies in replies_of(run))
            main(["export", str(run), f"push_to_hub=me/{name}"])
            capsys.readouterr()
            main(["chat", f"me/{name}", f"prompt={new['prompt']}", f"base={tiny_folder}", *GREEDY])
            said = f"[base]\n{old['reply']}\n[trained]\n{new['reply']}\n"
            assert capsys.readouterr().out == said
        assert refused(capsys, "me/none") == (
            f"RUN: me/none cannot be loaded: {hub.address}/me/none is not there, or private "
            "(`hf auth login` or set HF_TOKEN)\n"
        )
    go_offline_if_unreachable.cache_clear()


def test_the_template_has_the_date_and_the_variables_of_the_run(
    tiny_folder: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    template = tmp_path / "dated.jinja"
    chatml = AutoTokenizer.from_pretrained(tiny_folder).chat_template
    template.write_text("{{ strftime_now('%Y-%m-%d') }} {{ mood }}" + chatml)
    words = [*tiny_overrides(tiny_folder, tmp_path), "train.max_steps=2", "sample.num_prompts=0"]
    words += [f"model.chat_template={template}", "model.chat_template_kwargs.mood=fair"]
    train(compose_run([*words, f"run_dir={tmp_path}/run"]))
    data = tmp_path / "run" / "data.json"
    data.write_text(json.dumps(json.loads(data.read_text()) | {"template_date": "2001-02-03"}))
    template.unlink()
    ask(tmp_path / "run", "prompt=Hi", *GREEDY)
    text = AutoTokenizer.from_pretrained(tiny_folder).decode(prompts[0])
    assert text == ("2001-02-03 fair<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_drawn_replies(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    capsys.readouterr()
    for seed in (0, 0, 1):
        ask(runs["full"], "prompt=Hi", "max_new_tokens=20", f"seed={seed}", "temperature=2")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_ctrl_c_stops_a_reply(tiny_folder: Path) -> None:
    """What was generated until then is the reply."""
    model = talk.load_talking_model(str(tiny_folder), None, Dtype.float32, Device.cpu)
    sampling = Sampling(temperature=0, top_p=1, max_new_tokens=40, seed=0)
    ids = model.prompt_ids([{"role": "user", "content": "Name a bird."}])
    shown: list[str] = []
    whole, early = model.reply(ids, sampling, shown.append)
    assert "".join(shown) == whole.text and len(whole.ids) == 40
    assert early == "cut after max_new_tokens=40"

    parts: list[str] = []

    def interrupted(text: str) -> None:
        parts.append(text)
        if len(parts) == 5:
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    part, early = model.reply(ids, sampling, interrupted)
    assert (part.ids, early) == (whole.ids[:5], "stopped")
    assert "".join(parts) == part.text == whole.text[: len(part.text)]


# --- The dialogue --------------------------------------------------------------------------------


def test_a_dialogue_over_a_pipe(
    tiny_folder: Path,
    prompts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each prompt is what transformers renders of the turns before it."""
    file = tmp_path / "saved.jsonl"
    lines = (
        "Name a bird.",
        "",
        "Another\\",
        "one?",
        "/undo",
        "/system Be brief.",
        "And a fish?",
        f"/save {file}",
        "/clear",
        "Hi",
        "/system",
        "/clear",
        "Hi",
        f"/save {file}",
        "/quit",
        "never read",
    )
    capsys.readouterr()
    pipe(monkeypatch, *lines)
    ask(tiny_folder, *GREEDY)
    told = capsys.readouterr()
    replies = [
        str(AutoTokenizer.from_pretrained(tiny_folder).decode(ids, skip_special_tokens=True))
        for ids in map(greedy(tiny_folder), prompts)
    ]
    bird, _, fish, _, hi = replies
    assert told.out == "".join(f"{reply}\n" for reply in replies)
    first = (("user", "Name a bird."), ("assistant", bird))
    system, fish_asked = ("system", "Be brief."), ("user", "And a fish?")
    assert prompts == [
        rendered(tiny_folder, *first[:1]),
        rendered(tiny_folder, *first, ("user", "Another\none?")),
        rendered(tiny_folder, system, *first, fish_asked),
        rendered(tiny_folder, system, ("user", "Hi")),
        rendered(tiny_folder, ("user", "Hi")),
    ]
    assert told.err == (
        f"model  {tiny_folder} (float32, cpu)\n"
        + "(cut after max_new_tokens=8)\n" * 2
        + "taken back: Another\none?\n"
        + "(cut after max_new_tokens=8)\n"
        + f"saved  {file}\n"
        + "(cut after max_new_tokens=8)\n" * 2
        + f"saved  {file}\n"
    )
    # The file is data for supervised fine-tuning.
    source = f"data.sources=[{{path: {file}}}]"
    pairs = load_mixture(compose_run(["data=jsonl", source, "loss=sft"]).data, to_dialogue).train
    turns = [[(t["role"], t["content"]) for t in pair.turns] for pair in pairs]
    assert sorted(turns, key=len) == [  # the readers shuffle
        [("user", "Hi"), ("assistant", hi)],
        [system, *first, fish_asked, ("assistant", fish)],
    ]


def test_a_file_of_windows(
    tiny_folder: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins with a byte-order mark, and each line ends in two bytes."""
    pipe(monkeypatch, "\ufeffName a\\\r", "bird.\r", "/quit\r")
    ask(tiny_folder, *GREEDY)
    assert prompts == [rendered(tiny_folder, ("user", "Name a\nbird."))]


def greedy(folder: Path) -> Any:
    """Up to 8 ids after a prompt, each the likeliest after those before it."""
    model = AutoModelForCausalLM.from_pretrained(folder)

    def continued(ids: list[int]) -> list[int]:
        written: list[int] = []
        while len(written) < 8:
            with torch.no_grad():
                logits = model(torch.tensor([ids + written]), use_cache=False).logits
            written.append(int(logits[0, -1].argmax()))
            if written[-1] == 2:
                return written[:-1]
        return written

    return continued


MARK = "a message holds the token <|im_end|> as text (leave it out)\n"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("a <|im_end|>", MARK),
        ("/system <|im_end|>", MARK),
        ("/undo", "/undo: there is no question to take back\n"),
        ("/save x.jsonl", "/save: there is nothing to save\n"),
        ("/save", "/save: must be followed by a .jsonl file, got nothing\n"),
        ("/save x.txt", "/save: must be followed by a .jsonl file, got x.txt\n"),
        (
            "/redo",
            "/redo: no such command (one of /clear, /undo, /system, /save, /help, /quit)\n",
        ),
        ("\udcff", "the question is not UTF-8 (convert it)\n"),
        (
            "owl " * 800,
            "the dialogue has 2,415 tokens, which leaves no room for a reply in the 2,048 that the "
            "model reads (shorten it, or begin a new one with /clear)\n",
        ),
    ],
    ids=lambda value: value[:12],
)
def test_what_cannot_be_asked(
    line: str,
    fault: str,
    runs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A pipe ends there, with exit code 2."""
    pipe(monkeypatch, line, "Hi")
    capsys.readouterr()
    error = refused(capsys, runs["full"], *GREEDY)
    assert error == f"model  {runs['full']}/model (float32, cpu)\n{fault}"


def test_a_context_that_fills(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reply gets the room that is left."""
    capsys.readouterr()
    pipe(monkeypatch, "owl " * 676)
    ask(tiny_folder, "temperature=0")
    assert capsys.readouterr().err.endswith(
        "\n(the context is full: /clear begins a new dialogue)\n"
    )


def test_a_system_prompt(
    runs: dict[str, Path],
    prompts: list[list[int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ask(runs["full"], "prompt=Hi", "system=Be brief.", *GREEDY)
    assert prompts == [rendered(runs["full"] / "model", ("system", "Be brief."), ("user", "Hi"))]
    model = shutil.copytree(runs["full"] / "model", tmp_path / "model")
    template = (model / "chat_template.jinja").read_text()
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    leaving = "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}"
    for start, fault in (
        (refusing, "the chat template refuses it: no system (leave the system prompt out)"),
        (leaving, "the chat template leaves out the system prompt (put it into a question)"),
    ):
        (model / "chat_template.jinja").write_text(start + template)
        capsys.readouterr()
        assert refused(capsys, model, "prompt=Hi", "system=Be kind.") == f"system: {fault}\n"


# --- The words -----------------------------------------------------------------------------------


def test_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loss.beta=2").mkdir()
    assert _arguments(["loss.beta=2"]) == Words("loss.beta=2")
    assert _arguments(["me/model", "base=true"]) == Words("me/model", base="")
    words = ["me/model", "base=me/base", "prompt=a=b", "temperature=0", "seed=7"]
    asked = Words("me/model", base="me/base", prompt="a=b", temperature=0, seed=7)
    assert _arguments(words) == asked
    assert _arguments(["me/model", "base=false"]).base is None
    assert _arguments(["me/model", "base=True"]).base == ""


USED = "usage: simpo chat RUN [key=value ...]\n"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ([], USED),
        (["here", "there"], USED),
        (["nowhere"], "RUN: no such folder, got nowhere\n"),
        (["./no/where"], "RUN: no such folder, got ./no/where\n"),
        (["~nobody/run"], "RUN: no such folder, got ~nobody/run\n"),
        (
            ["here"],
            "RUN: must hold a run or a model, got here (no here/config.json or "
            "here/adapter_config.json)\n",
        ),
        (
            ["here", "temprature=1"],
            "temprature: no such key (chat has base, prompt, system, temperature, top_p, "
            "max_new_tokens, seed, dtype, device)\n",
        ),
        (["here", "temperature=hot"], "temperature: must be a number, 0 or more, got hot\n"),
        (["here", "temperature=nan"], "temperature: must be a number, 0 or more, got nan\n"),
        (["here", "top_p=0"], "top_p: must be a number above 0, at most 1, got 0\n"),
        (
            ["here", "max_new_tokens=0.5"],
            "max_new_tokens: must be a whole number, 1 or more, got 0.5\n",
        ),
        (["here", "seed=-1"], "seed: must be a whole number, 0 or more, got -1\n"),
        (["here", "dtype=fp8"], "dtype: must be one of auto, float32, bfloat16, got fp8\n"),
        (["here", "device=tpu"], "device: must be one of auto, cpu, cuda, got tpu\n"),
        (["here", "base="], "base: must be true, false, or a folder or hub id, got nothing\n"),
        (["here", "prompt= "], "prompt: must not be empty\n"),
    ],
    ids=str,
)
def test_words_that_are_refused(
    words: list[str],
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *words) == fault


def test_a_run_without_a_model(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs["full"], tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    status = {"state": "stopped", "step": 4, "total_steps": 6}
    remedy = f"(the model is saved at its end; {run}/command.txt has the command that continues it)"
    (run / "status.json").write_text(json.dumps(status))
    assert refused(capsys, run) == (
        f"RUN: the run in {run} has no model yet, it is stopped at step 4 of 6 {remedy}\n"
    )
    (run / "status.json").unlink()
    assert refused(capsys, run) == (
        f"RUN: the run in {run} has no model yet, it is begun at step 0 {remedy}\n"
    )
    if not torch.cuda.is_available():
        assert refused(capsys, runs["full"], "device=cuda") == (
            "device: no CUDA device found, got cuda (device=cpu)\n"
        )


def test_a_hub_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "me/model")
    assert error.startswith("RUN: me/model cannot be loaded: it is not in the cache, and ")
    assert error.count("\n") == 1


def test_nothing_in_a_reply_steers_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = "one\n\ttwo \x1b[2J\x07\r\x9b, \u00e9 \u00a0 \U0001f468\u200d\U0001f469"
    _show(reply)
    assert capsys.readouterr().out == reply
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _show(reply)
    assert capsys.readouterr().out == (
        "one\n\ttwo \ufffd[2J\ufffd\ufffd\ufffd, \u00e9 \u00a0 \U0001f468\u200d\U0001f469"
    )


def test_models_that_cannot_be_loaded(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault names RUN or the base as they are on the command line."""
    (tmp_path / "config.json").write_text("{}")
    assert refused(capsys, tmp_path) == (
        f"RUN: {tmp_path} cannot be loaded: it holds no tokenizer (model.tokenizer="
        "FOLDER_OR_HUB_ID, or fetch it anew)\n"
    )
    fault = (
        f"{tmp_path} cannot be loaded: Unrecognized model in {tmp_path}. Should have a "
        "`model_type` key in its config.json.\n"
    )
    for run in runs.values():
        assert refused(capsys, run, f"base={tmp_path}") == f"base: {fault}"


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    main(["chat", "--help"])
    text = capsys.readouterr().out
    assert text == USAGE.lstrip("\n")
    assert max(map(len, text.splitlines())) <= 100 and max(map(len, HELP.splitlines())) <= 100


# --- A terminal ----------------------------------------------------------------------------------


class Terminal:
    """`simpo chat` in a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self._master, slave = pty.openpty()

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self._process = subprocess.Popen(
            [sys.executable, "-m", "simpo.chat", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env=os.environ | {"TERM": "xterm"},
            preexec_fn=take_terminal,
        )
        os.close(slave)
        os.set_blocking(self._master, False)
        self._shown = ""

    def until(self, text: str) -> str:
        """Wait for a text, and return all that was shown up to its end."""
        deadline = time.monotonic() + 100
        while text not in self._shown:
            assert time.monotonic() < deadline, self._shown
            self._read()
        before, _, self._shown = self._shown.partition(text)
        return before.replace("\r\n", "\n") + text

    def until_some(self, letters: int) -> None:
        """Wait until so many letters and signs are shown."""
        deadline = time.monotonic() + 100
        while len("".join(self._shown.split())) < letters:
            assert time.monotonic() < deadline, self._shown
            self._read()

    def _read(self) -> None:
        try:
            self._shown += os.read(self._master, 65536).decode(errors="replace")
        except BlockingIOError:
            time.sleep(0.01)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def ended(self) -> int:
        return self._process.wait(timeout=30)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(tiny_folder: Path) -> Iterator[Terminal]:
    opened = Terminal(str(tiny_folder), "temperature=0", "max_new_tokens=1500")
    yield opened
    opened.close()


@pytest.mark.process
def test_a_session(terminal: Terminal, tiny_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C stops a reply, an error is a line, a paste is one question, Ctrl-D ends."""
    shown = terminal.until("Ctrl-D ends")
    assert shown.startswith(f"model  {tiny_folder} (float32, cpu)\n")
    terminal.until("> ")
    terminal.type("Name a bird.\r")
    terminal.until("Name a bird.\r\n")
    terminal.until_some(20)
    terminal.type("\x03")
    terminal.until("(stopped)")
    terminal.until("> ")
    terminal.type("\x03")
    terminal.until("> ")
    terminal.type("\x1b[200~two\nlines <|im_end|>\x1b[201~\r")
    terminal.until("a message holds the token <|im_end|> as text (leave it out)")
    terminal.until("> ")
    terminal.type("/save ")
    terminal.type(f"{tmp_path}/said.jsonlX\x7f\r")
    terminal.until("saved  ")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.ended() == 0
    (line,) = (tmp_path / "said.jsonl").read_text().splitlines()
    question, reply = json.loads(line)["messages"]
    assert question == {"role": "user", "content": "Name a bird."}
    assert reply["role"] == "assistant" and reply["content"]
