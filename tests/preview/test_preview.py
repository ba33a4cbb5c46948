"""The preview shows every token with its role, and exactly the tokens that the run trains on."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo.config.compose import compose_run
from simpo.previewing.stages import ENDLESS, Stages, page, text
from tests.support.browser import look_at
from tests.support.real_tokenizers import FOLDERS
from tests.support.whole_runs import Ended, run_command

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]


def stages_of(rows: Sequence[dict[str, Any]], folder: Path, *more: str, pairs: int = 3) -> Stages:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["data=jsonl", f"data.sources=[{{path: {file}}}]", f"cache_dir={folder}"]
    return Stages.of(compose_run([*own, *more]), pairs)


def of_role(stages: Stages, role: str) -> str:
    (shown,) = stages.pairs
    return "".join(t.text for tokens in shown.parts.values() for t in tokens if t.role == role)


def test_rows_that_the_run_will_decide(tiny_folder: Path, tmp_path: Path) -> None:
    row = {"prompt": "Hi", "chosen": "Yes?\nOh.", "rejected": "No."}
    model = f"model.path={tiny_folder}"
    told = text(stages_of([row], tmp_path, model, "train.tokens_per_row=auto"))
    assert (
        "note   rows of 1,024 tokens are shown; train.tokens_per_row=auto is decided where the run "
        "trains (simpo plan shows it for a GPU)\n" in told
    )
    assert " tokens of 1,024, " in told


def test_every_part_in_its_role(tiny_folder: Path, tmp_path: Path) -> None:
    """No weights are needed: the model's folder holds its tokenizer only."""
    model = tmp_path / "tokenizer"
    model.mkdir()
    for file in tiny_folder.glob("token*"):
        (model / file.name).write_bytes(file.read_bytes())
    for file in tiny_folder.glob("chat_template*"):
        (model / file.name).write_bytes(file.read_bytes())
    row = {"prompt": "Hi", "chosen": "Yes?\nOh.", "rejected": "No."}
    shown = stages_of([row], tmp_path, f"model.path={model}")
    assert of_role(shown, "prompt") == "<|im_start|>user↵Hi<|im_end|>↵<|im_start|>assistant↵"
    assert of_role(shown, "chosen") == "Yes?↵Oh.<|im_end|>"
    assert of_role(shown, "rejected") == "No.<|im_end|>"
    told = text(shown)
    assert "loss = -log sigmoid(2*(l_w - l_l) - 1)" in told
    assert "user: Hi\nchosen: Yes?\nOh.\nrejected: No.\nprompt, " in told
    assert "[cut" not in told and "\033" not in told
    assert "\033[32mYes?" in text(shown, colors=True).replace("\033[0m", "")


def test_a_dialogue_to_imitate(tiny_folder: Path, tmp_path: Path) -> None:
    more = [f"model.path={tiny_folder}", "model.lora.rank=0", "loss=sft"]
    shown = stages_of([{"messages": TURNS}], tmp_path, *more)
    assert of_role(shown, "chosen") == "Yes?<|im_end|>See you.<|im_end|>"
    assert of_role(shown, "between") == "↵<|im_start|>user↵Bye<|im_end|>↵<|im_start|>assistant↵"
    assert "rejected" not in shown.pairs[0].parts


def test_ranked_responses_with_their_scores(tiny_folder: Path, tmp_path: Path) -> None:
    """Of different numbers; the tables have a column for each, empty where a record lacks it."""
    replies = ["So.", "No.", "Hm.", "Oh?"]
    rows: list[dict[str, Any]] = [
        {"prompt": "Hi", "responses": replies, "scores": [7, 1.5, 7, 2]},
        {"prompt": "Hi", "responses": replies[:3], "scores": [3, 1, 2]},
        {"prompt": "Hi", "chosen": "So.", "rejected": "No."},
    ]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(rows.pop()) + "\n")
    sources = f"[{{path: {tmp_path}/train.jsonl}}, {{path: {tmp_path}/pairs.jsonl}}]"
    more = [f"model.path={tiny_folder}", f"data.sources={sources}", "loss.compare=all"]
    stages = stages_of(rows, tmp_path, *more)
    told = text(stages)
    assert (
        "user: Hi\nchosen (score 7): So.\nrejected (score 1.5): No.\n"
        "other 1 (score 7): Hm.\nother 2 (score 2): Oh?\nprompt, " in told
    )
    assert "chosen (score 1): So.\nrejected (score 0): No.\nprompt, " in told
    assert "tokens " in told and " in 3 train prompts, " in told and "row    3 prompts in " in told
    assert " of 3 train prompts are found by a check\n" in told and "| prompts |" in told
    (whole,) = (shown for shown in stages.pairs if len(shown.parts) == 5)
    for name, said in zip(("chosen", "rejected", "other 1", "other 2"), replies, strict=True):
        assert "".join(token.text for token in whole.parts[name]) == f"{said}<|im_end|>"
    assert {token.role for token in whole.parts["other 2"]} == {"other"}
    assert "\033[35mOh?" in text(stages, colors=True).replace("\033[0m", "")
    assert [line["tokens of"] for line in stages.lengths] == [
        *("prompt", "chosen", "rejected", "other 1", "other 2")
    ]
    # A record that lacks a response does not count among its lengths.
    assert stages.lengths[-1]["shortest"] == len(whole.parts["other 2"])
    assert len(stages.row) == 3
    for line in stages.row:
        parts = [line[name] for name in ("prompt", "chosen", "rejected", "other 1", "other 2")]
        assert int(str(line["to"])) - int(str(line["from"])) == sum(
            int(str(n)) for n in parts if n != ""
        )
    lacking = [[name for name in ("other 1", "other 2") if not line[name]] for line in stages.row]
    assert sorted(lacking) == [[], ["other 1", "other 2"], ["other 2"]]
    assert 'class="other"' in page(stages) and "other 2 (score 2)" in page(stages)


OWLS = {"prompt": "Tell me of owls. " * 4, "chosen": "They hunt. " * 9, "rejected": "Owls\u00e9?"}


@pytest.mark.matrix
@given(st.integers(8, 60), st.integers(0, 40), st.sampled_from(["keep_end", "keep_start"]))
@settings(max_examples=12, deadline=None)
def test_what_is_not_cut_is_what_is_trained_on(
    tiny_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    longest: int,
    prompt: int,
    end: str,
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    more = [
        f"model.path={tiny_folder}",
        f"data.max_length_tokens={longest}",
        f"data.max_prompt_tokens={min(1 + prompt, longest - 1)}",
        f"data.prompt_truncation={end}",
    ]
    stages = stages_of([OWLS], folder, *more)
    (shown,) = stages.pairs
    (line,) = stages.row
    (whole,) = stages_of([OWLS], folder, more[0], f"data.max_length_tokens={ENDLESS}").pairs
    for name, tokens in shown.parts.items():
        kept = [token.id for token in tokens if token.role != "cut"]
        assert len(kept) == line[name]
        assert [token.id for token in tokens] == [token.id for token in whole.parts[name]]
        cut = [i for i, token in enumerate(tokens) if token.role == "cut"]
        assert cut == list(range(cut[0], cut[-1] + 1)) if cut else True
        if name != "prompt" or end == "keep_start":
            assert not cut or cut[-1] == len(tokens) - 1
    assert line["to"] == sum(int(str(line[name])) for name in shown.parts)


def test_a_cut_prompt_keeps_its_bos(tmp_path: Path) -> None:
    more = ["model=llama3_instruct", f"model.path={FOLDERS['llama3']()}"]
    more += ["data.max_length_tokens=24", "data.max_prompt_tokens=12"]
    (shown,) = stages_of([OWLS], tmp_path, *more).pairs
    roles = [token.role for token in shown.parts["prompt"]]
    assert roles[0] == roles[-1] == "prompt" and roles[1] == "cut" and roles.count("prompt") == 12
    assert shown.parts["prompt"][0].text == "<|begin_of_text|>"


def test_the_page_in_a_browser(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "1 < 2 & 3?", "chosen": "Yes <b>", "rejected": f"No {n}"} for n in "ab"]
    stages = stages_of(
        rows,
        tmp_path,
        f"model.path={tiny_folder}",
        "model.lora.rank=0",
        "data.max_length_tokens=30",
        "data.max_prompt_tokens=20",
    )
    file = tmp_path / "preview.html"
    file.write_text(page(stages), encoding="utf-8")
    seen = look_at(file)
    assert seen.console == []
    spans = re.findall(r'<span class="(\w+)" title="(\d+)">(.*?)</span>', seen.html)
    tokens = [t for shown in stages.pairs for part in shown.parts.values() for t in part]
    assert [(role, int(key), html.unescape(word)) for role, key, word in spans] == [
        (token.role, token.id, token.text) for token in tokens
    ]
    assert "<b>" not in seen.html


def test_the_command(tmp_path: Path, tiny_run: list[str]) -> None:
    def preview(*words: str) -> Ended:
        return run_command("simpo.preview", *words, cwd=tmp_path)

    shown = preview(*tiny_run, "pairs=7", "html=look.html")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("\n--- ") == 7
    assert shown.stdout.endswith("page   cleaning.html\npage   look.html\n")
    assert all((tmp_path / name).is_file() for name in ("cleaning.html", "look.html"))
    assert "\n| data.filter.cut_off=true " in shown.stdout
    wrong = preview(*tiny_run, "cleaning=none/at/all.html")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "cleaning: must be a file in a folder that can be written, got none/at/all.html "
        "(cleaning=none writes none)\n",
    )
    wrong = preview("pairs=0")
    assert (wrong.returncode, wrong.stderr) == (2, "pairs: must be 1 or more, got 0\n")
    wrong = preview("loss.betaa=2")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "loss.betaa: no such key (did you mean loss.beta?)\n",
    )
    assert "pairs=N shows N pairs (3)." in preview("--help").stdout
