"""Formats the lines that a run prints: its plan before training, its results afterwards."""

from __future__ import annotations

import shlex
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR, LogRecord, getLogger
from pathlib import Path
from typing import Any

from simpo.config.choices import Compat
from simpo.config.errors import DamagedError
from simpo.config.schema import RunConfig
from simpo.data.chats.chat import Chat
from simpo.data.mixture import SplitReport
from simpo.data.plan import TrainPlan
from simpo.data.store import TokenizedSet
from simpo.model.cost import Layout, num_weights
from simpo.model.policy import Policy
from simpo.run.files import read_replies
from simpo.run.progress import on_terminal
from simpo.run.tables import markdown_table, result_lines, shown_metrics


@dataclass(frozen=True)
class Results:
    """Held-out metrics before the first step and of the saved model.

    Both are empty if nothing is held out. `findings` are the signs of a collapse, a line each.
    """

    before: dict[str, float]
    after: dict[str, float]
    findings: tuple[str, ...] = ()


REPLIES_SHOWN = 5
LOG_COLUMNS = 160
"""Width of the lines about replies where there is no terminal."""
CUT = " ... "


def start_lines(
    run: RunConfig,
    policy: Policy,
    machine: str,
    table: Sequence[SplitReport],
    train_set: TokenizedSet,
    plan: TrainPlan,
) -> list[str]:
    """Lines about the model, the loss, the data and the number of steps."""
    parameters = list(policy.parameters())
    total = sum(num_weights(p) for p in parameters) / 1e6
    trained = sum(p.numel() for p in parameters if p.requires_grad) / 1e6
    weight = run.model.router_aux_weight
    lines = [
        f"model  {run.model.path}: {total:.1f}M weights, {trained:.1f}M trained, {machine}",
        run.loss.formula(),
    ]
    if weight:
        lines.append(f"       + {weight:g} * aux_loss of the router, over all tokens of a step")
    return [*lines, "", *data_lines(table, train_set, plan)]


def data_lines(table: Sequence[SplitReport], train_set: TokenizedSet, plan: TrainPlan) -> list[str]:
    """Lines about the sources of the pairs, their tokens and steps, and the repairs and cuts."""
    report, kind = train_set.report, train_set.tokens.kind
    tokens, unshared = (int(train_set.tokens.num_tokens(share).sum()) for share in (True, False))
    lines = [
        *markdown_table(mixture_lines(table)),
        "",
        f"tokens {tokens:,} in {report.pairs} train {kind}, {unshared:,} with a prompt for each "
        f"response: {unshared / tokens:.2f} times as many",
        f"plan   {plan.total_steps} step{'s' * (plan.total_steps > 1)} of {plan.pairs_per_step} "
        f"{kind}, {plan.total_steps / plan.steps_per_epoch:.2f} passes over the train {kind}",
    ]
    repairs = {
        "prompts joined with their response by the tokenizer": report.merged_prompts,
        "prompts cut": report.cut_prompts,
        "chosen cut": report.cut_chosen,
        f"{'other responses' if kind == 'prompts' else 'rejected'} cut": report.cut_rejected,
        **{f"left out: {fault}": count for fault, count in report.bad.items()},
    }
    lines += [f"       {count} {what}" for what, count in repairs.items() if count]
    return lines


def token_notes(
    run: RunConfig, chat: Chat, table: Sequence[SplitReport], train_set: TokenizedSet
) -> list[str]:
    """Notes on what the chat template and `data.compat` do to the tokens."""
    lines = []
    if chat.template.date is not None:
        lines.append(
            f"note   the chat template writes the date: {chat.template.date} throughout this run"
        )
    if unreasoned := train_set.report.unreasoned:
        lines.append(
            f"note   {unreasoned} train pairs have replies that are scored without their "
            "reasoning, which the chat template strips because another question follows"
        )
    for fault, count in train_set.kept_by_paper.items():
        if count:
            lines.append(f"note   {count} train pairs kept with {fault} (data.compat=paper)")
    left_out = sum(sum(bad.values()) for bad in (*(r.bad for r in table), train_set.report.bad))
    if run.data.compat is Compat.paper and left_out:
        lines.append(
            f"note   {left_out} records left out that the original trainer trains on or "
            "stops at (data.compat=paper)"
        )
    return lines


def layout_line(planned: Layout) -> str:
    """A line about how full the packed rows of a step are."""
    return (
        f"       {planned.tokens_per_step:,.0f} tokens a step, rows {planned.fill:.0%} full, "
        f"the largest {planned.largest_row_tokens:,}"
    )


def mixture_lines(table: Sequence[SplitReport]) -> list[dict[str, Any]]:
    """The mixture table, a line for each split of each source."""
    filtered = any(r.left_out for r in table)
    return [
        {
            "source": r.source,
            "split": r.split,
            "records": r.records,
            "bad": r.bad or 0,
            **({"left out": r.left_out or 0} if filtered else {}),
            "taken": r.taken,
        }
        for r in table
    ]


def end_lines(results: Results, run_dir: Path, model_step: int, last_step: int) -> list[str]:
    """Lines about held-out metrics and replies before and after, and the model's folder."""
    table = result_lines(results.before, results.after) if results.after else []
    lines = [*markdown_table(table), ""] if table else []
    samples = [run_dir / f"samples/step-{step:06d}.json" for step in (0, model_step)]
    try:
        before, after = map(read_replies, samples)
        lines += _reply_lines(before, after) if before and after else []
    except DamagedError as error:
        lines.append(f"note   {error}")
    if results.findings:
        lines.append(f"watch  {len(results.findings)} signs of a collapse, see results.json")
    which = "" if model_step == last_step else f", the best: after step {model_step}"
    return [
        *lines,
        f"model  {run_dir / 'model'}{which}",
        f"chat   python -m simpo.chat {shlex.quote(str(run_dir))} base=true",
    ]


def _reply_lines(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[str]:
    """A few held-out prompts with the replies before and after training."""
    width = shutil.get_terminal_size((LOG_COLUMNS, 0)).columns
    lines = []
    for old, new in list(zip(before, after, strict=False))[:REPLIES_SHOWN]:
        prompt = _one_line(old["prompt"])
        if len(prompt) > (room := width - len("prompt  ")):
            # An instruction stands at either end.
            start = (room - len(CUT)) // 2
            prompt = f"{prompt[:start]}{CUT}{prompt[start + len(CUT) - room :]}"
        lines.append(f"prompt  {prompt}")
        if rule := old.get("rule"):
            lines.append(f"rule    {_one_line(str(rule))}")
        for name, reply in (("before", old), ("after", new)):
            verdict = {True: "[obeys] ", False: "[fails] "}.get(reply["obeys"], "")
            line = f"{name:6}  {verdict}{_one_line(reply['reply'])}"
            lines.append(line if len(line) <= width else line[: width - 3] + "...")
        lines.append("")
    return lines


def _one_line(text: str) -> str:
    """Text with its lines joined by slashes, and without what would steer a terminal."""
    line = " / ".join(part.strip() for part in text.strip().splitlines() if part.strip())
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in line)


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Loss, accuracy and margin (of single replies their rewards), and the share of replies that
    obey, as far as they are there."""
    texts = {
        "loss": "loss {:.3f}",
        "rewards/accuracies": "accuracy {:.2f}",
        "rewards/margins": "margin {:+.2f}",
        "rewards/chosen": "desirable {:+.2f}",
        "rewards/rejected": "undesirable {:+.2f}",
        "rule_pass_rate": "{:.0%} of the replies obey",
    }
    shown = shown_metrics(metrics)
    return ", ".join(text.format(metrics[key]) for key, text in texts.items() if key in shown)


def _is_no_advice(record: LogRecord) -> bool:
    return record.levelno >= ERROR


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Silence the advice of the libraries while entered, and their progress bars but for those of
    downloads on a terminal."""
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    # DeepSpeed, which transformers imports to save a model, warns where there is no GPU.
    deepspeed = getLogger("DeepSpeed")
    deepspeed.addFilter(_is_no_advice)
    before = hub_logging.get_verbosity(), logging.get_verbosity()
    showed_bars = logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        for library in ("transformers", "torch.distributed"):
            warnings.filterwarnings("ignore", category=FutureWarning, module=library)
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", module="peft")
        hub_logging.set_verbosity_error()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        if on_terminal() and not constants.HF_HUB_DISABLE_PROGRESS_BARS:
            enable_progress_bars()
        try:
            yield
        finally:
            deepspeed.removeFilter(_is_no_advice)
            hub_logging.set_verbosity(before[0])
            logging.set_verbosity(before[1])
            if showed_bars:
                logging.enable_progress_bar()
