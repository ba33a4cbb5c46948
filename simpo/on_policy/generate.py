"""Generates several replies of the model to each prompt of a data set.

The on-policy data of https://arxiv.org/abs/2405.14734, section 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from simpo.config.choices import Compat, Engine, OnBadRecord
from simpo.config.errors import ConfigError, DataError, SimpoError
from simpo.config.on_policy import OnPolicyConfig
from simpo.config.schema import RunConfig
from simpo.data.chats.chat import Chat
from simpo.data.chats.checks import refuse_unknown_ids
from simpo.data.mixture import fault_lines, load_mixture
from simpo.data.reading.records import RecordFault, to_prompt
from simpo.loop.console import libraries_quiet
from simpo.loop.replies import repetition
from simpo.model.generate import Reply, Sampling, batches
from simpo.model.pretrained import load_settings, num_embeddings
from simpo.model.tokenizer import load_tokenizer
from simpo.on_policy.engines import engine_of, with_transformers, with_vllm
from simpo.on_policy.files import (
    ADAPTER,
    SEEDS,
    Prompt,
    StoredReply,
    append_lines,
    content_hash,
    on_policy_folder,
    one_part_at_a_time,
    prompt_id,
    read_settings,
    read_stored_replies,
    refuse_other_settings,
    responses_files,
    weights_content,
    working_in,
    write_lines,
)
from simpo.run.atomic import write_bytes
from simpo.run.progress import bar


@libraries_quiet()
def generate(run: RunConfig, others: Iterable[Path] = (), wanted: str | None = None) -> Path:
    """Generate the missing replies: one to every prompt with each seed of `on_policy.seeds`.

    A batch depends only on its prompts and its seed, so a continued run gives the same replies as
    an uninterrupted one.

    Args:
        others: folders whose replies are taken if this one has none, and everything that decides
            them is the same.
        wanted: `content_of_prompts` of the data that others have begun with; None: any.

    Returns:
        The folder; see `simpo.on_policy.files`.

    Raises:
        ConfigError: there is no prompt to answer, or the folder holds replies generated with other
            settings or weights, or another process works in it.
        DataError: the prompts cannot be read, or are not those that are wanted; or the model's
            template refuses one.
    """
    config = run.on_policy
    cache_dir = Path(run.cache_dir).expanduser()
    folder = on_policy_folder(run)
    chat, every = prompts_of(run)
    if wanted not in (None, content_of_prompts(every)):
        raise DataError(
            "data.sources: the prompts changed under these rounds (restore them, or start anew "
            "with run_dir=NEW)"
        )
    found, asked = _asked(config, every)
    prompts = [prompt for prompt, _ in found]
    ids = chat.encode([text for _, text in found])
    named = zip((f"prompt {prompt.id}" for prompt in prompts), ids, strict=True)
    settings = load_settings(run.model, cache_dir)
    refuse_unknown_ids(chat, named, num_embeddings(settings))
    part = None if config.parts == 1 else config.part
    with working_in(folder, part=part):
        with one_part_at_a_time(folder) if part else nullcontext():
            now = _settings(run, chat, prompts, ids)
            _begin_with(folder, now, config.seeds)
            if not part and not responses_files(folder):
                _take_replies(folder, others, now | {SEEDS: config.seeds})
            write_lines(folder / "prompts.jsonl", map(asdict, prompts))
        asked += f", {len(config.seeds)} replies each"
        asked += f", part {part} of {config.parts}" if part else ""
        print(f"folder {folder}\n{len(prompts)} prompts{asked}")
        ended = _generate_missing(run, chat, folder, prompts, ids)
    if not config.keep_cut and (cut := ended.count(False)):
        print(
            f"note   {cut} of {len(ended)} replies are cut off by on_policy.max_new_tokens: "
            "simpo annotate leaves them out, unless on_policy.keep_cut=true"
        )
    return folder


def prompts_of(run: RunConfig) -> tuple[Chat, list[tuple[Prompt, str]]]:
    """The model's chat template, and each prompt of the data once with its text in it.

    Raises:
        ConfigError: the model's tokenizer cannot be loaded.
        DataError: the prompts cannot be read, or the model's template refuses one.
    """
    chat = folder_chat(run, on_policy_folder(run))
    return chat, _prompts(run, chat)


def content_of_prompts(found: Iterable[tuple[Prompt, str]]) -> str:
    """Hash of what `prompts_of` found, but for the texts, which depend on the model."""
    return content_hash([asdict(prompt) for prompt, _ in found])


def _generate_missing(
    run: RunConfig, chat: Chat, folder: Path, prompts: list[Prompt], ids: list[list[int]]
) -> list[bool]:
    """Generate the part's replies that the folder lacks, and append them batch by batch.

    Returns:
        Of each reply in the folder, whether it ended before it was cut off.
    """
    config = run.on_policy
    name = "responses.jsonl" if config.parts == 1 else f"responses-{config.part}.jsonl"
    file = folder / name
    stored = read_stored_replies(folder, None if config.parts == 1 else file)
    ended = [reply.ended for reply in stored]
    done = {(reply.id, reply.seed) for reply in stored}
    every = [
        (seed, batch)
        for seed in config.seeds
        for batch in batches([len(prompt_ids) for prompt_ids in ids], config.batch_prompts)
    ]
    todo = [
        (seed, batch)
        for seed, batch in every[config.part - 1 :: config.parts]
        if any((prompts[i].id, seed) not in done for i in batch)
    ]
    if not todo:
        return ended
    engine = engine_of(config.engine)
    if engine is Engine.vllm:
        generate_batch = with_vllm(run.model, Path(run.cache_dir).expanduser(), chat)
    else:
        generate_batch = with_transformers(run, chat)
    count = sum(len(batch) for _, batch in todo)
    with bar(f"replies ({engine.value})", count, stays=True) as shown:
        shown.begin_at(0)
        for seed, batch in todo:
            sampling = Sampling(
                config.temperature_of(seed), config.top_p, config.max_new_tokens, seed
            )
            replies = generate_batch([ids[i] for i in batch], sampling)
            new = [
                _stored(prompts[i], seed, reply)
                for i, reply in zip(batch, replies, strict=True)
                if (prompts[i].id, seed) not in done
            ]
            append_lines(file, (reply.line() for reply in new))
            ended += [reply.ended for reply in new]
            shown.advance(len(batch))
    return ended


def _take_replies(folder: Path, others: Iterable[Path], now: dict[str, Any]) -> None:
    """Copy the replies of the first of other folders with the same settings and seeds."""
    for other in others:
        try:
            if read_settings(other, mend=False) != now:
                continue
            # Another process may be writing there.
            read_stored_replies(other, own=folder)
            text = (other / "responses.jsonl").read_bytes()
        except (SimpoError, OSError):
            continue
        write_bytes(folder / "responses.jsonl", text[: text.rfind(b"\n") + 1])
        print(f"note   the replies in {other} were generated with the same settings, and are taken")
        return


def _stored(prompt: Prompt, seed: int, reply: Reply) -> StoredReply:
    ids = tuple(reply.ids) if prompt.split == "test" else None  # whose drift is measured
    return StoredReply(
        prompt.id, seed, reply.text, reply.tokens, reply.ended, repetition(reply.ids), ids
    )


def folder_chat(run: RunConfig, folder: Path) -> Chat:
    """The tokenizer and chat template of the run's model, with the date of the folder's replies.

    Raises:
        ConfigError: they cannot be loaded.
    """
    tokenizer = load_tokenizer(run.model, Path(run.cache_dir).expanduser(), run.data.compat)
    return Chat(tokenizer, _template_date(folder), run.model.chat_template_kwargs)


def model_settings(run: RunConfig, chat: Chat) -> dict[str, Any]:
    """What settings.json holds of the model and its chat template; weights by their content."""
    model = run.model
    weights, adapter = weights_content(
        "model.path", model, Path(run.cache_dir).expanduser(), ADAPTER
    )
    return {
        "model.path": model.path,
        "model.revision": model.revision,
        "content of model.path": weights,
        "model.dtype": model.dtype.value,
        "model.quantization": model.quantization.value,
        ADAPTER: model.lora.adapter,
        f"content of {ADAPTER}": adapter,
        "chat_template": chat.template_sha256[:16],
        **({"chat_template_kwargs": kwargs} if (kwargs := chat.template.kwargs) else {}),
        **({"template_date": str(chat.template.date)} if chat.template.date else {}),
    }


def _settings(
    run: RunConfig, chat: Chat, prompts: list[Prompt], ids: list[list[int]]
) -> dict[str, Any]:
    """Everything that decides the replies except seeds."""
    config = run.on_policy
    return {
        **model_settings(run, chat),
        **({"on_policy.slices": config.slices} if config.slices > 1 else {}),
        **({"on_policy.slice": config.slice} if config.slices > 1 else {}),
        **({"on_policy.held_out_only": True} if config.held_out_only else {}),
        "prompts": content_hash([prompt.id for prompt in prompts]),
        "tokens of the prompts": content_hash(ids),
        "on_policy.temperature": config.temperature,
        **(
            {"on_policy.temperatures": [[s, config.temperature_of(s)] for s in config.seeds]}
            if config.temperatures
            else {}
        ),
        "on_policy.top_p": config.top_p,
        "on_policy.max_new_tokens": config.max_new_tokens,
        "on_policy.batch_prompts": config.batch_prompts,
        "train.precision": run.train.precision.value,
        "engine": engine_of(config.engine).value,
    }


def _prompts(run: RunConfig, chat: Chat) -> list[tuple[Prompt, str]]:
    """Each prompt once, with its template text; held-out prompts are not in the train split.

    Raises:
        DataError: the chat template refuses one (with on_bad_record=stop).
    """
    mixture = load_mixture(run.data, to_prompt, Path(run.cache_dir).expanduser())
    print("".join(f"{note}\n" for note in mixture.notes), end="")
    found: dict[str, tuple[Prompt, str]] = {}
    faults: list[tuple[str, str]] = []
    for split, pairs in (("test", mixture.test), ("train", mixture.train)):
        own = {prompt_id(pair): index for index, pair in enumerate(pairs)}
        for key, index in list(own.items())[: run.on_policy.num_prompts]:
            pair = pairs[index]
            try:
                if run.data.compat is Compat.none:
                    chat.check_pair(pair)
                text = chat.prompt_text(pair.prompt, pair.tools)
            except RecordFault as fault:
                faults.append((pair.place, str(fault)))
            else:
                prompt = Prompt(
                    key, split, pair.prompt, pair.rule, pair.tools, pair.reference_answer
                )
                found.setdefault(key, (prompt, text))
    if faults and run.data.on_bad_record is OnBadRecord.stop:
        raise DataError(fault_lines(faults))
    left_out = Counter(fault for _, fault in faults)
    for report in mixture.table:
        left_out.update(report.bad)
    print(
        "".join(f"note   {n} records left out: {fault}\n" for fault, n in left_out.items()), end=""
    )
    return list(found.values())


def _asked(
    config: OnPolicyConfig, found: list[tuple[Prompt, str]]
) -> tuple[list[tuple[Prompt, str]], str]:
    """The prompts of the slice, behind the held-out ones, and a note of what was taken.

    Raises:
        ConfigError: there is none.
    """
    held_out = [one for one in found if one[0].split == "test"]
    train = [one for one in found if one[0].split == "train"]
    own = train[config.slice - 1 :: config.slices]
    if config.held_out_only:
        if not held_out:
            raise ConfigError(
                ["on_policy.held_out_only: there is no held-out prompt (data.sources: test_path)"]
            )
        return held_out, " (held out only)"
    if config.slices == 1:
        return found, ""
    which = f"slice {config.slice} of {config.slices}"
    if not own:
        raise ConfigError(
            [
                f"on_policy.slice: {which} has no prompt, there are {len(train)} to train on "
                "(set fewer on_policy.slices, or more on_policy.num_prompts)"
            ]
        )
    return held_out + own, (
        f" ({len(held_out)} held out, {len(own)} of {len(train)} to train on: {which})"
    )


def _template_date(folder: Path) -> date:
    """The date that the chat template takes for today: the day of the first reply."""
    try:
        return date.fromisoformat(read_settings(folder)["template_date"])
    except (KeyError, TypeError, ValueError):  # none, or damaged, which is refused later
        return date.today()


def _begin_with(folder: Path, now: dict[str, Any], seeds: list[int]) -> None:
    """Write settings.json, if the replies in the folder were generated with the same.

    Raises:
        ConfigError: they were not, or that is not known.
    """
    before = read_settings(folder)
    if before:
        left_out = dict.fromkeys(before.keys() - {SEEDS})  # such as on_policy.temperatures
        refuse_other_settings(folder, before, left_out | now)
    elif any(path.stat().st_size for path in responses_files(folder)):
        raise ConfigError(
            [
                f"on_policy.folder: the settings.json of the replies in {folder} is missing or "
                "empty (choose another on_policy.folder)"
            ]
        )
    write_lines(folder / "settings.json", [now | {SEEDS: seeds}])
