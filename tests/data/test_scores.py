"""Scores of chosen and rejected, which a loss may need: read, refused, and on rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from simpo.__main__ import main
from simpo.config.compose import compose_run
from simpo.config.data import DataConfig, SourceConfig
from simpo.config.errors import DataError
from simpo.data.mixture import load_mixture
from simpo.data.reading.for_loss import reader_of, to_scored_pair
from simpo.data.reading.records import to_dialogue, to_pair
from simpo.data.store import pairs_fingerprint
from simpo.loop.train import train
from simpo.loss import LossConfig
from simpo.loss.token_weighted import MadpoConfig, WpoConfig
from simpo.loss.weighted_sum import MixConfig
from simpo.loss.without_reference import SftConfig
from tests.support.whole_runs import metrics_of

NO_SCORES = (
    "has no scores of chosen and rejected, which the loss needs (add the numbers score_chosen and "
    "score_rejected, or choose a loss without scores)"
)
PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
SCORED = PAIR | {"score_chosen": 2.5, "score_rejected": "1"}


def scores_of(folder: Path, *records: dict[str, Any], **settings: Any) -> list[tuple[float, ...]]:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DataConfig(name="rows", sources=[SourceConfig(path=str(path))], **settings)
    return [pair.scores for pair in load_mixture(config, to_scored_pair).read]


@pytest.mark.parametrize(
    ("loss", "reader"),
    [
        (MadpoConfig(), to_scored_pair),
        (MixConfig(parts={"madpo": 0.5, "dpo": 1}), to_scored_pair),
        (MixConfig(parts={"bco": 0.5, "dpo": 1}), to_pair),
        (WpoConfig(), to_pair),
        (SftConfig(), to_dialogue),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_the_loss_chooses_what_reads(loss: LossConfig, reader: object) -> None:
    assert reader_of(loss) is reader


def test_scores_are_read(tmp_path: Path) -> None:
    named = PAIR | {"chosen_rating": 4, "rejected_rating": 5}
    assert scores_of(tmp_path, SCORED, named) == [(2.5, 1.0), (4.0, 5.0)]


def test_a_record_without_scores_is_refused(tmp_path: Path) -> None:
    one = PAIR | {"score_chosen": 2.5}
    with pytest.raises(DataError) as caught:
        scores_of(tmp_path, SCORED, one, PAIR | {"score_chosen": 1, "score_rejected": "nan"})
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/a.jsonl train record 2: {NO_SCORES}",
        f"{tmp_path}/a.jsonl train record 3: {NO_SCORES}",
        "(mend the records, or leave them out with data.on_bad_record=drop)",
    ]


def test_a_score_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        scores_of(tmp_path, SCORED, PAIR | {"score_chosen": 1e39, "score_rejected": 0})
    first = str(caught.value).splitlines()[0]
    fault = "scores: must be at most 1e+38 in size, got 1e+39"
    assert first == f"{tmp_path}/a.jsonl train record 2: {fault}"


def test_other_losses_keep_their_fingerprints() -> None:
    """Scores change nothing where they are not needed."""
    plain = [to_pair(PAIR, "a")]
    fingerprint = pairs_fingerprint(plain)
    assert pairs_fingerprint([to_pair(SCORED, "a")]) == fingerprint
    scored = pairs_fingerprint([to_scored_pair(SCORED, "a")])
    other = pairs_fingerprint([to_scored_pair(SCORED | {"score_chosen": 3}, "a")])
    assert len({fingerprint, scored, other}) == 3


def test_a_run_without_scores_loads_no_weights(
    tiny_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("simpo.loop.setup.load_policy", lambda *_: pytest.fail("loaded"))
    words = [*tiny_run, "loss=madpo", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit, match="2"):
        main(["train", *words])
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"{tmp_path}/train.jsonl train record 1: {NO_SCORES}"


def test_a_run_weighs_by_scores(tiny_run: list[str], tmp_path: Path) -> None:
    """Before the first step the loss of DPO is ln 2; margins of 0, -3 and tau = 2 weigh 1."""
    for split in ("train", "test"):
        path = tmp_path / f"{split}.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        margins = [(0.0, -3.0, 2.0, 1.0)[i % 4] for i in range(len(records))]
        scored = [
            record | {"score_chosen": 4 + margin, "score_rejected": 4}
            for record, margin in zip(records, margins, strict=True)
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in scored))
    folder = tmp_path / "run"
    words = ["loss=madpo", "train.max_steps=2", "sample.num_prompts=0", f"run_dir={folder}"]
    train(compose_run([*tiny_run, *words]))
    # c = 0.5 + 1.5 / (1 + 2 / e) at a margin of 1.
    c = 0.5 + 1.5 / (1 + 2 / math.e)
    weight = (1 + math.exp(-1)) / (1 + math.exp(-c))
    expected = (3 + weight) / 4 * math.log(2)
    assert metrics_of(folder)[0]["eval/loss"] == pytest.approx(expected, rel=1e-5)
