"""Wrong settings and bad records, each with the exact message for the user."""

import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as fuzz
from hypothesis import strategies as st

from simpo.__main__ import main
from simpo.config.choices import OnBadRecord
from simpo.config.compose import compose_run, run_of_words
from simpo.config.composer import Composer
from simpo.config.data import DataConfig, SourceConfig
from simpo.config.errors import ConfigError, DataError
from simpo.config.explain import explain
from simpo.config.flat import settings
from simpo.config.losses import LOSSES
from simpo.config.paths import config_dir
from simpo.data.mixture import load_mixture
from simpo.data.reading import readers
from simpo.data.reading.records import RecordFault, to_dialogue, to_pair, to_prompt, to_ranking
from simpo.data.rules import RULES
from simpo.loss.simpo import SimpoConfig

MODELS = "gemma2_it, llama3_base, llama3_instruct, mistral_base, mistral_instruct, smollm2"
SECTIONS = (
    "name, output_dir, run_dir, cache_dir, model, data, loss, train, sample, on_policy, rounds, "
    "monitor, watch, export, benchmark, judge, backend, launcher, tracker"
)
LOSS_NAMES = sorted({*LOSSES, "simpo", "simpo_hinge"})
OWN_LOSS = "a loss of your own needs loss.module=MODULE"
LOSS_CHOICES = f"{', '.join(LOSS_NAMES)}; {OWN_LOSS}"
SMOOTHED, WITH_GAMMA = (
    f"loss.{key}: only with loss="
    + " or ".join(name for name, kind in LOSSES.items() if hasattr(kind, key))
    for key in ("label_smoothing", "gamma_beta_ratio")
)
LOSS_KEYS = (
    "name, module, compare, margin_weights, sft_weight, beta, gamma_beta_ratio, length_normalized, "
    "label_smoothing"
)
TRAIN_KEYS = (
    "pairs_per_step, tokens_per_row, share_prefix, check_memory, epochs, max_steps, "
    "learning_rate, schedule, warmup_ratio, weight_decay, adam_beta1, adam_beta2, adam_epsilon, "
    "max_grad_norm, precision, seed, log_every, eval_every, checkpoint_every, keep_checkpoints, "
    "keep_best, patience_evals, stopped_exit_code"
)
LORA_KEYS = "rank, alpha, targets, rslora, dora, adapter"
DATA = (
    "demo, jsonl, ultrachat, ultrafeedback, ultrafeedback_gemma2_it, "
    "ultrafeedback_llama3_instruct, ultrafeedback_llama3_instruct_v02, "
    "ultrafeedback_mistral_instruct"
)
A_SOURCE = "{path: ..., ...}"
NO_SOURCE = "must list at least one source (such as [{path: train.jsonl}])"


# Command line, split at spaces -> lines of the answer.
SETTINGS: list[tuple[str, list[str]]] = [
    # Misspelt keys, near and far.
    ("loss.betaa=2", ["loss.betaa: no such key (did you mean loss.beta?)"]),
    ("loss.BETA=2", ["loss.BETA: no such key (did you mean loss.beta?)"]),
    ("model.lora.rnak=8", ["model.lora.rnak: no such key (did you mean model.lora.rank?)"]),
    ("model={pth:x}", ["model.pth: no such key (did you mean model.path?)"]),
    ("loss={beta:x}", ["loss.beta: must be a number, got x"]),
    ("trian.epochs=2", ["trian.epochs: no such key (did you mean train.epochs?)"]),
    ("sft_weight=2", ["sft_weight: no such key (did you mean loss.sft_weight?)"]),
    ("device=cpu", ["device: no such key (did you mean backend.device?)"]),
    (
        "max_new_tokens=1",
        [
            "max_new_tokens: no such key (did you mean sample.max_new_tokens or "
            "on_policy.max_new_tokens or benchmark.max_new_tokens?)"
        ],
    ),
    ("train.shards=8", [f"train.shards: no such key (train has {TRAIN_KEYS})"]),
    ("train={shards:1}", [f"train.shards: no such key (train has {TRAIN_KEYS})"]),
    ("model.lora.bias=8", [f"model.lora.bias: no such key (model.lora has {LORA_KEYS})"]),
    ("optimizer.foo=1", [f"optimizer.foo: no such key (the top level has {SECTIONS})"]),
    ("hydra.foo=1", ["hydra.foo: Could not override 'hydra.foo'."]),
    # Keys that only another choice has.
    ("loss=hinge loss.label_smoothing=0.1", [SMOOTHED]),
    ("loss=sigmoid,hinge loss.label_smoothing=0", [SMOOTHED]),
    ("tracker.project=mine", ["tracker.project: only with tracker=wandb or trackio"]),
    (
        "tracker=wandbb tracker.project=mine",
        [
            "tracker: no such choice, got wandbb (choose from console, mlflow, tensorboard, "
            "trackio, wandb)"
        ],
    ),
    (
        "tracker=mlflow tracker.tracking_uri= tracker.experiment=",
        [
            "tracker.tracking_uri: must not be empty",
            "tracker.experiment: must not be empty",
        ],
    ),
    ("tracker=trackio tracker.project=", ["tracker.project: must not be empty"]),
    (
        f"tracker=wandb tracker.project=team/mine tracker.tags=[good,{'t' * 65},'']",
        [
            "tracker.project: must have 1 to 128 characters, none of them in "
            "/\\#?%:, got team/mine",
            f"tracker.tags: a tag must have 1 to 64 characters, got {'t' * 65}",
            "tracker.tags: a tag must have 1 to 64 characters, got nothing",
        ],
    ),
    (
        "tracker=tensorboard tracker.project=mine",
        ["tracker.project: only with tracker=wandb or trackio"],
    ),
    # Wrong choices.
    ("loss=simp", [f"loss: no such choice, got simp (choose from {LOSS_CHOICES})"]),
    ("model=mistral", [f"model: no such choice, got mistral (choose from {MODELS})"]),
    ("model=smollm2,foo", [f"model: no such choice, got foo (choose from {MODELS})"]),
    ("loss=null", [f"loss: no such choice, got null (choose from {LOSS_CHOICES})"]),
    (
        "loss.name=hinge",
        [
            "loss.name: set by the group, got hinge (loss= takes " + ", ".join(LOSSES) + ")",
        ],
    ),
    (
        "backend.name=many",
        [
            "backend.name: set by the group, got many "
            "(backend= takes single, ddp, fsdp, zero2, zero3)"
        ],
    ),
    (
        "data.sources=[{path:x,format:orcca}]",
        [
            "data.sources[0].format: must be a shape or module:function, got orcca (did you mean "
            "orca?)",
        ],
    ),
    (
        "data.sources=[{path:x,columns:{q:prompt,r:prompt},min_margin:-1}]",
        [
            "data.sources[0].columns: 2 are to be prompt, got {q: prompt, r: prompt} (keep one)",
            "data.sources[0].min_margin: must be 0 or more, got -1.0",
        ],
    ),
    *(
        (
            f"data.sources=[{{path:x,columns:{bad}}}]",
            [f"data.sources[0].columns: must be of the form {{name: value, ...}}, got {shown}"],
        )
        for bad, shown in (("q", "q"), ("[q]", "[q]"), ("{q:[a]}", "{q: ['a']}"), ("null", "null"))
    ),
    # Wrong types.
    ("train.epochs=two", ["train.epochs: must be a whole number, got two"]),
    ("train.epochs=1.5", ["train.epochs: must be a whole number, got 1.5"]),
    ("train.epochs=true", ["train.epochs: must be a whole number, got true"]),
    *(
        (
            f"train.tokens_per_row={text}",
            [f"train.tokens_per_row: must be a whole number or auto, got {text}"],
        )
        for text in ("automatic", "1.5", "true", "null", "''")
    ),
    ("train.max_steps=1.5", ["train.max_steps: must be a whole number or null, got 1.5"]),
    ("loss.beta=big", ["loss.beta: must be a number, got big"]),
    ("loss.beta=", ["loss.beta: must be a number, got ''"]),
    ("loss.beta=null", ["loss.beta: must be a number, got null"]),
    ("loss.beta=[1,2]", ["loss.beta: must be a number, got [1, 2]"]),
    (
        "model.trust_remote_code=maybe",
        ["model.trust_remote_code: must be true or false, got maybe"],
    ),
    (
        "train.schedule=cosin",
        ["train.schedule: must be one of cosine, linear, constant, got cosin"],
    ),
    ("train.precision=fp16", ["train.precision: must be one of auto, fp32, bf16, got fp16"]),
    ("data.compat=trl", ["data.compat: must be one of none, paper, got trl"]),
    ("name=null", ["name: must be text, got null"]),
    ("model.lora=8", ["model.lora: must be of the form {rank: ..., ...}, got 8"]),
    ("model.lora.targets=q", ["model.lora.targets: must be a list such as [a, b], got q"]),
    ("loss.beta=${nothing}", ["loss.beta: Interpolation key 'nothing' not found"]),
    # Not a setting at all.
    ("loss.beta", ["loss.beta: not of the form key=value"]),
    ("=3", ["=3: not of the form key=value"]),
    *(
        (line, [f"{line}: {key!r} is no key (letters, digits, _ and dots, without blanks)"])
        for line, key in (
            ('"loss.beta"=3', '"loss.beta"'),
            ("data.sources.-1.path=x", "data.sources.-1.path"),
        )
    ),
    (
        "model.path=~/mine",
        [
            "model.path=~/mine: special characters need quotes within quotes "
            "('model.path=\"~/mine\"')"
        ],
    ),
    (
        "data.sources[0].weight=2",
        [
            "data.sources[0].weight: items of a list are named with a dot "
            "(write data.sources.0.weight)"
        ],
    ),
    (
        "loss.beta=2,3",
        [
            "several values in one setting: -m starts a run for each; a list is key=[a,b], "
            "a text with commas is 'key=\"a,b\"'"
        ],
    ),
    ("+loss.foo=1", [f"loss.foo: no such key (loss has {LOSS_KEYS})"]),
    ("+loss.foo=1,2", [f"loss.foo: no such key (loss has {LOSS_KEYS})"]),
    (
        "data.sources.path=x.jsonl",
        [
            "data.sources.path: no such item of data.sources (set all of it: "
            "data.sources='[{path: ...}, ...]')"
        ],
    ),
    ("+train.lr=1e-5", ["train.lr: here train.learning_rate (write train.learning_rate=1e-5)"]),
    ("++lr=1e-5", ["lr: here train.learning_rate (write train.learning_rate=1e-5)"]),
    ("~num_train_epochs", ["num_train_epochs: here train.epochs"]),
    (
        "data=jsonl data.sources=[{path: mine.jsonl, test_path: x}] loss.betaa=2",
        [
            "data.sources=[{path: mine.jsonl, test_path: x}]: the shell has split it into words "
            "(quote it: 'data.sources=[{path: mine.jsonl, test_path: x}]')"
        ],
    ),
    ("+loss.beta=3", ["loss.beta: set already (leave out the +)"]),
    ("+loss=hinge", ["loss: set already (leave out the +)"]),
    ("~loss.beta", ["loss.beta: cannot be left out (leave out the ~)"]),
    ("~loss", ["loss.name: required, but not given"]),
    ("model.name=???", ["model.name: required, but not given"]),
    # Ranges: model.
    ("model.path=", ["model.path: must not be empty"]),
    ("model.path=./nowhere", ["model.path: no such folder, got ./nowhere"]),
    ("model.tokenizer=./nowhere", ["model.tokenizer: no such folder, got ./nowhere"]),
    (
        "model.path=builtin:llama",
        ["model.path: the only built-in model is builtin:smollm2, got builtin:llama"],
    ),
    (
        "model.lora.rank=-1",
        ["model.lora.rank: must be 0 (full fine-tuning) or more, got -1"],
    ),
    ("model.lora.alpha=0", ["model.lora.alpha: must be above 0, got 0.0"]),
    (
        "model.lora.targets=[]",
        ["model.lora.targets: must name at least one module (all-linear means every linear layer)"],
    ),
    (
        "model.lora.targets=[all-linear,lm_head]",
        ["model.lora.targets: all-linear stands alone, got [all-linear, lm_head]"],
    ),
    (
        "model.lora.rank=0 model.lora.rslora=true model.lora.dora=true",
        [
            "model.lora.rslora: needs a rank above 0, got 0 (rank=0 fine-tunes all weights)",
            "model.lora.dora: needs a rank above 0, got 0 (rank=0 fine-tunes all weights)",
        ],
    ),
    (
        "model.lora.adapter=me/mine model.lora.targets=[mlp] model.lora.dora=true",
        [
            "model.lora.rank: comes with the adapter, got 16 (leave it at 0)",
            "model.lora.targets: comes with the adapter, got [mlp] (leave it at [all-linear])",
            "model.lora.dora: comes with the adapter, got true (leave it at false)",
        ],
    ),
    (
        "model.lora.adapter=./nowhere model.lora.rank=0",
        ["model.lora.adapter: no such folder, got ./nowhere"],
    ),
    ("model.lora.adapter= model.lora.rank=0", ["model.lora.adapter: must not be empty"]),
    (
        "model.quantization=fp4",
        ["model.quantization: must be one of none, nf4, int8, got fp4"],
    ),
    (
        "model.quantization=nf4 model.lora.rank=0",
        ["model.quantization: needs adapters, got nf4 (set model.lora.rank=16)"],
    ),
    (
        "model.quantization=int8 model.lora.dora=true",
        ["model.lora.dora: peft would lose the scales of int8 layers (set nf4)"],
    ),
    (
        "model.quantization=int8 backend=fsdp",
        [
            "model.quantization: backend=fsdp cannot shard int8 layers, it would lose their scales "
            "(set nf4, or backend=ddp, zero2 or zero3)"
        ],
    ),
    # Processes.
    ("backend.processes=2", ["backend.processes: only with backend=ddp or fsdp or zero2 or zero3"]),
    ("backend=ddp backend.processes=0", ["backend.processes: must be 1 or more, or null, got 0"]),
    ("backend=ddp backend.timeout_s=0", ["backend.timeout_s: must be 1 or more, got 0"]),
    ("backend=ddp backend.bucket_cap_mb=0", ["backend.bucket_cap_mb: must be 1 or more, got 0"]),
    (
        "backend=fsdp backend.reduce_dtype=fp8",
        ["backend.reduce_dtype: must be one of float32, bfloat16, got fp8"],
    ),
    (
        "backend=fsdp backend.shard_processes=1",
        ["backend.shard_processes: must be 2 or more, or null, got 1"],
    ),
    (
        "backend=zero2 backend.reduce_bucket_size=0",
        ["backend.reduce_bucket_size: must be 1 or more, got 0"],
    ),
    (
        "backend=zero3 backend.stage3_prefetch_bucket_size=-1",
        ["backend.stage3_prefetch_bucket_size: must be 0 or more, got -1"],
    ),
    (
        "backend=zero3 backend.async_save=true",
        ["backend.async_save: only with backend=single or ddp or fsdp"],
    ),
    # Best and last.
    (
        "train.keep_best=true",
        ["train.keep_best: needs evaluations during training (set train.eval_every)"],
    ),
    (
        "train.patience_evals=2",
        ["train.patience_evals: needs evaluations during training (set train.eval_every)"],
    ),
    (
        "train.patience_evals=-1",
        ["train.patience_evals: must be 0 (never stop early) or more, got -1"],
    ),
    (
        "train.stopped_exit_code=77",
        ["train.stopped_exit_code: 77 is in use within a run (choose another)"],
    ),
    ("train.stopped_exit_code=256", ["train.stopped_exit_code: must be from 0 to 255, got 256"]),
    (
        "monitor.metric=eval/loss",
        ["monitor.metric: must be a held-out metric without its eval/, got 'eval/loss'"],
    ),
    ("monitor.mode=best", ["monitor.mode: must be one of max, min, got best"]),
    # Ranges: data.
    ("data=jsonl", [f"data.sources: {NO_SOURCE}"]),
    (
        "data.max_length_tokens=1 data.max_prompt_tokens=0",
        [
            "data.max_length_tokens: must be 2 or more, got 1",
            "data.max_prompt_tokens: must be from 1 to below max_length_tokens (1), got 0",
        ],
    ),
    (
        "data.max_prompt_tokens=2048",
        ["data.max_prompt_tokens: must be from 1 to below max_length_tokens (2048), got 2048"],
    ),
    (
        "data.sources=train.jsonl",
        [f"data.sources: must be a list such as [{A_SOURCE}], got train.jsonl"],
    ),
    ("data.sources=[a.jsonl]", [f"data.sources[0]: must be {A_SOURCE}, got a.jsonl"]),
    (
        "data.sources={path:builtin:demo}",
        [f"data.sources: must be a list such as [{A_SOURCE}], got {{path: builtin:demo}}"],
    ),
    (
        "data=jsonl data.sources=[{path:builtin:demo},{path:builtin:demo,wieght:2}]",
        ["data.sources[1].wieght: no such key (did you mean weight?)"],
    ),
    (
        "data=jsonl data.sources=[{path:builtin:demo,weight:two}]",
        ["data.sources[0].weight: must be a number, got two"],
    ),
    (
        "data.sources.0.wieght=2",
        ["data.sources.0.wieght: no such key (did you mean data.sources.0.weight?)"],
    ),
    (
        "data.sources.1.weight=2",
        [
            "data.sources.1.weight: no such item of data.sources "
            "(set all of it: data.sources='[{path: ...}, ...]')"
        ],
    ),
    ("data.sources=[{weight:2}]", ["data.sources[0].path: required, but not given"]),
    ("data.sources=[{path:''}]", ["data.sources[0].path: must not be empty"]),
    (
        "data.sources.0.weight=0",
        ["data.sources[0].weight: must be above 0 and at most 1000, got 0.0"],
    ),
    (
        "data.sources.0.weight=1e9",
        ["data.sources[0].weight: must be above 0 and at most 1000, got 1000000000.0"],
    ),
    (
        "data.sources=[{path:https://example.org/a.jsonl}]",
        [
            "data.sources[0].path: must be a hub id or a local file or folder, "
            "got https://example.org/a.jsonl (download it)"
        ],
    ),
    ("data.sources.0.weight=inf", ["data.sources[0].weight: must be a finite number, got inf"]),
    ("data.sources.0.num_pairs=0", ["data.sources[0].num_pairs: must be 1 or more, got 0"]),
    (
        "data.sources=[{path:builtin:demo,weight:2,num_pairs:3}]",
        ["data.sources[0].num_pairs: cannot go with weight, got 3 and 2.0 (keep one)"],
    ),
    ("data.sources.0.train_split=null", ["data.sources: no source has a train_split"]),
    (
        "data.sources=[{path:builtin:demo},{path:a/b,train_split:null,test_split:null}]",
        [
            "data.sources[1].train_split: null like test_split, so the source gives nothing "
            "(set one)"
        ],
    ),
    (
        "data.sources.0.path=builtin:dmeo",
        ["data.sources[0].path: the only built-in data set is builtin:demo, got builtin:dmeo"],
    ),
    (
        "data.sources=[{path:no.jsonl,test_path:none.jsonl}]",
        [
            "data.sources[0].path: no such file or folder, got no.jsonl",
            "data.sources[0].test_path: no such file or folder, got none.jsonl",
        ],
    ),
    (
        "data.sources=[{path:./nowhere}]",
        ["data.sources[0].path: no such file or folder, got ./nowhere"],
    ),
    (
        "data.sources.0.test_path=a.jsonl",
        [
            "data.sources[0].test_path: only where path is a .jsonl, .json, .csv, .tsv, .parquet "
            "or .arrow file (else use test_split)"
        ],
    ),
    # Ranges: loss.
    ("loss.beta=0", ["loss.beta: must be above 0, got 0.0 (the paper uses 2.0 to 10)"]),
    ("loss.beta=nan", ["loss.beta: must be a finite number, got nan"]),
    ("loss.gamma_beta_ratio=-0.5", ["loss.gamma_beta_ratio: must be 0 or more, got -0.5"]),
    ("loss=orpo loss.odds_weight=0", ["loss.odds_weight: must be above 0, got 0.0"]),
    (
        "loss=alphapo loss.gamma_beta_ratio=-1",
        ["loss.gamma_beta_ratio: must be 0 or more, got -1.0"],
    ),
    (
        "loss=r_dpo loss.beta=0 loss.alpha=-2",
        [
            "loss.beta: must be above 0, got 0.0",
            "loss.alpha: must be 0 or more, got -2.0",
        ],
    ),
    (
        "loss=sft loss.sft_weight=2",
        ["loss.sft_weight: must be 1 with loss=sft, got 2.0 (leave it out)"],
    ),
    (
        "loss=dpo loss.gamma_beta_ratio=1",
        [WITH_GAMMA],
    ),
    (
        "loss=sft data.compat=paper",
        [
            "data.compat: paper applies to preference pairs only "
            "(with loss=sft set data.compat=none)"
        ],
    ),
    ("on_policy.seeds=[1,1]", ["on_policy.seeds: must be two or more different ones, got [1, 1]"]),
    (
        "on_policy.temperature=0",
        ["on_policy.temperature: must be above 0, got 0.0 (0 makes replies equal)"],
    ),
    ("on_policy.top_p=1.5", ["on_policy.top_p: must be above 0 and at most 1, got 1.5"]),
    ("on_policy.num_prompts=0", ["on_policy.num_prompts: must be 1 or more, or null, got 0"]),
    *(
        (
            f"on_policy.margin_quantile={one}",
            [f"on_policy.margin_quantile: must be above 0 and below 1, got {one}"],
        )
        for one in ("0.0", "1.0")
    ),
    (
        "sample.num_prompts.x=1",
        ["sample.num_prompts.x: no such key (sample has num_prompts, max_new_tokens)"],
    ),
    (
        "model.chat_template_kwargs={1:2}",
        ["model.chat_template_kwargs: names must be text, got {1: 2}"],
    ),
    (
        "on_policy.temperatures=[inf,1,1,1]",
        ["on_policy.temperatures: must be a finite number, got inf"],
    ),
    ("on_policy.parts=0", ["on_policy.parts: must be 1 or more, got 0"]),
    (
        "on_policy.part=2",
        ["on_policy.part: must be from 1 to parts=1, got 2"],
    ),
    ("on_policy.slices=0", ["on_policy.slices: must be 1 or more, got 0"]),
    *(
        (
            f"on_policy.slices=3 on_policy.slice={one}",
            [f"on_policy.slice: must be from 1 to slices=3, got {one}"],
        )
        for one in (0, 4)
    ),
    (
        "on_policy.engine=vllm",
        ["on_policy.engine: vllm is not installed (pip install 'simpo[vllm]')"],
    ),
    ("loss.sft_weight=-1", ["loss.sft_weight: must be 0 or more, got -1.0"]),
    *(
        (f"loss=mix {words}", [f"loss.{message}"])
        for words, message in {
            "loss.parts={sigmoid:1}": "parts: must name two losses or more, got {'sigmoid': 1} "
            "(such as {sigmoid: 0.8, bco: 0.2})",
            "loss.parts={sigmoid:1,hinge:{beta:2}}": "parts.hinge: must have a weight above 0, got "
            "{'beta': 2}",
            "loss.parts={sigmoid:1,bco:-1}": "parts.bco: must have a weight above 0, got -1",
            "loss.parts={sigmoid:1,bco:{weight:1,tau:2}}": "parts.bco.tau: no such key of bco "
            "(beta)",
            "loss.parts={sigmoid:1,bco:{weight:1,beta:0}}": "parts.bco.beta: must be above 0, got "
            "0",
            "loss.parts={sigmoid:1,bco:{weight:1,beta:x}}": "parts.bco: settings must be numbers, "
            "got {'weight': 1, 'beta': 'x'}",
            "loss.parts={sigmoid:1,alphapo:{weight:1,alpha:null}}": "parts.alphapo: settings must "
            "be numbers, got {'weight': 1, 'alpha': None}",
            "loss.parts={bco:1,sigmoid:{weight:1,length_normalized:no}}": "parts.sigmoid."
            "length_normalized: must be true or false, got no",
            "loss.parts={bco:1,sigmoid:{weight:1,beta:nan}}": "parts: must be a finite number, got "
            "nan",
        }.items()
    ),
    (
        "loss=exo loss.label_smoothing=0",
        ["loss.label_smoothing: must be above 0 and below 0.5, got 0.0"],
    ),
    ("loss.label_smoothing=0.5", ["loss.label_smoothing: must be from 0 to below 0.5, got 0.5"]),
    # Ranges: train.
    *(
        (f"train.{key}=0", [f"train.{key}: must be 1 or more, got 0"])
        for key in ("pairs_per_step", "tokens_per_row", "epochs", "log_every", "keep_checkpoints")
    ),
    *(
        (f"train.{key}=-1", [f"train.{key}: must be 0 (never in between) or more, got -1"])
        for key in ("eval_every", "checkpoint_every")
    ),
    ("train.max_steps=0", ["train.max_steps: must be 1 or more, or null, got 0"]),
    ("train.learning_rate=0", ["train.learning_rate: must be above 0, got 0.0"]),
    ("train.learning_rate=nan", ["train.learning_rate: must be a finite number, got nan"]),
    *(
        (f"train.{key}=1", [f"train.{key}: must be from 0 to below 1, got 1.0"])
        for key in ("warmup_ratio", "adam_beta1", "adam_beta2")
    ),
    *(
        (f"train.{key}=-1", [f"train.{key}: must be 0 or more, got -1.0"])
        for key in ("weight_decay", "max_grad_norm")
    ),
    ("train.adam_epsilon=0", ["train.adam_epsilon: must be above 0, got 0.0"]),
    # Ranges: sample, export.
    ("sample.num_prompts=-1", ["sample.num_prompts: must be 0 (none) or more, got -1"]),
    ("sample.max_new_tokens=0", ["sample.max_new_tokens: must be 1 or more, got 0"]),
    ("export.push_to_hub=mine", ["export.push_to_hub: must be owner/name, got mine"]),
    ("export.push_to_hub=me/", ["export.push_to_hub: must be owner/name, got me/"]),
    (
        "export.push_to_hub=me/x--y",
        [
            "export.push_to_hub: not a valid name on the hub, got me/x--y (Cannot have -- or .. in "
            "repo_id)"
        ],
    ),
    # Several faults of several kinds: all are told at once, groups first.
    (
        "loss.betaa=2 loss=foo model.lora.rank=x train.epochs=0 sample.num_prompts=-1",
        [
            f"loss: no such choice, got foo (choose from {LOSS_CHOICES})",
            "loss.betaa: no such key (did you mean loss.beta?)",
            "model.lora.rank: must be a whole number, got x",
            "train.epochs: must be 1 or more, got 0",
            "sample.num_prompts: must be 0 (none) or more, got -1",
        ],
    ),
    # Interpolations to another kind of value.
    *(
        (f"train.seed={text}", [f"train.seed: must be a whole number, got {text}"])
        for text in ("${name}", "${loss}")
    ),
    ("loss.beta=${train}", ["loss.beta: must be a number, got ${train}"]),
    ("model.path=${loss}", ["model.path: must be text, got ${loss}"]),
    ("train=${loss}", ["train: must be of the form {pairs_per_step: ..., ...}, got ${loss}"]),
    ("model.lora=${train}", ["model.lora: must be of the form {rank: ..., ...}, got ${train}"]),
    (
        "model.lora.targets=${name}",
        ["model.lora.targets: must be a list such as [a, b], got ${name}"],
    ),
    (
        "data.sources=${loss}",
        [f"data.sources: must be a list such as [{A_SOURCE}], got ${{loss}}"],
    ),
    ("data.sources=[${loss}]", [f"data.sources[0]: must be {A_SOURCE}, got ${{loss}}"]),
    ("loss.beta=${loss.beta}", ["loss.beta: Recursive interpolation detected"]),
    (
        "experiments=[paper/mistral_base,objectives/cpo]",
        [
            "experiments=[paper/mistral_base,objectives/cpo]: In 'experiments/paper/mistral_base': "
            + WITH_GAMMA
        ],
    ),
    ("data=[1,2]", [f"data: no such choice, got [1, 2] (choose from {DATA})"]),
    # What no setting may be.
    ("train.seed=-1", ["train.seed: must be 0 or more, got -1"]),
    ("data.seed=-1", ["data.seed: must be 0 or more, got -1"]),
    ("on_policy.seeds=[-1,2]", ["on_policy.seeds: must be 0 or more, got [-1, 2]"]),
    *(
        (f"{key}=1099511627776", [f"{key}: must be at most 4294967295 in size, got 1099511627776"])
        for key in ("train.seed", "data.seed", "train.max_steps", "train.pairs_per_step")
    ),
    (
        "backend=ddp backend.timeout_s=100000000000000000000",
        [
            "backend.timeout_s: must be at most 4294967295 in size, got 100000000000000000000",
        ],
    ),
    ("backend=ddp backend.timeout_s=0", ["backend.timeout_s: must be 1 or more, got 0"]),
    (
        "backend=ddp backend.timeout_s=1e20",
        ["backend.timeout_s: must be a whole number, got 1e+20"],
    ),
    ("launcher.poll_s=1e20", ["launcher.poll_s: must be above 0 and at most 3600, got 1e+20"]),
    *(
        (f"name={text}", [f"name: must be the name of a folder, without /, got {text or repr('')}"])
        for text in ("", ".", "..", "a/b", "/abs")
    ),
    (f"name={'x' * 300}", ["name: must be at most 200 bytes long, got 300"]),
    (
        "data.name=../up name=x",
        ["data.name: must be the name of a folder, without /, got ../up"],
    ),
    *(
        (f'name="a{character}b"', [f"name: must be a line of readable text, got {shown}"])
        for character, shown in (("\n", r"'a\nb'"), ("\x1b", r"'a\x1bb'"))
    ),
    *((f"{key}=", [f"{key}: must not be empty"]) for key in ("output_dir", "run_dir", "cache_dir")),
    (
        "output_dir=/dev/null/x",
        ["output_dir: must be a folder, but /dev/null is not one"],
    ),
    # Not an option of this command.
    ("--foo", ["--foo: no such option (settings are key=value; -h lists what there is)"]),
    # Sweeps.
    ("loss.beta=choice()", ["loss.beta: 'choice()': empty choice is not legal"]),
    ("loss.beta=range(3,1)", ["loss.beta: range(3,1) gives no value (list some: loss.beta=a,b)"]),
    # A setting of Hydra's own is none of the faults.
    ("hydra.verbose=true loss.beta=x", ["loss.beta: must be a number, got x"]),
]


@pytest.mark.parametrize(("line", "problems"), SETTINGS, ids=[line for line, _ in SETTINGS])
def test_settings(line, problems, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        compose_run(line.split(" "))
    assert caught.value.problems == problems
    assert str(caught.value) == "\n".join(problems)


@pytest.mark.parametrize(
    "line",
    [
        "loss=hinge loss=sigmoid loss.label_smoothing=0.1",
        "++loss.beta=3 train={epochs:2} data.sources.0.weight=2",
        "tracker=wandb tracker.mode=offline tracker.tags=[a,b]",
        "hydra.verbose=true",
    ],
)
def test_what_is_right_passes(line):
    compose_run(line.split(" "))


OPTUNA, STAGES = "hydra/sweeper=optuna", "hydra/sweeper=stages"
SWEEPS: list[tuple[str, list[str]]] = [
    (f"{OPTUNA} loss.beta=interval(1,2)", []),
    (f"{OPTUNA} loss.beta=tag(log,interval(1,2)) train.epochs=int(interval(1,5))", []),
    (f"{STAGES} loss=glob(*po) train.epochs=choice(1,2)", []),
    ("loss=glob([s*,h*],exclude=sft)", []),
    ("loss.beta=shuffle(1,2) train.seed=range(1,4) data.seed=sort(3,1)", []),
    ("name='x,y',z", []),
    ("experiments=sweeps/optuna_beta_gamma", []),
    ("experiments=sweeps/demo_study", []),
    (
        "loss.beta=interval(1,2)",
        ["loss.beta: interval(1,2) needs hydra/sweeper=optuna (list values: loss.beta=a,b)"],
    ),
    (
        f"{OPTUNA} loss.beta=interval(2,1)",
        ["loss.beta: an interval goes from low to high, got interval(2,1)"],
    ),
    (
        f"{OPTUNA} loss.beta=tag(log,interval(0,1))",
        ["loss.beta: a logarithmic interval is above 0, got tag(log,interval(0,1))"],
    ),
    (
        f"{OPTUNA} loss.beta=interval(-1,2)",
        ["loss.beta: must be above 0, got -1.0 (the paper uses 2.0 to 10)"],
    ),
    ("loss.beta=glob(*)", ["loss.beta: glob(*) gives no value (list some: loss.beta=a,b)"]),
    (
        "train.seed=range(1,1000000000)",
        ["train.seed: range(1,1000000000) has 999,999,999 values (at most 10,000)"],
    ),
    (
        "loss.beta=range(0,1,0.0)",
        ["loss.beta: a range has finite ends and a step, got range(0,1,0.0)"],
    ),
    (
        "train.seed=range(0,200) data.seed=range(0,200)",
        ["this sweep has 40,000 members (at most 10,000)"],
    ),
    *(
        (
            f"{start}hydra.sweeper.pruner=median",
            ["hydra.sweeper.pruner: only a search by Optuna has it (hydra/sweeper=optuna)"],
        )
        for start in ("", "+", f"{STAGES} ", "experiments=sweeps/beta_gamma ")
    ),
    (
        f"{OPTUNA} +hydra.sweeper.pruners=median",
        ["hydra.sweeper.pruners: no sweeper has such a setting (see docs/sweeps.md)"],
    ),
    (f"{OPTUNA} hydra.sweeper.pruner=median loss.beta=1,2", []),
    (f"{STAGES} hydra.sweeper.stages=[]", []),
    (
        f"{STAGES} hydra.sweeper.stages=[5]",
        ['hydra.sweeper.stages: must be of the form [{loss.beta: "1,2"}], got [5]'],
    ),
]


@pytest.mark.parametrize(("line", "problems"), SWEEPS, ids=[line for line, _ in SWEEPS])
def test_sweeps(line, problems):
    found = explain(line.split(" "), multirun=True)
    assert found == problems


@pytest.fixture
def own_composer(tmp_path):
    (tmp_path / "loss").mkdir()
    (tmp_path / "experiments").mkdir()
    (tmp_path / "loss/mine.yaml").write_text("defaults: [sigmoid, _self_]\nbeta: 7\n")
    return Composer(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "text", "fault"),
    [
        (
            "experiments=odd",
            "# @package _global_\ndefaults: [override /model: tinny]",
            f"model: no such choice, got tinny (choose from {MODELS})",
        ),
        (
            "loss=odd",
            "defaults: [power, _self_]",
            f"its defaults name loss/power, which does not exist ({OWN_LOSS})",
        ),
        ("loss=odd", "defaults: [odd, _self_]", "a file has itself in its defaults"),
    ],
)
def test_a_file_that_names_no_choice(line, text, fault, own_composer):
    group = line.partition("=")[0]
    Path(f"{own_composer.config_dir}/{group}/odd.yaml").write_text(f"{text}\n")
    with pytest.raises(ConfigError) as caught:
        compose_run([line], own_composer)
    assert caught.value.problems == [f"{line}: {fault}"]


def test_a_folder_of_further_choices(own_composer):
    loss = compose_run(["loss=mine"], own_composer).loss
    assert isinstance(loss, SimpoConfig) and loss.beta == 7
    assert explain(["loss=mine,hinge", "loss.beta=3"], True, own_composer) == []
    known = f"{', '.join(sorted([*LOSS_NAMES, 'mine']))}; {OWN_LOSS}"
    with pytest.raises(ConfigError) as caught:
        compose_run(["loss=mien"], own_composer)
    assert caught.value.problems == [f"loss: no such choice, got mien (choose from {known})"]
    with pytest.raises(ConfigError) as caught:
        Composer(f"{own_composer.config_dir}/nowhere")
    assert caught.value.problems == [
        f"--config-dir: no such folder, got {own_composer.config_dir}/nowhere"
    ]


def test_a_file_with_the_name_of_a_choice(own_composer):
    """Hydra reads conf/ first, but experiments/ last."""
    own = Path(own_composer.config_dir)
    (own / "experiments/demo_full.yaml").write_text("train:\n  max_steps: 77\n")
    assert compose_run(["experiments=demo_full"], own_composer).train.max_steps == 77
    (own / "loss/dpo.yaml").write_text("defaults: [sigmoid, _self_]\n")
    with pytest.raises(ConfigError) as caught:
        Composer(str(own))
    assert caught.value.problems == [
        f"--config-dir: {own}/loss/dpo.yaml has the name of a file of simpo, which is read instead "
        "(rename it)"
    ]
    Composer(str(config_dir("conf")))


def test_a_file_with_an_interpolation_of_itself(own_composer):
    own = Path(own_composer.config_dir) / "loss/round.yaml"
    own.write_text("defaults: [sigmoid, _self_]\nbeta: ${loss.beta}\n")
    with pytest.raises(ConfigError) as caught:
        compose_run(["loss=round"], own_composer)
    assert caught.value.problems == ["loss.beta: Recursive interpolation detected"]


@pytest.mark.parametrize("command", ["preview", "generate", "annotate"])
def test_words_of_the_other_commands(command, own_composer, capsys):
    loss = run_of_words(["--config-dir", own_composer.config_dir, "loss=mine"]).loss
    assert isinstance(loss, SimpoConfig) and loss.beta == 7
    for words, answer in (
        (["--foo"], "--foo: no such option (settings are key=value; -h lists what there is)\n"),
        ([""], "'': not of the form key=value\n"),
        (
            ["--config-dir"],
            "argument -cd/--config-dir: expected one argument (see --help)\n",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            main([command, *words])
        assert (ended.value.code, capsys.readouterr().err) == (2, answer)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["-m", "--cfg", "job"], "--multirun, --cfg: exclude each other (give one)"),
        (["--resolve"], "--resolve: only with --cfg"),
        (
            ["--experimental-rerun", "x"],
            "--experimental-rerun: not supported (see command.txt of a run)",
        ),
        (["--config-dir", "nowhere"], "--config-dir: no such folder, got nowhere"),
        (
            ["--foo", "3"],
            "unrecognized arguments: --foo (settings are key=value, such as "
            "train.learning_rate=1e-6; see --help)",
        ),
        (
            ["--config-name", "nowhere", "loss.beta=2"],
            "--config-name: Cannot find primary config 'nowhere'. Check that it's in your config "
            "search path.",
        ),
        (
            ["data.sources=[{path: x, wieght: 2, shards: 3}]"],
            "data.sources[0].wieght: no such key (did you mean weight?)\n"
            "data.sources[0].shards: no such key (an item has path, subset, revision, train_split, "
            "test_split, test_path, format, columns, pairs, min_margin, weight, num_pairs, "
            "held_out_name)",
        ),
        (["loss.beta=${nope}"], "loss.beta: Interpolation key 'nope' not found"),
        *(
            (
                [*words, f"{key}=x"],
                f"{key}: simpo names the folders itself (set output_dir, or run_dir for the folder "
                "of one run)",
            )
            for words, key in (([], "hydra.run.dir"), (["-m"], "hydra.sweep.subdir"))
        ),
        (
            ["-m", "loss.beta=interval(1,2)"],
            f"loss.beta: interval(1,2) needs {OPTUNA} (list values: loss.beta=a,b)",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_hydra(words, answer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["train", *words])
    assert (ended.value.code, capsys.readouterr().err) == (2, f"{answer}\n")
    assert list(tmp_path.iterdir()) == []


ODD = st.one_of(
    st.sampled_from(
        ["${loss}", "${name}", "${data.sources}", "${oc.env:NOPE}", "null", "[]", "{}"]
    ),
    st.sampled_from(["''", "[1,a]", "{a:1}", "[{path:b}]", "-1", "1e999", "nan", "true", "???"]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8).map(json.dumps),
)
KEYS = sorted(
    key.replace("[", ".").replace("]", "") for key in settings(compose_run(["tracker=wandb"]))
)


@pytest.mark.matrix
@given(st.sampled_from([*KEYS, "train", "model.lora", "data.sources", "data", "loss"]), ODD)
@fuzz(max_examples=25, deadline=None, derandomize=True, database=None)
def test_odd_values_are_answered(key, value):
    try:
        compose_run(["tracker=wandb", f"{key}={value}"])
    except ConfigError as error:
        assert error.problems
        assert all(line and "\n" not in line for line in error.problems)


def test_chat_template_names_those_shipped(tmp_path, monkeypatch):
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    monkeypatch.setattr("simpo.config.paths.TEMPLATES", tmp_path)
    with pytest.raises(ConfigError) as caught:
        compose_run(["model.chat_template=mine"])
    assert caught.value.problems == ["model.chat_template: no such file, got mine (shipped: own)"]
    compose_run(["model.chat_template=own"])


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard", "mlflow"])
def test_trackers_that_are_not_installed(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        compose_run([f"tracker={name}"])
    assert caught.value.problems == [
        f"tracker.name: {name} is not installed (pip install 'simpo[{name}]')"
    ]


def test_bitsandbytes_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("simpo.config.models.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        compose_run(["model.quantization=int8"])
    assert caught.value.problems == [
        "model.quantization: needs bitsandbytes (pip install bitsandbytes)"
    ]


def test_adapters_in_the_wrong_place(tmp_path, monkeypatch):
    """A folder with an adapter is no model.path, a run's folder is no adapter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        compose_run(["model.path=run/model"])
    assert caught.value.problems == [
        "model.path: holds an adapter without its base, got run/model "
        "(model.path=BASE model.lora.rank=0 model.lora.adapter=run/model)"
    ]
    with pytest.raises(ConfigError) as caught:
        compose_run(["model.lora.adapter=run", "model.lora.rank=0"])
    assert caught.value.problems == [
        "model.lora.adapter: must hold an adapter_config.json, got run (a run's is in its model/)"
    ]
    compose_run(["model.lora.adapter=run/model", "model.lora.rank=0"])


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ASKED = [user("Why is the sky blue?")]
GOOD = {"prompt": "Why is the sky blue?", "chosen": "Scattering.", "rejected": "It is not."}

CALLED = [assistant(None) | {"tool_calls": [{"name": "search", "arguments": {}}]}]

# Row -> what is wrong with it.
ROWS: list[tuple[Any, str]] = [
    (["a"], "must be an object with chosen and rejected, got a list"),
    (None, "must be an object with chosen and rejected, got null"),
    ({}, "chosen: missing (the record has no value)"),
    ({"prompt": "a", "output": "b"}, "chosen: missing (the record has prompt, output)"),
    (GOOD | {"rejected": None}, "rejected: missing (the record has prompt, chosen)"),
    ({"chosen": "a", "rejected": "b"}, "prompt: missing (the record has chosen, rejected)"),
    (
        {"question": "q", "chosen": "a", "rejected": "b", "prompt": None},
        "prompt: missing (the record has question, chosen, rejected)",
    ),
    (GOOD | {"prompt": []}, "prompt: holds no message"),
    (GOOD | {"prompt": " "}, "prompt: the last turn is empty"),
    (GOOD | {"prompt": 3}, "prompt: must be text or a list of messages, got a number"),
    (GOOD | {"chosen": {"a": 1}}, "chosen: must be text or a list of messages, got an object"),
    (GOOD | {"chosen": True}, "chosen: must be text or a list of messages, got a boolean"),
    (GOOD | {"chosen": []}, "chosen: holds no message"),
    (GOOD | {"chosen": ["a"]}, "chosen[0]: must be an object with role and content, got text"),
    (
        GOOD | {"chosen": [{"from": "gpt", "value": "a"}]},
        "chosen[0]: must have role and content, has from, value",
    ),
    (
        GOOD | {"rejected": [user("a"), {"role": "bot", "content": "b"}]},
        "rejected[1].role: must be one of system, developer, user, assistant, tool, got bot",
    ),
    (
        GOOD | {"rejected": [{"role": "assistant", "content": None}]},
        "rejected[0].content: must be text, got null",
    ),
    (
        GOOD | {"chosen": [*ASKED, assistant("a"), user("b")]},
        "chosen: the last turn must be the assistant's, got user",
    ),
    (GOOD | {"rejected": " \n"}, "rejected: the response is empty"),
    (GOOD | {"chosen": [assistant("")]}, "chosen: the response is empty"),
    (GOOD | {"rejected": "Scattering.\n"}, "chosen and rejected are the same"),
    (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
        "chosen and rejected start from different prompts",
    ),
    (
        {
            "prompt": ASKED,
            "chosen": [user("a"), assistant("b")],
            "rejected": [user("a"), assistant("d")],
        },
        "chosen does not continue prompt: their turns differ",
    ),
    (
        GOOD | {"prompt": [*ASKED, assistant("a")]},
        "prompt: the last turn must be the user's, got assistant",
    ),
    (
        GOOD | {"prompt": [*ASKED, {"role": "system", "content": "Be brief."}, user("a")]},
        "prompt: a system message may only come first",
    ),
    (GOOD | {"system": ["a"]}, "system: must be text, got a list"),
    (
        GOOD | {"system": "Be kind.", "prompt": [{"role": "system", "content": "No."}, *ASKED]},
        "system: the prompt has another system message of its own",
    ),
    (
        GOOD | {"prompt": [*ASKED, {"role": "developer", "content": "Be brief."}, user("a")]},
        "prompt: a developer message may only come first",
    ),
    (GOOD | {"tools": {"name": "search"}}, "tools: must be a list of JSON schemas, got an object"),
    (GOOD | {"tools": ["search"]}, "tools[0]: must be a JSON schema with a name"),
    (GOOD | {"functions": [{"function": {}}]}, "functions[0]: must be a JSON schema with a name"),
    (
        GOOD | {"tools": "[{]"},
        "tools: not JSON: Expecting property name enclosed in double quotes at column 3",
    ),
    (
        GOOD | {"tool_calls": [{"name": "a"}]},
        "tool_calls: has a value outside of messages (put it into a message)",
    ),
    (GOOD | {"images": ["a.png"]}, "images: has a value, and only text can be trained on"),
    (
        GOOD | {"chosen": [assistant("a") | {"tool_calls": [{"id": 1}]}]},
        "chosen[0].tool_calls[0]: must have a function with name and arguments",
    ),
    (
        GOOD | {"chosen": [assistant("a") | {"tool_calls": "search"}]},
        "chosen[0].tool_calls: must be a list of tool calls, got text",
    ),
    (
        GOOD | {"chosen": [assistant(None) | {"function_call": {"name": "a", "arguments": "{a"}}]},
        "chosen[0].function_call.arguments: not JSON: Expecting property name enclosed in double "
        "quotes at column 2",
    ),
    (
        GOOD
        | {
            "chosen": [
                assistant(None) | {"tool_calls": [{"function": {"name": "a", "arguments": "[1]"}}]}
            ]
        },
        "chosen[0].tool_calls[0].arguments: must be a JSON object, got a list",
    ),
    (
        GOOD | {"prompt": [user("a") | {"tool_calls": [{"name": "a"}]}]},
        "prompt[0].tool_calls: only the assistant calls tools, got role user",
    ),
    (
        GOOD | {"prompt": [{"role": "tool", "content": "a", "tool_call_id": 1}]},
        "prompt[0].tool_call_id: must be text, got a number",
    ),
    (
        GOOD | {"chosen": [assistant("a") | {"reasoning": ["b"]}]},
        "chosen[0].reasoning: must be text, got a list",
    ),
    (
        GOOD
        | {
            "prompt": [
                user(
                    [
                        {"type": "text", "text": "a"},
                        {"type": "image_url", "image_url": {"url": "b.png"}},
                    ]
                )
            ]
        },
        "prompt[0].content[1]: is image_url, and only text can be trained on",
    ),
    (
        GOOD | {"prompt": [user(["a"])]},
        "prompt[0].content[0]: must be an object with type and text, got text",
    ),
    (
        GOOD | {"prompt": [user([{"type": "text", "text": None}])]},
        "prompt[0].content[0].text: must be text, got null",
    ),
    (
        GOOD | {"chosen": [*CALLED, {"role": "tool", "content": "4"}]},
        "chosen: the last turn must be the assistant's, got tool",
    ),
    (
        GOOD | {"chosen": [*CALLED, {"role": "developer", "content": "4"}, assistant("b")]},
        "chosen: a developer message may only come first",
    ),
    (GOOD | {"rule": "bullets"}, "rule: a rule must be a mapping, not str"),
    (
        GOOD | {"rule": {"name": "haiku"}},
        f"rule: unknown rule name 'haiku'; known: {', '.join(RULES)}",
    ),
    (GOOD | {"rule": {"name": "bullets"}}, "rule: rule 'bullets' lacks the argument 'count'"),
]


@pytest.mark.parametrize(("row", "fault"), ROWS, ids=[fault[:40] for _, fault in ROWS])
def test_rows(row, fault):
    with pytest.raises(RecordFault) as caught:
        to_pair(row, "here")
    assert str(caught.value) == fault


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def mixture(*several, **settings):
    sources = [SourceConfig(**source) for source in several]
    return load_mixture(DataConfig(name="rows", sources=sources, **settings))


def data_error(*sources, **settings):
    with pytest.raises(DataError) as caught:
        mixture(*sources, **settings)
    return str(caught.value).splitlines()


EMPTY = GOOD | {"chosen": ""}
SAME = GOOD | {"chosen": "It is not."}
REMEDY = "(mend the records, or leave them out with data.on_bad_record=drop)"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_stop_names_source_split_and_row(folder):
    write(folder / "a.jsonl", [GOOD, EMPTY, GOOD, '{"prompt": }', SAME])
    assert data_error({"path": "a.jsonl"}) == [
        "a.jsonl train record 2: chosen: the response is empty",
        "a.jsonl train record 4: not JSON: Expecting value at column 12",
        "a.jsonl train record 5: chosen and rejected are the same",
        REMEDY,
    ]


def test_stop_names_the_held_out_file(folder):
    write(folder / "a.jsonl", [GOOD])
    write(folder / "b.jsonl", [GOOD, SAME])
    assert data_error({"path": "a.jsonl", "test_path": "b.jsonl"}) == [
        "b.jsonl test record 2: chosen and rejected are the same",
        REMEDY,
    ]


@pytest.mark.parametrize(
    ("bad", "rest"),
    [(5, []), (6, ["... and 1 more bad record"]), (9, ["... and 4 more bad records"])],
)
def test_stop_shows_the_first_five(folder, bad, rest):
    write(folder / "a.jsonl", [GOOD] + [EMPTY] * bad)
    shown = [f"a.jsonl train record {i}: chosen: the response is empty" for i in range(2, 7)]
    assert data_error({"path": "a.jsonl"}) == [*shown, *rest, REMEDY]


def test_drop_counts_by_fault(folder):
    write(folder / "a.jsonl", [EMPTY, GOOD, SAME, EMPTY, "[", GOOD])
    write(folder / "b.jsonl", [SAME, GOOD])
    loaded = mixture({"path": "a.jsonl", "test_path": "b.jsonl"}, on_bad_record=OnBadRecord.drop)
    train, test = loaded.table
    assert (train.records, train.taken, test.records, test.taken) == (6, 2, 2, 1)
    assert train.bad == {
        "chosen: the response is empty": 2,
        "chosen and rejected are the same": 1,
        "not JSON: Expecting value at column 2": 1,
    }
    assert test.bad == {"chosen and rejected are the same": 1}
    assert sorted(pair.place for pair in loaded.train) == [
        "a.jsonl train record 2",
        "a.jsonl train record 6",
    ]


def test_num_pairs_above_the_good_rows(folder):
    write(folder / "a.jsonl", [GOOD, EMPTY, GOOD])
    assert data_error({"path": "a.jsonl", "num_pairs": 3}, on_bad_record=OnBadRecord.drop) == [
        "a.jsonl train: num_pairs is 3, but the split has 2 good records (use weight to repeat "
        "records)"
    ]


def test_nothing_left_to_train_on(folder):
    write(folder / "a.jsonl", [EMPTY, SAME])
    write(folder / "b.jsonl", [])
    assert data_error({"path": "a.jsonl"}, {"path": "b.jsonl"}, on_bad_record=OnBadRecord.drop) == [
        "data.sources: no record left to train on (a.jsonl train: 2 records, 2 bad (most "
        "often: chosen: the response is empty), b.jsonl train: 0 records, 0 bad)"
    ]


def test_sources_that_cannot_be_read(folder):
    (folder / "utf16.jsonl").write_bytes(b"\xff\xfe{")
    (folder / "not.parquet").write_text("x")
    (folder / "hollow").mkdir()
    (folder / "half").mkdir()
    write(folder / "half" / "train.jsonl", [GOOD])
    (folder / "zipped.jsonl").write_bytes(gzip.compress(b"{}"))
    (folder / "other.jsonl").write_bytes(b"PAR1")
    assert data_error({"path": "utf16.jsonl"}) == [
        "utf16.jsonl train: cannot be read: it is UTF-16 or UTF-32 text (convert it to UTF-8)"
    ]
    assert data_error({"path": "zipped.jsonl"}) == [
        "zipped.jsonl train: cannot be read: it is compressed (name it zipped.jsonl.gz)"
    ]
    assert data_error({"path": "other.jsonl"}) == [
        "other.jsonl train: cannot be read: it is a parquet file (name it .parquet)"
    ]
    assert data_error({"path": "gone.jsonl"}) == ["gone.jsonl train: cannot be read: no such file"]
    assert data_error({"path": "builtin:demo", "train_split": "all"}) == [
        'builtin:demo all: cannot be read: split must be "train" or "test", not \'all\''
    ]
    assert data_error({"path": "./hollow"}) == [
        "./hollow train: cannot be read: the folder has no .jsonl, .json, .csv, .tsv, .parquet or "
        ".arrow file"
    ]
    assert data_error({"path": "./half"}) == [
        "./half test: cannot be read: no such split, only train "
        "(train_split and test_split take another, or null for none)"
    ]
    # The reason is in pyarrow's words, so only its place is ours.
    (line,) = data_error({"path": "not.parquet"})
    assert line.startswith("not.parquet train: cannot be read: Parquet file size is 1 bytes")


def test_what_is_a_local_file_is_never_asked_of_the_hub(folder):
    """Neither by the settings nor, past them, by the libraries; nor what only looks like one."""
    kinds = ("xlsx", "txt", "tar.gz", "parquet.gz", "parquet.bak")
    for kind in kinds:
        (folder / f"plain.{kind}").write_text("x")
    (folder / "plain").write_text("x")
    (folder / "sub").mkdir()
    (folder / "sub" / "plain.dat").write_text("x")
    (folder / "a.jsonl").mkdir()
    for name in (*(f"plain.{kind}" for kind in kinds), "plain", "sub/plain.dat", "./plain.txt"):
        assert list(SourceConfig(path=name).problems()) == [
            "path: must be a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, a folder or a hub "
            f"id, got the file {name} (convert or rename it)"
        ]
    assert list(SourceConfig(path="a.jsonl").problems()) == [
        "path: must be a file, got the folder a.jsonl (rename the folder)"
    ]
    for name in (
        "gone.csv",
        "sub/gone.JSONL",
        "gone.tar.gz",
        "~/gone",
        "a/b/c",
        "./gone",
        "~no/x",
        "a" * 300 + ".jsonl",
    ):
        assert list(SourceConfig(path=name).problems()) == [
            f"path: no such file or folder, got {name}"
        ]
    write(folder / "b.JSONL", [GOOD])
    for name in ("sub", "b.JSONL", "owner/set-v1.5", "set"):
        assert list(SourceConfig(path=name).problems()) == []
    for name, line in (
        *(
            (name, f"must be a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, got {name}")
            for name in ("plain.xlsx", "sub", "owner/set")
        ),
        ("gone.jsonl", "no such file or folder, got gone.jsonl"),
    ):
        assert list(SourceConfig(path="b.JSONL", test_path=name).problems()) == [
            f"test_path: {line}"
        ]
    assert len(mixture({"path": "b.JSONL"}).train) == 1


def test_a_local_file_is_no_model_of_the_hub(folder):
    (folder / "model.gguf").touch()
    with pytest.raises(ConfigError) as caught:
        compose_run(["model.path=model.gguf", "model.tokenizer=model.gguf"])
    assert caught.value.problems == [
        "model.path: must be a folder or a hub id, got the file model.gguf",
        "model.tokenizer: must be a folder or a hub id, got the file model.gguf",
    ]


def test_lines_that_are_no_json(folder):
    """Each is its row's fault, in either kind of file; the rows beside it are read."""
    good = json.dumps(GOOD).encode()
    bad = {
        b'{"prompt": "caf\xe9"}': "not UTF-8 at column 16",
        b'{"prompt": "a\x00"}': "not JSON: Invalid control character at column 14",
        b"\x00\x00": "not JSON: Expecting value at column 1",
        b"[" * 100_000: "not JSON: lists or objects are nested too deeply",
        b'{"n": ' + b"9" * 5000 + b"}": "not JSON: a number has too many digits",
        b'{"prompt": "a", "prompt": "b"}': "not JSON: an object has the key prompt twice",
        b'{"a": [{"role": 1, "role": 2}]}': "not JSON: an object has the key role twice",
        b"null": "must be an object with chosen and rejected, got null",
        b"NaN": "must be an object with chosen and rejected, got a number",
        b'{"prompt": "a", "chosen": NaN, "rejected": "b"}': (
            "chosen: must be text or a list of messages, got a number"
        ),
    }
    for name, end in (("a.jsonl", b"\n"), ("b.jsonl", b"\r\n"), ("c.json", b"\n")):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + end.join([good, *bad, good]) + end)
        loaded = mixture({"path": name}, on_bad_record=OnBadRecord.drop)
        assert loaded.table[0].bad == dict.fromkeys(bad.values(), 1)
        assert len(loaded.train) == 2
    (folder / "list.json").write_text('[{"prompt": "a"},\n {"prompt": }]')
    assert data_error({"path": "list.json"}) == [
        "list.json train: cannot be read: not JSON: Expecting value at line 2 column 13"
    ]


def test_what_is_told_of_a_row_is_one_line(folder):
    rows = [
        GOOD | {"chosen": [{"role": "a\n\x1b[31m", "content": "b"}]},
        GOOD | {"chosen": [{"role": "a" * 1000, "content": "b"}]},
        GOOD | {"a\nb": 1},
    ]
    write(folder / "a.jsonl", rows)
    loaded = mixture({"path": "a.jsonl"}, on_bad_record=OnBadRecord.drop)
    told = "chosen[0].role: must be one of system, developer, user, assistant, tool, got "
    assert loaded.table[0].bad == {
        told + "a\\n\\x1b[31m": 1,
        (told + "a" * 1000)[:300] + "...": 1,
    }
    assert loaded.notes == [
        "note   a.jsonl train: read as prompt and replies as messages, 3 records",
        "note   a.jsonl train: columns not read: a\\nb",
    ]


def test_depths_around_what_python_takes(folder):
    """One depth can be parsed, and not shown in what is said of it."""
    row = json.dumps(GOOD | {"rule": {"name": "bullets", "count": 0}})
    deep = [row.replace(": 0", f": {'[' * depth}{']' * depth}") for depth in range(700, 1100)]
    write(folder / "a.jsonl", [*deep, GOOD])
    loaded = mixture({"path": "a.jsonl"}, on_bad_record=OnBadRecord.drop)
    assert sum(loaded.table[0].bad.values()) == 400 and len(loaded.train) == 1
    assert "not JSON: lists or objects are nested too deeply" in loaded.table[0].bad


def test_a_lone_surrogate_is_its_rows_fault(folder):
    half = "holds \\ud83d, half of a character (a lone surrogate)"
    bad = {
        "prompt": GOOD | {"prompt": "Hi \ud83d there"},
        "chosen": GOOD | {"chosen": "Hi \ud83d there"},
        "rejected[0].content": GOOD | {"rejected": [assistant("\ud83d")]},
        "prompt[0].content": GOOD | {"prompt": [user("\ud83d")]},
        "system": GOOD | {"system": "\ud83d"},
        "rule": GOOD | {"rule": {"name": "starts_with", "phrase": "\ud83d"}},
    }
    write(folder / "a.jsonl", [*bad.values(), GOOD | {"chosen": "A whole one: \U0001f600"}])
    loaded = mixture({"path": "a.jsonl"}, on_bad_record=OnBadRecord.drop)
    assert loaded.table[0].bad == {f"{place}: {half}": 1 for place in bad}
    assert [pair.chosen[0]["content"] for pair in loaded.train] == ["A whole one: \U0001f600"]
    # Nor does one elsewhere come to a terminal or a file that cannot take it.
    row = GOOD | {"chosen": [{"role": "\ud83d", "content": "a"}]}
    write(folder / "b.jsonl", [row, GOOD | {"\ud83d": 1}])
    loaded = mixture({"path": "b.jsonl"}, on_bad_record=OnBadRecord.drop)
    assert loaded.table[0].bad == {
        "chosen[0].role: must be one of system, developer, user, assistant, tool, got \\ud83d": 1
    }
    assert loaded.notes == [
        "note   b.jsonl train: read as prompt and replies as messages, 2 records",
        "note   b.jsonl train: columns not read: \\ud83d",
    ]


def test_no_part_of_a_weight_is_too_small(folder):
    write(folder / "a.jsonl", [GOOD, GOOD])
    assert data_error({"path": "a.jsonl"}, {"path": "a.jsonl", "weight": 1e-9}) == [
        "data.sources[1].weight: 1e-09 of 2 records rounds to none (raise it)"
    ]


def test_a_file_that_changes_while_it_is_read(folder, monkeypatch):
    write(folder / "a.jsonl", [GOOD])
    read = readers._json_lines

    def changing(lines):
        yield from read(lines)
        with open("a.jsonl", "a") as file:
            file.write("\n")

    monkeypatch.setattr(readers, "_json_lines", changing)
    assert data_error({"path": "a.jsonl"}) == [
        "a.jsonl train: cannot be read: it changed while it was read (run the same command again)"
    ]


def run_cli(*arguments, cwd):
    command = [sys.executable, "-m", "simpo.train", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_process_prints_the_lines_and_exits_with_2(tmp_path):
    done = run_cli("loss.betaa=2", "loss=hinge", "train.epochs=0", cwd=tmp_path)
    assert done.stderr == (
        "loss.betaa: no such key (did you mean loss.beta?)\n"
        "train.epochs: must be 1 or more, got 0\n"
    )
    assert (done.returncode, done.stdout) == (2, "")
    done = run_cli("loss.beta=-1", "data=jsonl", cwd=tmp_path)
    assert done.stderr == (
        f"data.sources: {NO_SOURCE}\n"
        "loss.beta: must be above 0, got -1.0 (the paper uses 2.0 to 10)\n"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert list(tmp_path.iterdir()) == []


def test_faults_are_answered_without_torch(tmp_path):
    code = (
        "import sys\n"
        "from simpo.config.compose import compose_run\n"
        "from simpo.config.errors import ConfigError\n"
        "try:\n"
        "    compose_run(['loss.betaa=2', 'train.epochs=0'])\n"
        "except ConfigError as error:\n"
        "    assert len(error.problems) == 2\n"
        "    assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "    print('answered')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("answered\n", "")


def test_cfg_job_prints_the_composed_run(tmp_path):
    done = run_cli("model=mistral_base", "loss.beta=2.5", "--cfg", "job", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "path: alignment-handbook/zephyr-7b-sft-full\n" in done.stdout
    assert "beta: 2.5\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["", " ", "a", "\ud83d"])
)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", None]), "content": SCALARS},
    optional={"name": SCALARS, "tool_calls": SCALARS},
)
VALUES = st.one_of(SCALARS, st.lists(st.one_of(TURNS, SCALARS), max_size=4), TURNS)
ANY_ROW = st.one_of(
    VALUES,
    st.dictionaries(
        st.sampled_from(
            [
                *("prompt", "chosen", "rejected", "messages", "system", "rule", "tools"),
                *("score_chosen", "score_rejected", "\ud83d"),
            ]
        ),
        st.one_of(VALUES, st.fixed_dictionaries({"name": SCALARS, "count": SCALARS})),
        min_size=3,
    ),
)


@fuzz(max_examples=300, deadline=None)
@given(
    st.lists(ANY_ROW, max_size=3), st.sampled_from([to_pair, to_ranking, to_dialogue, to_prompt])
)
def test_any_row_is_read_or_at_fault(rows, read_record):
    """Nothing but a fault leaves a reader, and all that is told can be printed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, GOOD]))
        config = DataConfig(
            name="rows", sources=[SourceConfig(path=str(file))], on_bad_record=OnBadRecord.drop
        )
        loaded = load_mixture(config, read_record)
        (report,) = loaded.table
        assert report.records == len(rows) + 1 == report.taken + sum(report.bad.values())
        texts = [part["content"] for pair in loaded.train for part in pair.prompt]
        "".join([*texts, *loaded.notes, *report.bad]).encode()


@fuzz(max_examples=300, deadline=None)
@given(st.data())
def test_a_file_damaged_anywhere_is_read_or_refused(data):
    """Bytes changed, cut off or put in: other rows are left as they were."""
    lines = [json.dumps(GOOD | {"prompt": f"{i}?"}).encode() for i in range(4)]
    text = bytearray(b"\n".join(lines))
    place = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 8))
    text[place : place + cut] = data.draw(st.binary(max_size=8))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.jsonl"
        file.write_bytes(text)
        config = DataConfig(
            name="rows", sources=[SourceConfig(path=str(file))], on_bad_record=OnBadRecord.drop
        )
        try:
            loaded = load_mixture(config)
        except DataError as error:
            assert "\n" not in str(error) and "cannot be read" in str(error)
            return
        prompts = {pair.prompt[-1]["content"] for pair in loaded.train}
        starts = [i * (len(lines[0]) + 1) for i in range(4)]
        whole = {
            f"{i}?"
            for i, start in enumerate(starts)
            if start + len(lines[0]) < place or start > place + cut
        }
        assert len(whole) >= 2 and whole <= prompts
