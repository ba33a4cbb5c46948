"""One run, top to bottom: `python -m simpo.train model=mistral_base loss.beta=2.5`.

`cli` composes and checks the settings without importing torch; `train` does the rest.
"""

from __future__ import annotations

import os
import sys
import time
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

from simpo.compose import explain
from simpo.config import ConfigError, DataError, RunConfig, build_run, menu_dir, trajectory


class RunError(Exception):
    """A run that could not go on; what it had computed is in its folder."""


@hydra.main(version_base="1.3", config_path=str(menu_dir("conf")), config_name="train")
def main(cfg: DictConfig) -> None:
    """Run one composed configuration; Hydra calls it for each member of a sweep."""
    try:
        train(build_run(cfg))
    except (ConfigError, DataError, RunError) as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise  # Hydra goes on with the other members and raises at the end.
        # Hydra would put a heading above an exception that leaves here, but not above an exit.
        _quit_for(error)


def train(run: RunConfig) -> dict[str, float]:
    """Train, evaluate and save one run, or continue it where it stopped.

    Returns:
        The held-out metrics after the last step; empty where nothing is held out.

    Raises:
        ConfigError, DataError: the settings or the data cannot be used.
        RunError: the run had to stop; the same command continues it.
    """
    # Imported here, so that a fault in the settings is answered before torch is loaded.
    from simpo import console, cost, export
    from simpo.backend import Backend
    from simpo.checkpoint import CheckpointStore
    from simpo.data.chat import Chat, TokenizedSet, pairs_fingerprint, tokenize_set
    from simpo.data.mixture import load_mixture
    from simpo.data.packing import pack
    from simpo.data.plan import build_plan, pairs_of_step, rows_of_pairs
    from simpo.model import load_policy, load_tokenizer
    from simpo.optim import build_optimizer, learning_rate, set_learning_rate
    from simpo.pairs import PackedPairs
    from simpo.probe import check_packing
    from simpo.run_folder import RunFolder, environment, git_diff
    from simpo.sample import greedy_replies, reply_metrics
    from simpo.step import NonFiniteError, evaluate, update
    from simpo.tracker import Tracker

    console.quiet_libraries()
    cfg = run.train
    cache_dir = Path(run.cache_dir).expanduser()
    backend = Backend(run.backend, cfg.precision)
    chat = Chat(load_tokenizer(run.model, cache_dir))
    mixture = load_mixture(run.data)
    train_set = tokenize_set(chat, mixture.train, run.data, cache_dir)
    test_set = tokenize_set(chat, mixture.test, run.data, cache_dir)
    train_tokens = train_set.num_tokens(cfg.share_prefix)
    test_tokens = test_set.num_tokens(cfg.share_prefix)
    plan = build_plan(len(train_set.pairs), cfg.pairs_per_step, cfg.epochs, cfg.max_steps, cfg.seed)

    folder = RunFolder(run)
    if folder.finished:
        raise ConfigError([f"run_dir: {folder.path} holds a finished run (choose another)"])
    folder.write_data(
        {
            "mixture": console.mixture_rows(mixture.table),
            "train_tokens": asdict(train_set.report),
            "test_tokens": asdict(test_set.report),
            "train_fingerprint": pairs_fingerprint(train_set.pairs),
            "test_fingerprint": pairs_fingerprint(test_set.pairs),
            "template_sha256": chat.template_sha256,
        }
    )
    folder.write_json("environment.json", environment(str(backend)))
    folder.write_text("git.diff", git_diff())
    policy = load_policy(
        run.model,
        cache_dir,
        backend.device,
        cfg.seed,
        half=backend.half,
        share_prefix=cfg.share_prefix,
    )
    check_packing(policy, backend.half)
    planned = cost.layout(plan, train_tokens, cfg.tokens_per_row)
    memory = cost.estimate_memory(
        policy, planned.largest_row_tokens, backend.half, run.model.gradient_checkpointing
    )
    if cfg.check_memory:
        cost.check_memory(memory, backend.device)
    flops = cost.Flops(policy)
    optimizer = build_optimizer(policy, cfg)
    policy, optimizer = backend.prepare(policy, optimizer)

    store = CheckpointStore(folder.path / "checkpoints", cfg.keep_checkpoints)
    sampled = test_set.pairs[: run.sample.num_prompts]
    test_rows = rows_of_pairs(range(len(test_set.pairs)), test_tokens, cfg.tokens_per_row)

    with (
        folder.recording_failure(),
        Tracker(run.tracker, folder.path, run.name, trajectory(run)) as tracker,
    ):

        def packed(data: TokenizedSet, row: list[int]) -> PackedPairs:
            return pack([data.tokens[i] for i in row], row, cfg.share_prefix)

        def held_out() -> dict[str, float]:
            """Evaluate on the held-out pairs, log it, keep the replies."""
            metrics: dict[str, float] = {}
            if test_rows:
                tracker.say(f"held out: {len(test_set.pairs)} pairs, {len(sampled)} replies ...")
                rows = (packed(test_set, row) for row in test_rows)
                metrics |= evaluate(policy, rows, run.loss, backend)
            if sampled:
                replies = greedy_replies(policy, chat, sampled, run.sample.max_new_tokens)
                metrics |= reply_metrics(replies)
                folder.write_replies(step, replies)
            if metrics:
                tracker.log(step, "eval", metrics)
            return metrics

        step, metrics_bytes = 0, 0
        if (checkpoint := store.latest()) is not None:
            step, metrics_bytes = store.load(checkpoint, policy, optimizer)
        tracker.cut_back(metrics_bytes)
        tracker.say(
            *console.start_lines(run, policy, str(backend), mixture.table, train_set, plan),
            *console.cost_lines(planned, memory),
            f"run    {folder.path}" + (f", continued after step {step}" if step else ""),
        )
        begin = time.perf_counter()
        if step == 0:
            held_out()
        while step < plan.total_steps:
            step_begin = time.perf_counter()
            set_learning_rate(optimizer, rate := learning_rate(cfg, step, plan.total_steps))
            indices = pairs_of_step(plan, step)
            rows = [
                packed(train_set, row)
                for row in rows_of_pairs(indices, train_tokens, cfg.tokens_per_row)
            ]
            try:
                metrics = update(policy, optimizer, rows, run.loss, backend, cfg.max_grad_norm)
            except NonFiniteError as error:
                places = ", ".join(train_set.pairs[i].place for i in error.pairs[:8])
                raise RunError(f"step {step + 1}: {error}; not updated; pairs: {places}") from error
            step += 1
            seconds = time.perf_counter() - step_begin
            metrics |= {
                "learning_rate": rate,
                "epoch": step / plan.steps_per_epoch,
                "pairs_per_s": len(indices) / seconds,
                "tokens_per_s": int(train_tokens[indices].sum()) / seconds,
                **cost.speed(sum(flops.of_row(row) for row in rows) / seconds, backend.device),
            }
            last = step == plan.total_steps
            if last or step % cfg.log_every == 0:
                tracker.log(step, "train", metrics)
            tracker.progress(step, plan.total_steps, metrics)
            if cfg.eval_every and step % cfg.eval_every == 0 and not last:
                held_out()
            if last or (cfg.checkpoint_every and step % cfg.checkpoint_every == 0):
                store.save(step, policy, optimizer, tracker.num_bytes())
                folder.write_status("running", step, plan.total_steps)
        trained_s = time.perf_counter() - begin
        after = held_out()
        export.save_model(policy, chat, folder.path / "model")
        results = console.Results(before=tracker.first_evaluation(), after=after)
        folder.write_json(
            "results.json",
            {
                "eval_before": results.before,
                "eval_after": after,
                "train": {"steps": plan.total_steps, "this_process_s": trained_s},
            },
        )
        export.write_card(run, folder.path, results)
        folder.write_status("finished", step, plan.total_steps)
        tracker.say("", *console.end_lines(results, folder.path, step))
    if run.export.push_to_hub is not None:
        print(f"hub    {export.push_to_hub(run.export, folder.path / 'model')}")
    return after


def cli() -> None:
    """Entry of `simpo-train` and `python -m simpo.train`.

    Exits with 2 for bad settings or data, 1 for a failed run.
    """
    # Hydra would print its own account of a fault and exit with 1; this makes it raise instead.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    arguments = get_args_parser().parse_args()
    if arguments.multirun and (problems := explain(arguments.overrides, multirun=True)):
        _quit(2, "\n".join(problems))  # before the first member has run for hours
    try:
        main()
    except (ConfigError, DataError, RunError) as error:
        _quit_for(error)
    # Hydra raises ValueError for a group set to null or a number.
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        problems = explain(arguments.overrides, arguments.multirun)
        if not problems and isinstance(error, ValueError):
            raise
        _quit(2, "\n".join(problems) or str(error))
    except KeyboardInterrupt:
        _quit(130, "interrupted: the same command continues from the last checkpoint")


def _quit_for(error: ConfigError | DataError | RunError) -> NoReturn:
    _quit(1 if isinstance(error, RunError) else 2, str(error))


def _quit(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    cli()
