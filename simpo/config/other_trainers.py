"""Answers names of settings that other trainers have with ours.

The names are those of transformers and TRL, the original SimPO code, alignment-handbook, axolotl,
LLaMA-Factory, ms-swift and OpenRLHF.
"""

from __future__ import annotations

BATCH = (
    "here train.pairs_per_step, the pairs of one update: batch per device x accumulation steps x "
    "devices; train.tokens_per_row bounds what one forward takes (such as train.pairs_per_step=128)"
)
EVALUATIONS = "here train.eval_every, in steps; 0: before the first step and after the last"
CHECKPOINTS = "here train.checkpoint_every, in steps; 0: after the last step"
PACKING = "packing is always on; here train.tokens_per_row is the length of a packed row"
PRECISION = "here train.precision: auto, fp32 or bf16 (write train.precision=bf16)"
ATTENTION = "here model.attention: auto, sdpa, varlen or flash; auto takes the fastest there is"
ADAPTERS = (
    "here model.lora.rank: 0 trains all weights, more trains adapters (write model.lora.rank=16)"
)
TARGETS = (
    "here model.lora.targets, a list of modules; all-linear is every linear layer "
    "(write model.lora.targets=[q_proj,v_proj])"
)
SOURCES = (
    "here data.sources, a list; the share of one is its weight "
    "(write data=jsonl 'data.sources=[{path: NAME}]')"
)
HELD_OUT = (
    "no share is split off; here data.sources.0.test_split names a split, "
    "data.sources.0.test_path a file"
)
TOKENS_ONCE = "not needed: data are tokenised once, before the first step, and kept in cache_dir"
GAMMA = "here loss.gamma_beta_ratio, which is gamma / beta (write loss.gamma_beta_ratio={ratio})"
LOSS = "here the choice loss=, such as simpo, dpo, cpo or orpo; loss=sigmoid is SimPO's, not DPO's"
REFERENCE = (
    "not needed: loss=simpo has no reference, and that of loss=dpo is the model before training"
)
ZERO = "here the choice backend=, such as backend=fsdp or backend=zero2 (write backend=zero3)"
PROCESSES = "here backend.processes, with backend=ddp, fsdp, zero2 or zero3"
RESUME = "not needed: the same command continues its unfinished run; run_dir names its folder"
TRACKER = "here the choice tracker= (write tracker=wandb)"
HUB = "here export.push_to_hub, the repository (write export.push_to_hub=OWNER/NAME)"

_ANSWERS = {
    # The step.
    "batch_size train_batch_size per_device_train_batch_size global_batch_size": BATCH,
    "micro_batch_size micro_train_batch_size": BATCH,
    "gradient_accumulation_steps accumulate_grad_batches": BATCH,
    "per_device_eval_batch_size eval_batch_size": PACKING,
    "packing sample_packing packing_samples padding_free": PACKING,
    "num_train_epochs num_epochs max_epochs n_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "seed": (
        "here train.seed, of adapters and of the order of pairs; data.seed decides which records "
        "are taken (write train.seed={value})"
    ),
    "data_seed": "data.seed",
    # The optimizer.
    "learning_rate lr": "train.learning_rate",
    "lr_scheduler_type lr_scheduler": (
        "here train.schedule: cosine, linear or constant, each after the warm-up"
    ),
    "warmup_ratio lr_warmup_ratio": "train.warmup_ratio",
    "warmup_steps num_warmup_steps": (
        "here train.warmup_ratio, a share of all steps (write train.warmup_ratio=0.1)"
    ),
    "optim optimizer": (
        "always AdamW; here train.adam_beta1, train.adam_beta2, train.adam_epsilon and "
        "train.weight_decay set it"
    ),
    "weight_decay l2": "train.weight_decay",
    "adam_beta1": "train.adam_beta1",
    "adam_beta2": "train.adam_beta2",
    "adam_betas": "here train.adam_beta1 and train.adam_beta2",
    "adam_epsilon": "train.adam_epsilon",
    "max_grad_norm max_norm gradient_clipping": "train.max_grad_norm",
    "bf16 mixed_precision": PRECISION,
    "fp16": "never fp16; here train.precision: auto, fp32 or bf16 (write train.precision=bf16)",
    # The loss.
    "beta pref_beta rl_beta": "loss.beta",
    "gamma simpo_gamma": GAMMA,
    "gamma_beta_ratio": "loss.gamma_beta_ratio",
    "loss_type pref_loss rl rlhf_type stage": LOSS,
    "cpo_alpha pref_ftx nll_loss_coef rpo_alpha": "loss.sft_weight",
    "label_smoothing dpo_label_smoothing": "loss.label_smoothing",
    "reference_free ref_model ref_model_name_or_path": REFERENCE,
    # The model.
    "model_name_or_path base_model pretrain model_path": "model.path",
    "model_revision": "model.revision",
    "tokenizer_name_or_path tokenizer_name": "model.tokenizer",
    "trust_remote_code": "model.trust_remote_code",
    "template chat_template": (
        "here model.chat_template, a name that is shipped or a .jinja file; null: the tokenizer's"
    ),
    "torch_dtype": "here model.dtype of the weights, and train.precision of the forward",
    "attn_implementation flash_attention flash_attn": ATTENTION,
    "gradient_checkpointing": "model.gradient_checkpointing",
    "router_aux_loss_coef aux_loss_coef": "model.router_aux_weight",
    "use_peft use_lora finetuning_type adapter": ADAPTERS,
    "adapter_name_or_path": "model.lora.adapter",
    "lora_r lora_rank r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_target_modules target_modules lora_target lora_target_linear": TARGETS,
    "lora_dropout": "no dropout here: the loss of a pair does not depend on chance (leave it out)",
    "use_rslora": "model.lora.rslora",
    "use_dora": "model.lora.dora",
    "load_in_4bit": "here model.quantization (write model.quantization=nf4)",
    "load_in_8bit": "here model.quantization (write model.quantization=int8)",
    "quantization_bit": "here model.quantization: nf4 (4 bits) or int8 (8 bits)",
    # The data.
    "dataset datasets dataset_name dataset_mixer": SOURCES,
    "max_length max_seq_length cutoff_len sequence_len max_len": "data.max_length_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_completion_length": "here data.max_length_tokens, of prompt and response together",
    "truncation_mode": "data.prompt_truncation",
    "val_set_size val_size eval_split": HELD_OUT,
    "dataloader_num_workers dataset_num_proc preprocessing_num_workers": TOKENS_ONCE,
    # What is kept, and when.
    "save_path save_dir": "output_dir",
    "run_name wandb_run_name": "name",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "eval_strategy evaluation_strategy do_eval": EVALUATIONS,
    "save_steps": "train.checkpoint_every",
    "save_strategy": CHECKPOINTS,
    "save_total_limit max_ckpt_num": "train.keep_checkpoints",
    "load_best_model_at_end": "train.keep_best",
    "metric_for_best_model": (
        "here monitor.metric, without eval_ or eval/ (write monitor.metric=rewards/accuracies)"
    ),
    "greater_is_better": "here monitor.mode: max or min (write monitor.mode=max)",
    "early_stopping_patience": "train.patience_evals",
    "resume_from_checkpoint overwrite_output_dir": RESUME,
    "report_to use_wandb": TRACKER,
    "wandb_project": "here tracker.project, with tracker=wandb",
    "push_to_hub hub_model_id": HUB,
    "hub_private_repo": "export.private",
    # Processes.
    "deepspeed zero_stage fsdp": ZERO,
    "ddp_timeout": "here backend.timeout_s, with backend=ddp, fsdp, zero2 or zero3",
    "num_processes nproc_per_node": PROCESSES,
}
ANSWERS = {name: text for names, text in _ANSWERS.items() for name in names.split()}
"""By name: our setting, if it takes the same values, or else a sentence about ours."""


def answer(key: str, value: str | None = None, beta: float | None = None) -> str:
    """What a setting of another trainer is here; empty for a name that none has.

    Args:
        key: such as learning_rate; a section before it does not matter.
        value: as typed on a command line.
        beta: the run's `loss.beta`, with which a margin is converted.
    """
    text = ANSWERS.get(key.rpartition(".")[2], "")
    if " " in text or not text:
        return text.replace("{value}", value or "...").replace("{ratio}", _ratio(value, beta))
    return f"here {text}" + (f" (write {text}={value})" if value else "")


def _ratio(gamma: str | None, beta: float | None) -> str:
    try:
        return f"{float(gamma or '') / (beta or 0):g}, at loss.beta={beta:g}"
    except (ValueError, ZeroDivisionError):
        return "GAMMA/BETA"
