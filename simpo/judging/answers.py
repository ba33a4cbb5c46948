"""Draws a model's answers to the questions of a benchmark, turn by turn.

They are appended to answers.jsonl batch by batch, each with a hash of all that decides it. So a
stopped drawing goes on to the same answers, and those of other settings stay beside them.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from simpo.config.choices import BenchmarkKind, Checkpointing
from simpo.config.errors import ConfigError, DamagedError, DataError
from simpo.config.models import LoraConfig
from simpo.config.schema import RunConfig
from simpo.data.chats.chat import Chat
from simpo.data.chats.checks import refuse_unknown_ids
from simpo.data.reading.records import RecordFault
from simpo.judging.shapes import Answer, Question
from simpo.model.generate import Sampling, batches
from simpo.model.pretrained import load_settings, num_embeddings
from simpo.model.saved import SavedModel, naming, saved_model
from simpo.model.talk import context_tokens
from simpo.on_policy.engines import Generate, engine_of, with_saved
from simpo.on_policy.files import (
    append_lines,
    content_hash,
    read_lines,
    weights_content,
    working_in,
)
from simpo.run.judged import FOLDER
from simpo.run.progress import bar, say
from simpo.run.rounds import as_begun

FILE = "answers.jsonl"
MOST_BYTES = 200
"""Of a name that a file gives: file systems allow 255, and files have endings."""
TEMPERATURE = 0.7
"""Where neither the settings nor the question nor the paper has one."""


@dataclass(frozen=True)
class Contestant:
    """A model that answers.

    Attributes:
        name: what to call it in tables and files.
        folder: where its answers lie.
        run: the settings of its run, of one of rounds those with which the rounds began, so that
            all of them are asked and compared with the same; None if it lies in none.
    """

    name: str
    folder: Path
    saved: SavedModel
    run: RunConfig | None


def contestant(run: RunConfig, source: str) -> Contestant:
    """Find a model by the folder of its run, its own folder or its hub id.

    Raises:
        ConfigError: there is no model.
    """
    saved = saved_model(source)
    if saved.run is not None and saved.run.run_dir is not None:
        place = Path(saved.run.run_dir).resolve()
        begun = as_begun(saved.run)
        return Contestant(place.name, place / FOLDER / run.benchmark.name, saved, begun)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        name = source.replace("/", "__")
        return Contestant(name, judged_folder(run, name), saved, None)
    place = folder.resolve()
    # Many models lie in a folder `model`.
    own = f"{place.name}-{content_hash(str(place))[:8]}"
    return Contestant(place.name, judged_folder(run, own), saved, None)


def before_training(trained: Contestant) -> Contestant:
    """The model that a run began with, whose answers all runs that began with it share.

    Raises:
        ConfigError: the model lies in no run.
    """
    if trained.run is None:
        raise ConfigError(
            [f"benchmark.baseline: {trained.name} is no run, so its base is not known (name one)"]
        )
    model = trained.run.model
    model = replace(
        model,
        gradient_checkpointing=Checkpointing.none,
        lora=LoraConfig(adapter=model.lora.adapter),
    )
    saved = SavedModel(model.path, trained.run, model, model.lora.adapter is not None)
    folder = saved.cache_dir / "answers" / content_hash(_content("benchmark.baseline", saved))
    return Contestant("base", folder, saved, trained.run)


def judged_folder(run: RunConfig, name: str) -> Path:
    """Where the results of a model lie that lies in no run. Its name may be any text of a file."""
    folder = re.sub(r"[^\w.,:=+-]+", "_", name.replace("/", "__")).strip(".") or "model"
    return (Path(run.output_dir).expanduser() / "judged" / folder / run.benchmark.name).absolute()


def plain_name(name: str) -> str:
    """The name of a model or judge that a file gives, as tables and names of files can hold it."""
    plain = re.sub(r"[^\S ]|[\0-\x1f\x7f\ud800-\udfff]", "_", name)
    return plain.encode()[:MOST_BYTES].decode(errors="ignore") or "model"


def draw(
    run: RunConfig, questions: Sequence[Question], model: Contestant
) -> tuple[dict[str, Answer], list[str]]:
    """A model's answers by question id, those missing drawn now; and notes about them.

    Raises:
        ConfigError: the model cannot be loaded.
        DataError: its chat template refuses a question.
    """
    with working_in(model.folder, wait=True), naming("RUN"):
        drawing = Drawing(run, questions, model)
        for turn in range(max((q.num_turns for q in questions), default=0)):
            drawing.draw_turn(turn)
        return drawing.answers(), drawing.notes


class Drawing:
    """The answers of a model, as far as they are drawn.

    Attributes:
        notes: sentences about questions that could not be answered.
    """

    def __init__(self, run: RunConfig, questions: Sequence[Question], model: Contestant) -> None:
        self._run, self._questions, self._model = run, questions, model
        self._file = model.folder / FILE
        lines = _read(self._file)
        self._chat = _chat(model.saved, lines)
        self._settings = load_settings(model.saved.model, model.saved.cache_dir)
        self._temperatures = {q.id: _temperature(run, q, model) for q in questions}
        decide = self._deciding()
        self._key = content_hash(decide)
        self._known: dict[tuple[str, int], dict[str, Any]] = {
            (line["question"], line["turn"]): line
            for line in lines
            if line["settings"] == self._key and "decide" not in line
        }
        if not any("decide" in line and line["settings"] == self._key for line in lines):
            if lines:
                say(f"note   the answers in {self._file} are of other settings: drawn anew")
            append_lines(self._file, [{"settings": self._key, "decide": decide}])
        self._generate: Generate | None = None
        self.notes: list[str] = []

    def _deciding(self) -> dict[str, Any]:
        """Everything that decides the answers."""
        config, chat = self._run.benchmark, self._chat
        asked = [[q.id, q.prompt, q.follow_ups, q.tools] for q in self._questions]
        return {
            "model": _content("RUN", self._model.saved),
            "chat_template": chat.template_sha256[:16],
            "chat_template_kwargs": dict(chat.template.kwargs or {}),
            "template_date": str(chat.template.date or ""),
            "questions": content_hash(asked),
            "temperatures": content_hash(self._temperatures),
            "top_p": config.top_p,
            "max_new_tokens": config.max_new_tokens,
            "seed": config.seed,
            "batch_prompts": self._run.on_policy.batch_prompts,
            "precision": self._run.train.precision.value,
            "engine": engine_of(self._run.on_policy.engine).value,
        }

    def draw_turn(self, turn: int) -> None:
        """Draw the missing answers to a turn, of which all before are drawn.

        Raises:
            DataError: the chat template refuses a question.
        """
        asked = [q for q in self._questions if q.num_turns > turn]
        ids = self._ids(asked, turn)
        limit = context_tokens(self._settings)
        long = [i for i, found in enumerate(ids) if limit is not None and len(found) >= limit]
        if long:
            self.notes.append(
                f"{len(long)} of {len(asked)} questions fill the model's context of {limit:,} "
                "tokens: their answers are empty."
            )
        self._keep(turn, [(asked[i].id, "", 0, False) for i in long])
        todo = []
        for temperature in sorted(set(self._temperatures[q.id] for q in asked)):
            group = [
                i
                for i, q in enumerate(asked)
                if self._temperatures[q.id] == temperature and i not in long
            ]
            size = self._run.on_policy.batch_prompts
            for batch in batches([len(ids[i]) for i in group], size):
                whole = [group[i] for i in batch]
                if any((asked[i].id, turn) not in self._known for i in whole):
                    todo.append((temperature, whole))
        if not todo:
            return
        if self._generate is None:
            say(f"loading the weights of {self._model.saved.where} ...")
            self._generate = with_saved(self._run, self._model.saved, self._chat)
        config = self._run.benchmark
        what = f"answers of {self._model.name}"
        if any(q.follow_ups for q in self._questions):
            what += f" to turn {turn + 1}"
        with bar(what, sum(len(b) for _, b in todo)) as shown:
            for temperature, batch in todo:
                prompts = [ids[i] for i in batch]
                room = config.max_new_tokens
                if limit is not None:
                    room = min(room, limit - max(map(len, prompts)))
                sampling = Sampling(temperature, config.top_p, room, config.seed)
                replies = zip(batch, self._generate(prompts, sampling), strict=True)
                self._keep(turn, [(asked[i].id, r.text, r.tokens, r.ended) for i, r in replies])
                shown.advance(len(batch))

    def _ids(self, asked: Sequence[Question], turn: int) -> list[list[int]]:
        texts = []
        for question in asked:
            messages = list(question.prompt)
            for before, follow_up in enumerate(question.follow_ups[:turn]):
                said = self._known[question.id, before]["text"]
                messages += [
                    {"role": "assistant", "content": said},
                    {"role": "user", "content": follow_up},
                ]
            try:
                texts.append(self._chat.prompt_text(messages, question.tools))
            except RecordFault as fault:
                raise DataError(f"question {question.id}: {fault} (judge another model)") from fault
        ids = self._chat.encode(texts) if texts else []
        named = zip((f"question {q.id}" for q in asked), ids, strict=True)
        refuse_unknown_ids(self._chat, named, num_embeddings(self._settings))
        return ids

    def _keep(self, turn: int, found: Sequence[tuple[str, str, int, bool]]) -> None:
        lines = [
            {
                "settings": self._key,
                "question": question,
                "turn": turn,
                "text": text,
                "tokens": tokens,
                "ended": ended,
            }
            for question, text, tokens, ended in found
            if (question, turn) not in self._known
        ]
        append_lines(self._file, lines)
        self._known |= {(line["question"], turn): line for line in lines}  # type: ignore[misc]

    def answers(self) -> dict[str, Answer]:
        """The answers by question id; frees the model."""
        self._generate = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {q.id: _answer(q, self._known) for q in self._questions}


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of answers: answers, and what decided them.

    Raises:
        DamagedError: a line is neither.
    """
    lines = read_lines(path)
    for number, line in enumerate(lines, 1):
        match line:
            case {"settings": str(), "decide": {}}:
                continue
            case {
                "settings": str(),
                "question": str(),
                "turn": int(),
                "text": str(),
                "tokens": int(),
                "ended": bool(),
            }:
                continue
        raise DamagedError(path, f"line {number} is no answer", "remove that line")
    return lines


def _answer(question: Question, known: Mapping[tuple[str, int], Mapping[str, Any]]) -> Answer:
    turns = [known[question.id, turn] for turn in range(question.num_turns)]
    return Answer(
        question.id,
        tuple(turn["text"] for turn in turns),
        sum(turn["tokens"] for turn in turns),
        all(turn["ended"] for turn in turns),
    )


def _chat(saved: SavedModel, lines: Sequence[Mapping[str, Any]]) -> Chat:
    """The model's chat; a template that asks for the date gets that of the first answers."""
    chat = saved.chat()
    if saved.run is not None or chat.template.date is None:
        return chat
    for line in lines:
        if written := (line.get("decide") or {}).get("template_date"):
            return Chat(chat.tokenizer, date.fromisoformat(written), chat.template.kwargs)
    return chat


def _temperature(run: RunConfig, question: Question, model: Contestant) -> float:
    if run.benchmark.temperature is not None:
        return run.benchmark.temperature
    if question.temperature is not None:
        return question.temperature
    if run.benchmark.kind is BenchmarkKind.pairs:
        return 0.0
    from simpo.judging.alpaca_eval import paper_temperature

    of_paper = paper_temperature(model.run.model.path if model.run else model.saved.where)
    return TEMPERATURE if of_paper is None else of_paper


def _content(key: str, saved: SavedModel) -> list[Any]:
    """What identifies the weights of a model and how they are loaded."""
    model = saved.model
    weights = weights_content(key, model, saved.cache_dir)
    return [*weights, model.dtype.value, model.quantization.value]
