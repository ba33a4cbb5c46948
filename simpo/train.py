"""One run, top to bottom: `python -m simpo.train model=mistral_base loss.beta=2.5`.

`cli` composes and checks the settings without importing torch; `train` does the rest.
"""

from __future__ import annotations

from simpo.signals import end_at_once, end_with

if __name__ == "__main__":
    end_at_once()  # importing what follows takes a while

import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from simpo import processes
from simpo.config import RunConfig, WatchAction, build_run, check_training, menu_dir, trajectory
from simpo.errors import (
    INTERRUPTED,
    INTERRUPTION,
    ConfigError,
    RunError,
    SimpoError,
    Stopped,
    first_line,
)
from simpo.explain import explain
from simpo.menu import Menu
from simpo.run_folder import refuse_unwritable


@hydra.main(version_base="1.3", config_path=str(menu_dir("conf")), config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run one composed configuration; its objective is what a Hydra sweeper goes by."""
    try:
        run = build_run(cfg)
        return start(run).get(run.objective.metric)
    except SimpoError as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN and not isinstance(error, Stopped):
            raise  # Hydra goes on with the other members and raises at the end.
        # Hydra would put a heading above an exception that leaves here, but not above an exit.
        _quit_for(error)


def start(run: RunConfig) -> dict[str, float]:
    """Train a run here, as one of the processes that were started for it, or in processes of its
    own; see `train`.
    """
    end_with(run.train.stopped_exit_code)
    refuse_unwritable(run)
    processes.join_slurm()
    count = processes.to_start(run.backend)
    if count is not None:
        return processes.run_in(count, run)
    with processes.in_touch():
        return train(run)


def train(run: RunConfig) -> dict[str, float]:
    """Train, evaluate and save one run, or continue it where it stopped.

    Several processes of a run each call this; `run` is the same for all.

    Returns:
        The held-out metrics after the last step; empty where nothing is held out.

    Raises:
        ConfigError, DataError: the settings or the data cannot be used.
        RunError: the run had to stop; the same command continues it.
        Stopped: so a signal wished.
    """
    # Imported here, so that a fault in the settings is answered before torch is loaded.
    from simpo import console, cost, export
    from simpo.backend import build_backend
    from simpo.checkpoint import CheckpointStore
    from simpo.data.chat import Chat, TokenizedSet, pairs_fingerprint
    from simpo.data.checks import kept_as_the_original, placed_ids, refuse_unknown_ids
    from simpo.data.mixture import load_mixture
    from simpo.data.packing import pack, pack_nothing
    from simpo.data.plan import build_plan, pairs_of_step, rows_of_pairs
    from simpo.data.rows import to_dialogue, to_pair
    from simpo.data.token_cache import tokenize_set
    from simpo.model import load_policy, load_tokenizer, num_embeddings
    from simpo.objective import (
        best_step,
        check_objective,
        evaluations_in,
        evaluations_without_gain,
    )
    from simpo.optim import (
        build_optimizer,
        change_notes,
        check_rates,
        check_updates,
        learning_rate,
        sampled_weights,
        set_learning_rate,
    )
    from simpo.pairs import PackedPairs
    from simpo.probe import check_packing
    from simpo.reference import weights_fingerprint, with_reference
    from simpo.run_folder import RunFolder, environment, git_diff, template_date
    from simpo.sample import greedy_replies, reply_metrics
    from simpo.signals import StopRequest
    from simpo.step import NonFiniteError, columns, evaluate, summarise, update
    from simpo.tracker import Tracker, check_login
    from simpo.watch import CollapseWatch

    console.quiet_libraries()
    check_login(run.tracker)
    cfg = run.train
    cache_dir = Path(run.cache_dir).expanduser()
    backend = build_backend(run.backend, cfg.precision, cfg.max_grad_norm)
    check_training(run, backend.half)
    today = backend.broadcast(template_date(run) if backend.is_main else None)
    with backend.main_first("read and tokenised the data"):
        chat = Chat(load_tokenizer(run.model, cache_dir, run.data.compat), today)
        mixture = load_mixture(run.data, to_pair if run.loss.needs_rejected else to_dialogue)
        train_set = tokenize_set(chat, mixture.train, run.data, cache_dir)
        test_set = tokenize_set(chat, mixture.test, run.data, cache_dir)
    refuse_unknown_ids(chat, placed_ids(train_set, test_set), num_embeddings(run.model, cache_dir))
    train_tokens = train_set.num_tokens(cfg.share_prefix)
    test_tokens = test_set.num_tokens(cfg.share_prefix)
    plan = build_plan(len(train_set.pairs), cfg.pairs_per_step, cfg.epochs, cfg.max_steps, cfg.seed)
    check_rates(cfg, plan)

    own_folder = RunFolder(run) if backend.is_main else None
    path = backend.broadcast(own_folder.path if own_folder else None)
    folder = own_folder or RunFolder(run, followed=path)
    if folder.finished:
        raise ConfigError([f"run_dir: {folder.path} holds a finished run (choose another)"])
    folder.write_data(
        {
            "mixture": console.mixture_rows(mixture.table),
            "notes": mixture.notes,
            "train_tokens": asdict(train_set.report),
            "test_tokens": asdict(test_set.report),
            "train_fingerprint": pairs_fingerprint(train_set.pairs),
            "test_fingerprint": pairs_fingerprint(test_set.pairs),
            "template_sha256": chat.template_sha256,
            "template_date": chat.template.date and chat.template.date.isoformat(),
            "kept_as_the_original": kept_as_the_original(chat, train_set, run.data),
            "tokens_fingerprint": train_set.fingerprint(),
        }
    )
    folder.write_json("environment.json", environment(str(backend)))
    folder.write_bytes("git.diff", git_diff())
    policy = load_policy(
        run.model,
        cache_dir,
        backend.device,
        cfg.seed,
        half=backend.half,
        share_prefix=cfg.share_prefix,
    )
    all_tokens = [*train_set.tokens, *test_set.tokens]
    check_packing(policy, backend.half, all_tokens, cfg.tokens_per_row)
    before = sampled_weights(policy.model)
    check_updates(cfg, before)
    planned = cost.layout(plan, train_tokens, cfg.tokens_per_row, backend.processes)
    memory = cost.estimate_memory(
        policy,
        planned.largest_row_tokens,
        backend.half,
        run.model.gradient_checkpointing,
        backend.weight_shards,
        backend.state_shards,
    )
    if cfg.check_memory:
        cost.check_memory(memory, backend.device, backend.processes_here)
    flops = cost.Flops(policy)
    said = export.check_end(run, backend, policy, chat, folder.path)
    start_lines = [
        *console.start_lines(run, policy, str(backend), mixture.table, train_set, plan),
        console.layout_line(planned),
        *console.token_notes(run, chat, mixture.table, train_set),
        f"memory about {memory}",
        *said,
    ]
    origin = weights_fingerprint(policy) if run.loss.needs_reference and backend.is_main else ""
    wrapped, optimizer = backend.prepare(policy, build_optimizer(policy, cfg))

    store = CheckpointStore(
        folder.path / "checkpoints",
        cfg.keep_checkpoints,
        backend,
        background=getattr(run.backend, "async_save", False),
    )
    watch = CollapseWatch(run.watch)
    sampled = test_set.pairs[: run.sample.num_prompts]
    test_rows = rows_of_pairs(
        range(len(test_set.pairs)), test_tokens, cfg.tokens_per_row, backend.processes
    )

    with (
        folder.recording_failure(),
        StopRequest() as stop,
        Tracker(
            run.tracker, folder.path, run.name, trajectory(run), writes=backend.is_main
        ) as tracker,
        processes.in_touch(),
    ):

        def packed(data: TokenizedSet, rows: list[list[int]]) -> Iterator[PackedPairs]:
            """This process's share of rows; one that has no pairs takes part all the same."""
            for row in rows[backend.rank :: backend.processes]:
                if row:
                    yield pack([data.tokens[i] for i in row], row, cfg.share_prefix)
                else:
                    yield pack_nothing(data.tokens[0], cfg.share_prefix)

        def look_out(line: dict[str, float]) -> None:
            """Tell what a logged line reveals of a collapse, and stop where that is asked for."""
            for finding in watch.read(line):
                good = store.newest(finding.good_step) or "none kept"
                told = f"watch  {finding.text}; last good checkpoint: {good}"
                if run.watch.action is WatchAction.stop:
                    raise RunError(told)
                tracker.say(told)

        def held_out() -> None:
            """Evaluate on the held-out pairs, log it, keep the replies."""
            metrics: dict[str, float] = {}
            if test_rows:
                tracker.say(f"held out: {len(test_set.pairs)} pairs, {len(sampled)} replies ...")
                found, scores = evaluate(wrapped, packed(test_set, test_rows), run.loss, backend)
                metrics |= found
                placed = ((test_set.pairs[i].place, numbers) for i, numbers in scores.items())
                folder.write_scores(step, columns(run.loss), placed)
            if sampled:
                with backend.replying(policy):
                    replies = greedy_replies(
                        policy, chat, sampled, run.sample.max_new_tokens, backend.device
                    )
                metrics |= reply_metrics(replies)
                folder.write_replies(step, replies)
            if metrics:
                evaluations[step] = metrics
                look_out(tracker.log(step, "eval", metrics))

        def out_of_patience() -> bool:
            waited = evaluations_without_gain(run.objective, evaluations)
            return 0 < cfg.patience_evals <= waited

        def stopped() -> Stopped:
            """What a signal to any process makes of the run, all of which is in a checkpoint."""
            store.settle(wait=True)
            signal = next(name for name in backend.gather([stop.name]) if name)
            return Stopped(
                f"{signal}: saved after step {step} in {folder.path} (the same command continues)",
                cfg.stopped_exit_code,
            )

        if run.loss.needs_reference:
            # Before a checkpoint is read: the reference is the model that the run starts from.
            tracker.say(f"reference: {len(train_set.pairs) + len(test_set.pairs)} pairs ...")
            origin = backend.broadcast(origin)
            all_rows = rows_of_pairs(
                range(len(train_set.pairs)), train_tokens, cfg.tokens_per_row, backend.processes
            )
            train_set, test_set = (
                with_reference(wrapped, data, packed(data, rows), origin, cache_dir, backend)
                for data, rows in ((train_set, all_rows), (test_set, test_rows))
            )
        seal, damaged = store.resume(wrapped, optimizer)
        step = seal.step if seal else 0
        tracker.cut_back(seal.metrics_bytes if seal else 0)
        history = backend.broadcast(tracker.history())
        evaluations = evaluations_in(history)
        for line in history:
            watch.read(line)  # told by the process that logged it
        tracker.say(
            *start_lines,
            *folder.notes,
            *damaged,
            *mixture.notes,
            *train_set.notes,
            *test_set.notes,
            f"run    {folder.path}" + (f", continued after step {step}" if step else ""),
        )
        folder.write_status("running", step, plan.total_steps)
        begin = time.perf_counter()
        if step == 0:
            held_out()
            if cfg.keep_best or cfg.patience_evals:
                check_objective(run.objective, evaluations.get(0, {}))
        while step < plan.total_steps and not out_of_patience():
            step_begin = time.perf_counter()
            set_learning_rate(optimizer, rate := learning_rate(cfg, step, plan.total_steps))
            indices = pairs_of_step(plan, step)
            rows = list(
                packed(
                    train_set,
                    rows_of_pairs(indices, train_tokens, cfg.tokens_per_row, backend.processes),
                )
            )
            try:
                sums, grad_norm = update(wrapped, optimizer, rows, run.loss, backend)
            except NonFiniteError as error:
                places = ", ".join(train_set.pairs[i].place for i in error.pairs[:8])
                raise RunError(f"step {step + 1}: {error}; not updated; pairs: {places}") from error
            step += 1
            last = step == plan.total_steps
            metrics: dict[str, float] = {}
            if last or step % cfg.log_every == 0:
                metrics = summarise(run.loss, backend.sum(sums))
                seconds = time.perf_counter() - step_begin
                metrics |= {
                    "grad_norm": grad_norm,
                    "learning_rate": rate,
                    "epoch": step / plan.steps_per_epoch,
                    "pairs_per_s": len(indices) / seconds,
                    "tokens_per_s": int(train_tokens[indices].sum()) / seconds,
                    **cost.speed(sum(flops.of_row(row) for row in rows) / seconds, backend.device),
                }
                look_out(tracker.log(step, "train", metrics))
            tracker.progress(step, plan.total_steps, metrics)
            if cfg.eval_every and step % cfg.eval_every == 0 and not last:
                held_out()
            if cfg.keep_best:
                store.best = best_step(run.objective, evaluations)
            store.settle(wait=False)
            stopping = backend.any(bool(stop.name))
            due = cfg.checkpoint_every and step % cfg.checkpoint_every == 0
            if due or last or stopping or store.best == step or out_of_patience():
                store.save(step, wrapped, optimizer, tracker.num_bytes())
                folder.write_status("running", step, plan.total_steps)
            if stopping:
                raise stopped()
        store.settle(wait=True)
        trained_s = time.perf_counter() - begin
        if step == plan.total_steps:
            held_out()
        if backend.any(bool(stop.name)):
            raise stopped()
        kept = (cfg.keep_best and best_step(run.objective, evaluations)) or step
        if kept != step and (fault := store.load(kept, wrapped, optimizer)):
            tracker.say(f"the best model, after step {kept}, is lost ({fault}): the last is saved")
            kept = step
        weights = backend.full_weights(wrapped, policy)
        after = evaluations.get(kept, {})
        results = console.Results(
            before=evaluations.get(0, {}),
            after=after,
            findings=tuple(finding.text for finding in watch.findings),
        )
        notes: list[str] = []
        if backend.is_main:
            notes = change_notes(before, weights or dict(policy.model.named_parameters()))
            export.save_model(policy, weights, chat, folder.path / "model")
        folder.write_json(
            "results.json",
            {
                "eval_before": results.before,
                "eval_after": after,
                "findings": results.findings,
                "train": {"steps": step, "model_step": kept, "this_process_s": trained_s},
            },
        )
        said = export.publish(run, folder.path, results) if backend.is_main else []
        folder.write_status("finished", step, plan.total_steps)
        tracker.say(*notes, "", *console.end_lines(results, folder.path, kept, step), *said)
    backend.close()
    return after


def cli() -> None:
    """Entry of `simpo-train` and `python -m simpo.train`.

    Exits with 2 for bad settings or data, 1 for a failed run.
    """
    end_at_once()
    # Hydra would print its own account of a fault and exit with 1; this makes it raise instead.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    arguments = get_args_parser().parse_args()
    try:
        _check_options(arguments)
        menu = Menu(arguments.config_dir, arguments.config_name or "train")
        if arguments.multirun and (found := explain(arguments.overrides, True, menu)):
            raise ConfigError(found)  # before the first member has run for hours
        main()
    except SimpoError as error:
        _quit_for(error)
    # Hydra raises whatever comes, a TypeError for a group set to a list of numbers.
    except Exception as error:
        problems = explain(arguments.overrides, arguments.multirun, menu)
        if not problems and not isinstance(error, (HydraException, OmegaConfBaseException)):
            raise
        _quit(2, "\n".join(problems) or first_line(error))
    except KeyboardInterrupt:
        _quit(INTERRUPTED, INTERRUPTION)


def _check_options(arguments: Namespace) -> None:
    """Refuse what Hydra would end with a traceback for.

    Raises:
        ConfigError: options that do not go together, or that this command does not take.
    """
    modes = ("run", "multirun", "cfg", "info", "shell_completion")
    chosen = [f"--{mode.replace('_', '-')}" for mode in modes if getattr(arguments, mode)]
    if len(chosen) > 1:
        raise ConfigError([f"{', '.join(chosen)}: one of them at a time"])
    if arguments.resolve and not (arguments.cfg or arguments.help):
        raise ConfigError(["--resolve: only with --cfg"])
    if arguments.experimental_rerun:
        raise ConfigError(["--experimental-rerun: not here (see command.txt of a run)"])


def _quit_for(error: SimpoError) -> NoReturn:
    _quit(error.exit_code, str(error))


def _quit(code: int, message: str) -> NoReturn:
    if message:
        print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    cli()
