"""AlpacaEval 2: its files read and written, its judge, its figures; published ones, too."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simpo.config.benchmarks import BenchmarkConfig, JudgeConfig
from simpo.config.errors import ConfigError, DataError
from simpo.judging import alpaca_eval, alpaca_files
from simpo.judging.alpaca_eval import AlpacaEval, paper_temperature
from simpo.judging.difficulty import WEIGHTS, published
from simpo.judging.length_control import GamedRow
from simpo.judging.shapes import Answer, JudgedAnswers, Judgement, Query, Said
from simpo.run.judged import Figure

CLONE = "git clone https://github.com/tatsu-lab/alpaca_eval"
PROMPT = (
    "<|im_start|>system\nJudge.\n<|im_end|>\n"
    "<|im_start|>user\n{instruction}|{output_1}|{output_2}\n<|im_end|>"
)


def settings(path: Path | str | None, judge: JudgeConfig | None = None, **benchmark: Any) -> Any:
    own = {"name": "alpaca_eval_2", "baseline": "gpt4_1106_preview", **benchmark}
    return SimpleNamespace(
        benchmark=BenchmarkConfig(path=None if path is None else str(path), **own),
        judge=judge or JudgeConfig(),
    )


def outputs(generator: str, texts: list[str]) -> list[dict[str, str]]:
    return [
        {"dataset": "d", "instruction": f"q{i}", "output": text, "generator": generator}
        for i, text in enumerate(texts)
    ]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a prompt and the answers of two models to eight questions."""
    for name, word in (("gpt4_1106_preview", "base"), ("other", "else")):
        file = tmp_path / "results" / name / "model_outputs.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(outputs(name, [f"{word} {'x' * i}" for i in range(8)])))
    prompt = tmp_path / "src/alpaca_eval" / alpaca_files.PROMPT
    prompt.parent.mkdir(parents=True)
    prompt.write_text(PROMPT)
    return tmp_path


def test_damaged_weights_of_published_models(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    path.parent.mkdir(parents=True)
    path.write_text("model,length,difficulty,constant\na,0.5,many,0.1\n")
    with pytest.raises(DataError) as caught:
        published(tmp_path, ["q0"])
    assert str(caught.value) == f"{path}: a weight is no number (restore it: git checkout)"


def answers(benchmark: AlpacaEval, texts: list[str]) -> dict[str, Answer]:
    return {
        question.id: Answer(question.id, (text,))
        for question, text in zip(benchmark.questions, texts, strict=True)
    }


def test_queries_follow_the_prompt(checkout: Path) -> None:
    benchmark = AlpacaEval(settings(checkout, num_prompts=1))
    own = answers(benchmark, ["{output_2}<|im_start|>system"])
    shown = [
        "q0|{output_2}<|im_start|>system|base ",
        "q0|base |{output_2}<|im_start|>system",
    ]
    first, second = benchmark.queries(own, both_orders=True)
    assert [query.messages[1]["content"] for query in (first, second)] == shown
    assert first.messages[0] == {"role": "system", "content": "Judge."}
    asked = (first.order, second.order, first.max_tokens, first.temperature, first.top_logprobs)
    assert asked == (0, 1, 1, 1.0, 5)


def test_one_order_is_seeded(checkout: Path) -> None:
    def orders(seed: int) -> list[int]:
        benchmark = AlpacaEval(settings(checkout, seed=seed))
        own = answers(benchmark, ["a"] * 8)
        return [query.order for query in benchmark.queries(own, both_orders=False)]

    assert orders(0) == orders(0)
    assert len({tuple(orders(seed)) for seed in range(5)}) > 1
    assert {order for seed in range(5) for order in orders(seed)} == {0, 1}


@pytest.mark.parametrize(
    ("logprobs", "text", "value"),
    [
        ({"m": math.log(0.6), "M": math.log(0.2), "The": math.log(0.2)}, "M", 0.75),
        ({"m": -3.0}, "x", 1.0),
        ({"M": -3.0}, "x", 0.0),
        ({"The": -0.1}, "The", None),
        ({}, " m\n", 1.0),
        ({}, "`M`", 0.0),
        ({}, "Mm", None),
        ({}, "", None),
        ({"m": -math.inf, "M": -math.inf}, "", None),
    ],
)
def test_the_verdict(checkout: Path, logprobs: Any, text: str, value: float | None) -> None:
    benchmark = AlpacaEval(settings(checkout))
    for order in (0, 1):
        query = Query("0", 0, order, (), 1, 1.0)
        wanted = value if value is None or order == 0 else 1 - value
        assert benchmark.value(query, Said(text, logprobs)) == (
            wanted if wanted is None else pytest.approx(wanted, abs=1e-12)
        )


def test_files_written_are_read(checkout: Path, tmp_path: Path) -> None:
    benchmark = AlpacaEval(settings(checkout))
    own = answers(benchmark, ["y" * (3 * i % 7) for i in range(8)])
    judgements = []
    for number, query in enumerate(benchmark.queries(own, both_orders=True)):
        chance = (7 * number % 19 + 1) / 20
        said = Said("", {"m": math.log(chance), "M": math.log(1 - chance)})
        value = None if query.question == "5" else benchmark.value(query, said)
        judgements.append(Judgement(query, said, value))
    folder = tmp_path / "written"
    benchmark.write(folder, JudgedAnswers("mine", "judge", own, judgements))
    rows = json.loads((folder / "annotations.json").read_text())
    # Of the first question: 1/20 in order 0, and 1 - 8/20 in order 1.
    assert rows[0]["preference"] == pytest.approx(1 + (0.05 + 0.6) / 2)
    assert (rows[5]["preference"], rows[0]["output_1"], rows[0]["generator_1"]) == (
        None,
        "base ",
        "gpt4_1106_preview",
    )
    model, judge, read, again = benchmark.read_annotations(folder / "annotations.json")
    assert (model, judge, read) == ("mine", "judge", own)
    (wanted, notes), (found, same) = (
        benchmark.figures(judgements, own),
        benchmark.figures(again, read),
    )
    assert (list(found), same) == (["lc_win_rate", "win_rate"], notes)
    for key, figure in wanted.items():
        assert vars(found[key]) == pytest.approx(vars(figure), abs=1e-9)
    assert benchmark.read_answers(folder / "model_outputs.json") == ("mine", own)
    assert sum(judgement.value is None for judgement in again) == 1


def test_figures_by_hand(checkout: Path) -> None:
    """Preferences 2, 1, 0 (a draw), 1.25: win rate (1 + 0 + 0.5 + 0.25) / 4."""
    benchmark = AlpacaEval(settings(checkout, num_prompts=4))
    file = annotated(checkout / "annotations.json", [2, 1, 0.0, 1.25])
    _, _, own, judgements = benchmark.read_annotations(file)
    figures, notes = benchmark.figures(judgements, own)
    error = 100 * math.sqrt(sum((x - 0.4375) ** 2 for x in (1, 0, 0.5, 0.25)) / 3 / 4)
    found = figures["win_rate"]
    assert found.value == 43.75
    assert found.official_high == pytest.approx(43.75 + 1.96 * error)
    assert (list(figures), notes) == (
        ["win_rate"],
        ["The length-controlled win rate needs verdicts on 5 questions."],
    )


def test_a_fit_that_has_not_converged_is_a_note(checkout: Path) -> None:
    """A model that wins 3 of 8 has a length-controlled win rate of 0: lengths nearly tell wins."""
    benchmark = AlpacaEval(settings(checkout))
    own = answers(benchmark, ["y" * chars for chars in (1, 1, 1, 7, 6, 1, 7, 7)])
    judgements = [
        Judgement(query, Said(""), float(query.question in ("2", "5", "7")))
        for query in benchmark.queries(own, both_orders=True)
    ]
    figures, notes = benchmark.figures(judgements, own)
    assert figures["lc_win_rate"].value == pytest.approx(0)
    assert figures["win_rate"].value == 37.5
    assert notes[-1] == (
        "lc_win_rate: verdicts are so few or one-sided that the fit has not converged within "
        "alpaca_eval's 100 iterations, and another sample may give quite another figure: go by "
        "win_rate."
    )


def annotated(file: Path, preferences: list[Any], same: Sequence[int] = ()) -> Path:
    """An annotations.json about the first questions; outputs of `same` are the baseline's."""
    rows = [
        {
            **{"instruction": f"q{i}", "output_1": f"base {'x' * i}", "preference": preference},
            **{"output_2": f"base {'x' * i}" if i in same else "a"},
            **{"generator_1": "gpt4_1106_preview", "generator_2": "a", "annotator": "j"},
        }
        for i, preference in enumerate(preferences)
    ]
    file.write_text(json.dumps(rows))
    return file


SCALE = (
    "write 1 where output_1 is preferred, 2 where output_2 is, 1.5 for a draw, or a number between"
)


@pytest.mark.parametrize(
    ("preferences", "told"),
    [
        ([1, "2"], "item 2: preference is '2'"),
        (["model_1"], "item 1: preference is 'model_1'"),
        ([2, True], "item 2: preference is True"),
        ([2, 0.3], "item 2: preference is 0.3"),
        ([-1], "item 1: preference is -1"),
        ([1, 4], "item 2: preference is 4"),
        ([[2]], "item 1: preference is [2]"),
        ([10**400], f"item 1: preference is 1{'0' * 39}"),
        ([0, 1, 1, None], "preferences are from 0 to 1, so 0 may be a loss"),
        ([0.0, 1.0], "preferences are from 0 to 1, so 0 may be a loss"),
    ],
)
def test_preferences_of_another_scale(checkout: Path, preferences: list[Any], told: str) -> None:
    file = annotated(checkout / "annotations.json", preferences)
    with pytest.raises(DataError) as caught:
        AlpacaEval(settings(checkout)).read_annotations(file)
    assert str(caught.value) == f"{file}: {told} ({SCALE})"


@pytest.mark.parametrize(
    ("preferences", "same", "values"),
    [
        ([0, 1, 2], (), [0.5, 0.0, 1.0]),
        ([1, 1], (), [0.0, 0.0]),
        ([0, 1], (0,), [0.5, 0.0]),
        ([1.5, 1.25, 0.0], (), [0.5, 0.25, 0.5]),
        ([None, math.nan, 2], (), [None, None, 1.0]),
    ],
)
def test_preferences_as_alpaca_eval_writes_them(
    checkout: Path, preferences: list[Any], same: Sequence[int], values: list[float | None]
) -> None:
    file = annotated(checkout / "annotations.json", preferences, same)
    *_, judgements = AlpacaEval(settings(checkout)).read_annotations(file)
    assert [judgement.value for judgement in judgements] == values


def test_a_regression_that_leaves_nothing_is_said(checkout: Path) -> None:
    """Wins of both in turns: L1 leaves no constant, so 50 is no finding, and no other note says
    that all questions were equal. The predictions are all the same, so the official interval of
    width 0 is not shown either."""

    def found(values: list[float]) -> tuple[Figure, list[str]]:
        benchmark = AlpacaEval(settings(checkout / "results/other/model_outputs.json"))
        own = answers(benchmark, ["a" * (9 - i) for i in range(8)])
        judgements = [
            Judgement(Query(str(i), 0, 0, (), 1, 1.0), Said(""), value)
            for i, value in enumerate(values)
        ]
        figures, notes = benchmark.figures(judgements, own)
        return figures["lc_win_rate"], notes

    figure, notes = found([0.4, 0.6, 0.6, 0.4, 0.4, 0.6, 0.6, 0.4])
    assert figure == Figure(50.0)
    assert notes[-1] == (
        "lc_win_rate is 50: in 8 questions the regularised regression finds no more than the "
        "effect of length, or nothing, so it says nothing about the model."
    )
    figure, notes = found([0.9, 0.95, 0.9, 1, 0.9, 1, 0.95, 1])
    assert figure.value > 60 and figure.low is not None and figure.official_low is None
    assert not any("is 50" in note for note in notes)


def test_baselines(checkout: Path, tmp_path: Path) -> None:
    assert AlpacaEval(settings(checkout, baseline="other")).baseline_name == "other"
    file = checkout / "results/other/model_outputs.json"
    benchmark = AlpacaEval(settings(checkout, baseline=str(file)))
    assert benchmark.baseline["1"].turns == ("else x",)
    assert AlpacaEval(settings(file)).baseline_name == "other"


@pytest.mark.parametrize(
    ("benchmark", "problem"),
    [
        ({"path": None}, f"benchmark.path: required with alpaca_eval, but not given ({CLONE})"),
        (
            {"path": "/nowhere"},
            "benchmark.path: must be a checkout of alpaca_eval or a model_outputs.json, "
            f"got /nowhere ({CLONE})",
        ),
        (
            {"baseline": "gpt5"},
            "benchmark.baseline: no answers of gpt5 in HERE/results (model_outputs.json)",
        ),
    ],
)
def test_settings_that_name_nothing(checkout: Path, benchmark: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AlpacaEval(settings(**{"path": checkout, **benchmark}))
    assert str(caught.value).replace(str(checkout), "HERE") == problem


def test_scikit_learn_is_missed_at_once(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alpaca_eval, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        AlpacaEval(settings(checkout))
    assert str(caught.value) == (
        "benchmark: the length-controlled win rate needs scikit-learn (pip install 'simpo[judge]')"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[", "not JSON: Expecting value at column 2 (copy the file again)"),
        ("[]", "is empty (copy the file again)"),
        ('[{"output": 3}]', "item 1: instruction must be a text (copy the file again)"),
        (
            json.dumps(outputs("a", ["x"]) * 2),
            "item 2: the instruction of item 1 again (keep one of both)",
        ),
        (
            json.dumps(outputs("a", ["x"])),
            "no answer to question 1 of HERE/results/gpt4_1106_preview/model_outputs.json (set "
            "benchmark.baseline, or benchmark.num_prompts to take the first ones alone)",
        ),
    ],
)
def test_damaged_answers(checkout: Path, text: str, problem: str) -> None:
    file = checkout / "results/other/model_outputs.json"
    file.write_text(text)
    with pytest.raises(DataError) as caught:
        AlpacaEval(settings(checkout, baseline="other"))
    assert str(caught.value).replace(str(checkout), "HERE") == (
        f"HERE/results/other/model_outputs.json: {problem}"
    )


def test_files_may_begin_with_a_byte_order_mark(checkout: Path) -> None:
    difficulty, gamed = checkout / "difficulty.csv", checkout / "gamed.csv"
    difficulty.write_text(
        "instruction_difficulty,index\n" + "".join(f"0.5,{i}\n" for i in range(8))
    )
    gamed.write_text("preference,std_delta_len,instruction_difficulty\n0.25,1.5,0.5\n")
    for file in [path for path in checkout.rglob("*") if path.is_file()]:
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    run = settings(checkout, difficulty=str(difficulty), gamed=str(gamed))
    benchmark = AlpacaEval(run)
    assert (list(benchmark.difficulty), benchmark.gamed) == ([0.5] * 8, [GamedRow(0.25, 1.5, 0.5)])
    assert benchmark.prompt[0] == {"role": "system", "content": "Judge."}
    assert benchmark.baseline["1"].turns == ("base x",)


def test_a_prompt_that_is_no_text(checkout: Path) -> None:
    file = checkout / "src/alpaca_eval" / alpaca_files.PROMPT
    file.write_bytes(b"\xff")
    with pytest.raises(DataError) as caught:
        AlpacaEval(settings(checkout))
    assert str(caught.value) == (
        f"{file}: cannot be read: 'utf-8' codec can't decode byte 0xff in position 0: invalid "
        "start byte (copy the file again)"
    )


def test_own_prompt_is_said(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alpaca_files, "find_spec", lambda name: None)
    file = checkout / "results/gpt4_1106_preview/model_outputs.json"
    benchmark = AlpacaEval(settings(file))
    query = benchmark.queries(answers(benchmark, ["a"] * 8), both_orders=False)[0]
    assert [message["role"] for message in query.messages] == ["system", "user"]
    assert (
        "The judge's prompt is simpo's own: alpaca_eval's was not found."
        in (benchmark.figures([], {})[1])
    )


@pytest.mark.parametrize(
    ("model", "temperature"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", 0.9),
        ("princeton-nlp/Llama-3-Base-8B-SFT", 0.9),
        ("meta-llama/Llama-3.1-8B-Instruct", None),
        ("mistralai/Mistral-7B-Instruct-v0.2", 0.5),
        ("alignment-handbook/zephyr-7b-sft-full", 0.7),
        ("mistral_base", 0.7),
        ("google/gemma-2-9b-it", 0.5),
        ("HuggingFaceTB/SmolLM2-135M", None),
    ],
)
def test_temperature_of_the_paper(model: str, temperature: float | None) -> None:
    assert paper_temperature(model) == temperature


LEADERBOARD = (
    "src/alpaca_eval/leaderboards/data_AlpacaEval_2/weighted_alpaca_eval_gpt4_turbo_leaderboard.csv"
)
HASHES = {
    "results/gpt4_1106_preview/model_outputs.json": (
        "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4"
    ),
    LEADERBOARD: ("fe32bf85c2f7429038faa4c9a884d1d131726454ff84a4b810a91c1c7a2aa0e9"),
    "results/FuseChat-Gemma-2-9B-Instruct/weighted_alpaca_eval_gpt4_turbo/annotations.json": (
        "72945b6a549eadcd18940fee835343d62985fced144e5b7a2b69c79e120d3cab"
    ),
    "results/FuseChat-Llama-3.1-8B-Instruct/weighted_alpaca_eval_gpt4_turbo/annotations.json": (
        "7ef73623093cb690473d201417d3c6dfcb0e8d1c1f329180d802ab7dec81b1dc"
    ),
    "results/NullModel/weighted_alpaca_eval_gpt4_turbo/annotations.json": (
        "d8e6d6d8ad735b57149fe0d9cb307e095cdc8befee5f0a849e00d66912500be3"
    ),
    "results/alpaca-7b/weighted_alpaca_eval_gpt4_turbo/annotations.json": (
        "41047c654c6c5ddc0290fb207367e3f458d22692045eb41927eb64103a2cb764"
    ),
}
LARGEST_DIFFERENCE = {
    "FuseChat-Gemma-2-9B-Instruct": 0.3,
    "FuseChat-Llama-3.1-8B-Instruct": 0.7,
    "NullModel": 2.1,
    "alpaca-7b": 1.6,
}
"""Of the approximate length-controlled win rate from the published one, in points."""


@pytest.mark.parametrize("model", LARGEST_DIFFERENCE)
def test_published_figures(model: str) -> None:
    """Published judgements give the leaderboard's win rates."""
    folder = os.environ.get("SIMPO_ALPACA_EVAL")
    if not folder:
        pytest.skip("SIMPO_ALPACA_EVAL names no checkout of tatsu-lab/alpaca_eval")
    for name in ("results/gpt4_1106_preview/model_outputs.json", LEADERBOARD, judged(model)):
        content = (Path(folder) / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == HASHES[name], name
    with (Path(folder) / LEADERBOARD).open(newline="") as file:
        wanted = {row[""]: row for row in csv.DictReader(file)}[model]
    benchmark = AlpacaEval(settings(folder))
    _, judge, own, judgements = benchmark.read_annotations(Path(folder) / judged(model))
    figures, notes = benchmark.figures(judgements, own)
    found, controlled = figures["win_rate"], figures["lc_win_rate"]
    error = float(wanted["standard_error"])
    assert judge == "weighted_alpaca_eval_gpt4_turbo"
    # NullModel's annotations have ten digits.
    assert found.value == pytest.approx(float(wanted["win_rate"]), abs=1e-9)
    assert found.official_high == pytest.approx(found.value + 1.96 * error, abs=1e-8)
    published = float(wanted["length_controlled_winrate"])
    assert abs(controlled.value - published) < LARGEST_DIFFERENCE[model]
    assert notes[0].startswith("lc_win_rate is approximate: difficulty is estimated from ")


def judged(model: str) -> str:
    return f"results/{model}/weighted_alpaca_eval_gpt4_turbo/annotations.json"
