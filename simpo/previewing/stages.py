"""Shows some pairs of a run at every stage: messages, template text, tokens, packed row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from simpo.config.schema import RunConfig
from simpo.data.chats.chat import Chat
from simpo.data.loader import for_loss, read_mixture
from simpo.data.packing import pack
from simpo.data.pairs import Pair, Tokenized, TokenizedPair, response_names
from simpo.data.plan import TrainPlan, build_plan, pairs_of_step, rows_of_pairs
from simpo.data.reading.messages import tool_name
from simpo.data.store import TokenizedSet
from simpo.data.tokens import tokenize_set
from simpo.loop import console
from simpo.model import cost
from simpo.model.roofline import row_lengths
from simpo.model.tokenizer import load_tokenizer
from simpo.previewing import cleaning
from simpo.previewing.cleaning import Cleaning
from simpo.run.folder import template_date
from simpo.run.tables import html_page, markdown_table

ENDLESS = 10**9
QUANTILES = {"shortest": 0.0, "median": 0.5, "95 %": 0.95, "longest": 1.0}
COLORS = {"prompt": 34, "chosen": 32, "rejected": 31, "other": 35, "between": 36, "cut": 90}
"""Terminal colours by role. `other` is a ranked response between chosen and rejected, `between`
what is not scored between replies, or of one."""
IN_BRACKETS = {"cut": "[cut: ", "between": "[not scored: "}
"""How tokens of a role begin where there are no colours."""


@dataclass(frozen=True)
class Token:
    """A token as text; its role is one of `COLORS`."""

    id: int
    text: str
    role: str


@dataclass(frozen=True)
class Shown:
    """One pair at every stage.

    Attributes:
        place: its source and record.
        messages: its messages, as (role, content).
        parts: the prompt and each response as tokens, with those that are cut off.
    """

    place: str
    messages: list[tuple[str, str]]
    parts: dict[str, list[Token]]


@dataclass(frozen=True)
class Stages:
    """The data that a run would be trained on, at each stage.

    Attributes:
        title: model, data and loss.
        lines: lines about the mixture, its tokens and cuts.
        cleaning: what the checks of `data.filter` find.
        lengths: a line for each part of a pair, in tokens.
        pairs: the first pairs in the order of training.
        row: the packed row with the first pair: a line for each pair in it.
        row_line: a summary of that row.
    """

    title: str
    lines: list[str]
    cleaning: Cleaning
    lengths: list[dict[str, object]]
    pairs: list[Shown]
    row: list[dict[str, object]]
    row_line: str

    @staticmethod
    @console.libraries_quiet()
    def of(run: RunConfig, num_pairs: int) -> Stages:
        """Read, tokenize and pack the data of a run as `simpo.train` would.

        Raises:
            ConfigError, DataError: the settings or the data cannot be used.
        """
        cache_dir = Path(run.cache_dir).expanduser()
        tokenizer = load_tokenizer(run.model, cache_dir, run.data.compat)
        chat = Chat(tokenizer, template_date(run), run.model.chat_template_kwargs)
        mixture = read_mixture(run)
        data = tokenize_set(chat, mixture.train, run.data, cache_dir)
        cfg = run.train
        plan = build_plan(len(data), cfg.pairs_per_step, cfg.epochs, cfg.max_steps, cfg.seed)
        packed = for_loss(run, data)
        num_tokens = packed.tokens.num_tokens(cfg.share_prefix)
        good = [i for i in range(len(mixture.train)) if i not in data.faults]
        first = pairs_of_step(plan, 0)
        budget, notes = _row_budget(cfg.tokens_per_row, num_tokens)
        rows = rows_of_pairs(first, num_tokens, budget)
        row = next(row for row in rows if first[0] in row)
        return Stages(
            title=f"{run.model.name} on {run.data.name}: {run.loss.formula()}",
            lines=[
                *console.data_lines(mixture.table, packed, plan),
                console.layout_line(cost.layout(plan, num_tokens, budget)),
                *notes,
                *mixture.notes,
                *packed.notes,
                *console.token_notes(run, chat, mixture.table, data),
            ],
            cleaning=Cleaning.of(run.data, mixture),
            lengths=_lengths(packed),
            pairs=[
                _shown(run, chat, mixture.train[good[i]], data.tokens[i])
                for i in _in_order(plan, num_pairs).tolist()
            ],
            row=_row_table(packed, row, cfg.share_prefix),
            row_line=_row_line(packed, row, cfg.share_prefix, budget),
        )


def text(stages: Stages, colors: bool = False) -> str:
    """The stages for a terminal; without colours, the lines show the roles."""
    lines = [stages.title, "", *stages.lines, "", *markdown_table(stages.lengths)]
    lines += ["", *cleaning.text(stages.cleaning)]
    for shown in stages.pairs:
        lines += ["", f"--- {shown.place}"]
        lines += [f"{role}: {content}" for role, content in shown.messages]
        for name, tokens in shown.parts.items():
            kept = sum(token.role != "cut" for token in tokens)
            lines.append(f"{name}, {kept} of {len(tokens)} tokens")
            lines.append("    " + "".join(_run_of_role(tokens, colors)))
    lines += ["", stages.row_line, *markdown_table(stages.row)]
    return "\n".join(lines)


def page(stages: Stages) -> str:
    """A self-contained page; hovering over a token shows its id."""
    template = Path(__file__).with_name("page.html.jinja")
    return html_page(template, stages=stages, roles=list(COLORS))


def _in_order(plan: TrainPlan, count: int) -> np.ndarray:
    """The first pairs in the order of training."""
    steps = range(min(-(-count // plan.pairs_per_step), plan.steps_per_epoch))
    return np.concatenate([pairs_of_step(plan, step) for step in steps])[:count]


def _run_of_role(tokens: Sequence[Token], colors: bool) -> Iterator[str]:
    role = ""
    for token in tokens:
        if token.role != role:
            if colors:
                yield f"\033[0m\033[{COLORS[token.role]}m"
            else:
                yield "]" if role in IN_BRACKETS else ""
                yield IN_BRACKETS.get(token.role, "")
            role = token.role
        yield token.text
    if colors:
        yield "\033[0m"
    elif role in IN_BRACKETS:
        yield "]"


def _lengths(data: TokenizedSet) -> list[dict[str, object]]:
    names = ("prompt", *data.tokens.names)
    parts = dict(zip(names, data.tokens.lengths().T, strict=True))
    return [
        {"tokens of": name} | {label: int(np.quantile(values, q)) for label, q in QUANTILES.items()}
        for name, lengths in parts.items()
        if len(values := lengths[lengths > 0])  # of the pairs that have this part
    ]


def _shown(run: RunConfig, chat: Chat, pair: Pair, kept: TokenizedPair) -> Shown:
    endless = replace(run.data, max_length_tokens=ENDLESS, max_prompt_tokens=ENDLESS - 1)
    (whole,) = (one.pair for one in chat.tokenize([pair], endless) if isinstance(one, Tokenized))
    parts = {"prompt": _prompt_tokens(chat, whole, kept)}
    names = response_names(len(whole.responses))
    for name, ids, scored, left in zip(
        names, whole.responses, whole.scored, kept.responses, strict=True
    ):
        parts[name] = [
            _token(chat, token, _role(name, i < len(left), scored is None or bool(scored[i])))
            for i, token in enumerate(ids)
        ]
    return Shown(pair.place, _messages(pair), {k: v for k, v in parts.items() if v})


def _role(name: str, kept: bool, scored: bool) -> str:
    return "cut" if not kept else name.split()[0] if scored else "between"


def _prompt_tokens(chat: Chat, whole: TokenizedPair, kept: TokenizedPair) -> list[Token]:
    """A prompt's tokens; the cut ones may have kept ones (such as BOS) before and after them."""
    ids, left = whole.prompt_ids, kept.prompt_ids
    lost = len(ids) - len(left)
    head = next((i for i in range(len(left)) if ids[i] != left[i]), len(left))
    return [
        _token(chat, token, "cut" if head <= i < head + lost else "prompt")
        for i, token in enumerate(ids)
    ]


def _token(chat: Chat, token: int, role: str) -> Token:
    """A token as text; as its vocabulary piece if it is only part of a character."""
    tokenizer = chat.tokenizer
    piece = str(tokenizer.convert_ids_to_tokens(int(token)))
    shown = str(tokenizer.decode([int(token)]))
    if "\ufffd" in shown or not shown:
        shown = piece
    elif piece.startswith("\u2581") and not shown.startswith(" "):
        shown = " " + shown  # decoders of sentencepiece drop the first space
    return Token(int(token), shown.replace("\n", "\u21b5"), role)


def _messages(pair: Pair) -> list[tuple[str, str]]:
    names = ", ".join(tool_name(tool) for tool in pair.tools or ())
    return [*([("tools", names)] if names else []), *cleaning.spoken(pair)]


def _row_table(
    data: TokenizedSet, row: Sequence[int], share_prefix: bool
) -> list[dict[str, object]]:
    table: list[dict[str, object]] = []
    start = 0
    pairs = [data.tokens[index] for index in row]
    names = data.tokens.names[: max(len(pair.responses) for pair in pairs)]
    for index, tokens in zip(row, pairs, strict=True):
        size = tokens.num_tokens(share_prefix)
        sizes = map(len, tokens.responses)
        table.append(
            {
                "pair": data.places[index],
                "from": start,
                "to": start + size,
                "prompt": len(tokens.prompt_ids),
                **dict(zip_longest(names, sizes, fillvalue="")),
            }
        )
        start += size
    return table


def _row_budget(given: int | str, num_tokens: np.ndarray) -> tuple[int, list[str]]:
    """Tokens of a row to show, and a note where the run will choose them."""
    if isinstance(given, int):
        return given, []
    shown = row_lengths(num_tokens)[0]
    return shown, [
        f"note   rows of {shown:,} tokens are shown; train.tokens_per_row={given} is decided where "
        "the run trains (simpo plan shows it for a GPU)"
    ]


def _row_line(data: TokenizedSet, row: Sequence[int], share_prefix: bool, room: int) -> str:
    packed = pack([data.tokens[i] for i in row], row, share_prefix)
    apart = sum(data.tokens[i].num_tokens(share_prefix=False) for i in row)
    size = packed.input_ids.shape[1]
    return (
        f"row    {len(row)} {data.tokens.kind} in {size:,} tokens of {room:,}, "
        f"{len(packed.targets):,} of them scored; {apart / size:.2f} times as many "
        "with a prompt for each response"
    )
