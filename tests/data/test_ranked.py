"""Records whose replies are all compared: read whole, each reply once, with their scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from simpo.config.choices import OnBadRecord, PairChoice, Reasoning
from simpo.config.compose import compose_run
from simpo.config.data import DataConfig, SourceConfig
from simpo.config.errors import ConfigError, DataError
from simpo.config.filters import FilterConfig
from simpo.data.chats.chat import Chat
from simpo.data.cleaning.filter import CHECKS
from simpo.data.loader import load_data
from simpo.data.mixture import Mixture, load_mixture
from simpo.data.pairs import Pair
from simpo.data.plan import build_plan
from simpo.data.reading.for_loss import reader_of
from simpo.data.reading.records import to_pair, to_ranking
from simpo.data.store import pair_json, pairs_fingerprint
from simpo.loop.console import data_lines
from simpo.loss import Compare, LossConfig
from simpo.loss.simpo import SigmoidConfig
from simpo.loss.token_weighted import MadpoConfig
from simpo.loss.with_coupled_steps import KtoConfig
from simpo.loss.without_reference import SftConfig
from simpo.model.tokenizer import load_tokenizer

ULTRAFEEDBACK = {
    "instruction": "Why?",
    "completions": [
        {"response": text, "overall_score": score}
        for text, score in (("B.", 6.5), ("D.", 2.0), ("A.", 9.0), ("C.", 6.5))
    ],
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, *records: Any) -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


def config(*sources: SourceConfig, **settings: Any) -> DataConfig:
    return DataConfig(name="ranked", sources=list(sources), **settings)


def mixture(*records: Any, settings: dict[str, Any] | None = None, **source: Any) -> Mixture:
    write("a.jsonl", *records)
    return load_mixture(
        config(SourceConfig(path="a.jsonl", **source), **settings or {}), to_ranking
    )


def error(*records: Any, **settings: Any) -> str:
    with pytest.raises(DataError) as told:
        mixture(*records, **settings)
    return str(told.value).splitlines()[0]


def texts(pair: Pair) -> list[Any]:
    """What each response says: chosen, rejected, then those between."""
    return [turns[-1]["content"] for turns in pair.responses]


def scored(*given: tuple[str, Any]) -> dict[str, Any]:
    return {
        "prompt": "Why?",
        "responses": [text for text, _ in given],
        "scores": [score for _, score in given],
    }


def test_the_four_completions_of_ultrafeedback() -> None:
    """The best, the worst, then those between, of which equal ones keep their order."""
    loaded = mixture(ULTRAFEEDBACK)
    (pair,) = loaded.train
    assert pair.prompt == ({"role": "user", "content": "Why?"},)
    assert texts(pair) == ["A.", "D.", "B.", "C."]
    assert pair.scores == (9.0, 2.0, 6.5, 6.5) and pair.score_margin == 7.0
    assert pair.place == "a.jsonl train record 1"
    assert loaded.notes == [
        "note   a.jsonl train: read as replies with scores, 1 record of 4 replies"
    ]
    # Read for a loss of pairs, it is the best with the worst, and says nothing of the others.
    (plain,) = load_mixture(config(SourceConfig(path="a.jsonl")), to_pair).train
    assert (plain.chosen, plain.rejected) == (pair.chosen, pair.rejected)
    assert plain.others == () and plain.scores == ()


@pytest.mark.parametrize(
    ("record", "replies", "scores"),
    [
        # HelpSteer's sign of the preference.
        (
            {"prompt": "Why?", "response1": "A.", "response2": "B.", "overall_preference": 2},
            ["B.", "A."],
            (2.0, 0.0),
        ),
        (
            {"prompt": "Why?", "response_0": "A.", "response_1": "B.", "winner": "response_0"},
            ["A.", "B."],
            (1.0, 0.0),
        ),
        # A rank of 1 is the best.
        (
            {"prompt": "Why?", "replies": ["A.", "B.", "C."], "ranks": ["2", "1", "3"]},
            ["B.", "C.", "A."],
            (-1.0, -3.0, -2.0),
        ),
        # Both the replies and two of them, as distilabel writes them: all tell more.
        (
            {
                "prompt": "Why?", "chosen": "A.", "rejected": "C.",
                "generations": ["A.", "B.", "C."], "rating": [5, 4, 1],
            },
            ["A.", "C.", "B."],
            (5.0, 1.0, 4.0),
        ),
        # A reply whose score is null is left out, as is the repetition of a text.
        (scored(("A.", 3), ("B.", None), (" A. ", 1), ("C.", 2)), ["A.", "C."], (3.0, 2.0)),
        # So is that of messages, which columnar files give all keys.
        (
            {
                "prompt": "Why?",
                "responses": [
                    [{"role": "assistant", "content": " A.", "tool_calls": None}],
                    [{"role": "assistant", "content": "A. "}],
                    [{"role": "assistant", "content": "C."}],
                ],
                "scores": [1, 3, 2],
            },
            ["A. ", "C."],
            (3.0, 2.0),
        ),
        ({"prompt": "Why?", "chosen": "A.", "rejected": "B."}, ["A.", "B."], (1.0, 0.0)),
        (
            {
                "prompt": "Why?", "chosen": "A.", "rejected": "B.",
                "score_chosen": "4.5", "score_rejected": 4,
            },
            ["A.", "B."],
            (4.5, 4.0),
        ),
    ],
)  # fmt: skip
def test_records(record: dict[str, Any], replies: list[str], scores: tuple[float, ...]) -> None:
    loaded = mixture(record)
    (pair,) = loaded.train
    assert (texts(pair), pair.scores) == (replies, scores)
    assert len(loaded.notes) == 1 and ": read as " in loaded.notes[0]


def test_which_replies_make_no_record() -> None:
    loaded = mixture(
        scored(("A.", 1), ("B.", 1), ("C.", 1)),
        scored(("A.", 2), ("A.", 1)),
        scored(("A.", 2), ("B.", None)),
        scored(("A.", 2), ("B.", 1.9), ("C.", 1.6)),
        # Without the repetition, the worst one is no worse.
        scored(("A.", 2), ("B.", 2), ("A.", 1)),
        scored(("A.", 2), ("B.", 1.9), ("C.", 1.5)),
        scored(("A.", 1000), ("B.", 1000 + 1e-9)),
        min_margin=0.5,
    )
    assert [texts(pair) for pair in loaded.train] == [["A.", "C.", "B."]]
    assert loaded.notes[1:] == [
        "note   a.jsonl train: 2 pairs not made: equal scores or a tie",
        "note   a.jsonl train: 1 pairs not made: two replies of the same text",
        "note   a.jsonl train: 1 pairs not made: fewer than two replies have a score",
        "note   a.jsonl train: 2 pairs not made: scores closer than min_margin 0.5",
    ]
    # They differ, but not in float32, in which losses compare them.
    near = scored(("A.", 1000), ("B.", 1000 + 1e-9)), scored(("A.", 2), ("B.", 1))
    assert mixture(*near).notes[1:] == [
        "note   a.jsonl train: 1 pairs not made: equal scores or a tie"
    ]


def test_scores_that_contradict_a_pair_are_told_and_not_taken() -> None:
    pair = {"prompt": "Why?", "chosen": "A.", "rejected": "B."}
    assert mixture(pair | {"score_chosen": 1, "score_rejected": 1}).train[0].scores == (1.0, 0.0)
    loaded = mixture(pair | {"score_chosen": 1, "score_rejected": 3})
    assert loaded.train[0].scores == (1.0, 0.0)
    assert loaded.notes[1] == (
        "note   a.jsonl train: 1 of 1 records: score_chosen is below score_rejected"
    )


def test_columns_that_are_not_read_are_told() -> None:
    ranked = scored(("A.", 2), ("B.", 1)) | {"model": "x"}
    assert mixture(ranked).notes[1] == "note   a.jsonl train: columns not read: model"
    pair = {"prompt": "Why?", "chosen": "A.", "rejected": "B.", "responses": "?", "scores": "?"}
    assert mixture(pair).notes[1] == "note   a.jsonl train: columns not read: responses, scores"
    named = [{"role": "assistant", "content": "A.", "name": "x"}]
    ranked = {"prompt": "Why?", "responses": [named, "B."], "scores": [2, 1]}
    assert mixture(ranked).notes[1] == "note   a.jsonl train: columns not read: responses[].name"


def test_a_function_of_the_user_gives_all_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own_replies.py").write_text(
        "def read(record):\n"
        "    scored = {'prompt': record['q'], 'responses': record['a'], 'scores': record['s']}\n"
        "    return [scored, {'prompt': 'Hm?', 'chosen': 'A.', 'rejected': 'B.'}]\n"
    )
    monkeypatch.syspath_prepend(".")
    record = {"q": "Why?", "a": ["B.", "A.", "C."], "s": [2, "3", 1]}
    loaded = mixture(record, format="own_replies:read")
    found = {pair.prompt[0]["content"]: (texts(pair), pair.scores) for pair in loaded.train}
    assert found == {"Why?": (["A.", "C.", "B."], (3, 1, 2)), "Hm?": (["A.", "B."], (1, 0))}
    source = SourceConfig(path="a.jsonl", format="own_replies:read", pairs=PairChoice.all)
    pairs = load_mixture(config(source), to_pair).train
    assert sorted(map(texts, pairs)) == [["A.", "B."]] * 2 + [["A.", "C."], ["B.", "C."]]


def test_replies_of_several_turns_share_their_prompt() -> None:
    """What all replies start with is their prompt; a reply may have turns of others in between."""
    begin = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "What?"}]
    ends = [
        [{"role": "user", "content": said}, {"role": "assistant", "content": f"{said}!"}]
        for said in ("This", "That")
    ]
    other = [begin[0], {"role": "assistant", "content": "No."}]
    replies = [begin + ends[0], begin + ends[1], other]
    (pair,) = mixture({"prompt": begin[:1], "responses": replies, "scores": [3, 2, 1]}).train
    assert pair.prompt == tuple(begin[:1])
    assert pair.chosen == (begin[1], *ends[0]) and pair.others == ((begin[1], *ends[1]),)
    assert pair.rejected == (other[1],)


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (scored(("A.", 3), ("", 2), ("C.", 1)), "other 1: the response is empty"),
        (scored(("A.", 4), ("B.", 3), ("", 2), ("C.", 1)), "other 2: the response is empty"),
        (
            {
                "prompt": "Why?",
                "responses": ["A.", [{"role": "user", "content": "B."}], "C."],
                "scores": [3, 2, 1],
            },
            "other 1: the last turn must be the assistant's, got user",
        ),
        (
            {
                "prompt": "Why?",
                "responses": ["A.", [{"role": "assistant", "content": " A."}], "C."],
                "scores": [3, 2, 1],
            },
            "chosen and other 1 are the same",
        ),
        (
            scored(("A.", 3), ('[{"role": "user", "content": "x"}]', 2), ("C.", 1)),
            "other 1: is the text of messages, and the column was not read as such (write messages "
            "as JSON in every record; a reply that is such a text goes into a message)",
        ),
        (
            scored(("A.", 3), ("B.", "high"), ("C.", 1)),
            "scores[1]: must be a number, got high",
        ),
        (scored(("A.", 1e39), ("B.", 2)), "scores: must be at most 1e+38 in size, got 1e+39"),
    ],
)  # fmt: skip
def test_faults_name_the_reply(record: dict[str, Any], fault: str) -> None:
    good = scored(("A.", 2), ("B.", 1))
    assert error(good, record) == f"a.jsonl train record 2: {fault}"


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (SigmoidConfig(), ["A.", "B."]),
        (KtoConfig(), ["A.", "B."]),
        (MadpoConfig(), ["A.", "B."]),
        (SftConfig(), ["A."]),
        (SigmoidConfig(compare=Compare.all), ["A.", "B.", "C."]),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_any_loss_reads_the_replies_that_a_function_gives(
    loss: LossConfig, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read as the same records of a file are."""
    Path("all_replies.py").write_text("def read(record):\n    return record['own']\n")
    monkeypatch.syspath_prepend(".")
    monkeypatch.delitem(sys.modules, "all_replies", raising=False)
    record = scored(("A.", 3), ("B.", 1), ("C.", 2))
    write("own.jsonl", {"own": record})
    write("plain.jsonl", record)
    for path, form in (("own.jsonl", "all_replies:read"), ("plain.jsonl", None)):
        source = SourceConfig(path=path, format=form)
        (pair,) = load_mixture(config(source), reader_of(loss)).train
        assert texts(pair) == said


def test_reasoning_is_dropped_from_all_replies() -> None:
    said = scored(("<think>x</think>A.", 3), ("<think>y</think>B.", 2), ("C.", 1))
    (pair,) = mixture(said, settings={"reasoning": Reasoning.drop}).train
    assert texts(pair) == ["A.", "C.", "B."] and pair.scores == (3, 1, 2)
    bad = scored(("A.", 3), ("<think>y</think>", 2), ("C.", 1))
    settings = {"reasoning": Reasoning.drop, "on_bad_record": OnBadRecord.drop}
    loaded = mixture(said, bad, settings=settings)
    assert loaded.table[0].bad == {"other 1: the response is empty": 1}


def test_checks_look_at_all_replies() -> None:
    cut = "The reason for all of this is that we never once"
    said = [("A", 4), ("B", 3), ("C", 1)]
    records = {
        "filter.max_length_ratio": scored(*said, ("A" * 9, 2)),
        "filter.cut_off": scored(*said, (cut, 2)),
        "filter.min_score_margin": scored(("A", 1.0), ("B", 0.995), ("C", 0.999)),
        "filter.exact_duplicates": scored(*said, ("D", 2)),
    }
    found = {check.key: check for check in CHECKS}

    def reasons(key: str, setting: Any, *given: Any) -> list[str | None]:
        read = mixture(*given).read
        return found[key].find(read, setting, [])

    assert reasons("filter.max_length_ratio", 4, records["filter.max_length_ratio"]) == [
        "other 2 is 9.0 times as long as chosen: 9 and 1 characters"
    ]
    assert reasons("filter.cut_off", True, records["filter.cut_off"]) == [
        "other 2 ends with: is that we never once"
    ]
    assert reasons("filter.min_score_margin", 0.01, records["filter.min_score_margin"]) == [
        "score of chosen less score of rejected: 0.005"
    ]
    whole = records["filter.exact_duplicates"]
    assert reasons("filter.exact_duplicates", True, whole, scored(*said), whole) == [
        None, None, "the same as a.jsonl train record 1",
    ]  # fmt: skip


def test_held_out_prompts_are_kept_out_of_ranked_records() -> None:
    write("b.jsonl", ULTRAFEEDBACK)
    write("a.jsonl", scored(("A.", 2), ("B.", 1)), scored(("A.", 2), ("B.", 1)) | {"prompt": "So?"})
    source = SourceConfig(path="a.jsonl", test_path="b.jsonl")
    loaded = load_mixture(config(source, drop_overlap=True), to_ranking)
    assert [pair.prompt[0]["content"] for pair in loaded.train] == ["So?"]
    (held_out,) = loaded.test
    assert len(held_out.responses) == 4 and held_out.held_out_set == "b"


def test_sources_of_pairs_and_of_ranked_replies_are_mixed() -> None:
    write("a.jsonl", ULTRAFEEDBACK)
    write("b.jsonl", {"prompt": "So?", "chosen": "A.", "rejected": "B."})
    sources = [SourceConfig(path="a.jsonl"), SourceConfig(path="b.jsonl", weight=2)]
    loaded = load_mixture(config(*sources, filter=FilterConfig(cut_off=True)), to_ranking)
    assert [len(pair.responses) for pair in loaded.train] == [4, 2, 2]
    assert [len(pair.scores) for pair in loaded.train] == [4, 2, 2]


def test_fingerprints() -> None:
    """Those of pairs are what they were before there were others; scores and others change them."""
    pair = to_pair({"prompt": "Why?", "chosen": "A.", "rejected": "B."}, "x")
    assert json.loads(pair_json(pair)).keys() == {
        *("prompt", "chosen", "rejected", "place", "rule", "held_out_set", "score_margin", "tools")
    }
    assert pairs_fingerprint([pair]) == "a16cc697500b269f"
    (ranked,) = mixture(scored(("A.", 3), ("C.", 2), ("B.", 1))).train
    (other,) = mixture(scored(("A.", 3), ("D.", 2), ("B.", 1))).train
    (better,) = mixture(scored(("A.", 3), ("C.", 2.5), ("B.", 1))).train
    assert len({pairs_fingerprint([one]) for one in (pair, ranked, other, better)}) == 4


def test_odd_records_of_a_function_are_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("odd_replies.py").write_text("def read(record):\n    return record['own']\n")
    monkeypatch.syspath_prepend(".")
    odd = [
        ({"prompt": "Why?", "responses": "AB", "scores": "21"}, "must list two replies or more"),
        (
            {"prompt": "Why?", "responses": ["A.", "B."], "scores": [1]},
            "a number for each of the 2",
        ),
        ({"responses": ["A.", "B."], "scores": [2, 1]}, "missing (the record has responses, sc"),
        ({"prompt": "Why?"}, "chosen: missing (the record has prompt)"),
    ]
    for record, fault in odd:
        assert fault in error({"own": record}, format="odd_replies:read")


PAIRS_OF_A_SOURCE = (
    "data.sources[0].pairs: the loss compares all replies to a prompt, got all (leave it out)"
)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["data.sources=[{path: a.jsonl, pairs: all}]"], PAIRS_OF_A_SOURCE),
        (
            ["data.compat=paper"],
            "data.compat: paper has pairs only, and the loss compares all replies to a prompt "
            "(set data.compat=none)",
        ),
        (
            ["rounds.number=2", "on_policy.reward=rules"],
            "on_policy.choice: the loss compares all replies to a prompt, got best_worst "
            "(set on_policy.choice=ranked)",
        ),
        (
            [
                "rounds.number=2",
                "on_policy.reward=rules",
                "on_policy.choice=ranked",
                "rounds.choice=all",
            ],
            "rounds.choice: the loss compares all replies to a prompt, got all "
            "(set rounds.choice=ranked)",
        ),
        (["rounds.number=2", "on_policy.reward=rules", "rounds.choice=ranked"], None),
    ],
)
def test_settings_that_do_not_go_with_it(words: list[str], problem: str | None) -> None:
    write("a.jsonl", ULTRAFEEDBACK)
    words = ["data=jsonl", "data.sources=[{path: a.jsonl}]", *words]
    compose_run(words)
    if problem is None:
        compose_run([*words, "loss.compare=all"])
        return
    with pytest.raises(ConfigError) as told:
        compose_run([*words, "loss.compare=all"])
    assert str(told.value) == problem


@pytest.mark.parametrize(
    ("loss", "score", "counted", "kind"),
    [
        ("loss.compare=all", 2, "       1 other responses cut", "prompts"),
        ("loss=sigmoid", 2, None, "pairs"),
        ("loss=madpo", 0, "       1 rejected cut", "pairs"),
    ],
)
def test_cut_responses_are_counted(
    loss: str, score: float, counted: str | None, kind: str, tiny_run: list[str]
) -> None:
    """A response between the best and the worst is cut; as a pair, they are not. The worst is."""
    write("a.jsonl", scored(("Yes.", 3), ("So it is. " * 20, score), ("No.", 1)))
    limits = ["data.max_prompt_tokens=60", "data.max_length_tokens=90"]
    source = "data.sources=[{path: a.jsonl, test_split: null}]"
    run = compose_run([*tiny_run, source, *limits, loss, "loss.sft_weight=0"])
    chat = Chat(load_tokenizer(run.model, Path(run.cache_dir)))
    data = load_data(run, chat, Path(run.cache_dir))
    lines = data_lines(data.table, data.train, build_plan(1, 1, 1, None, 0))
    assert [line for line in lines if " cut" in line] == ([counted] if counted else [])
    assert f" in 1 train {kind}, " in lines[-2 - bool(counted)]
    assert f"plan   1 step of 1 {kind}, 1.00 passes over the train {kind}" in lines
