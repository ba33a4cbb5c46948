"""Loads the tokenizer and sets its pad token and chat template."""

from __future__ import annotations

import os
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from simpo.config.choices import Compat
from simpo.config.errors import ConfigError
from simpo.config.models import ModelConfig
from simpo.data.chats.template import use_template
from simpo.model.pretrained import load_pretrained, model_source


def load_tokenizer(
    config: ModelConfig, cache_dir: Path, compat: Compat = Compat.none
) -> PreTrainedTokenizerBase:
    """Load the tokenizer and set its pad token and chat template.

    A missing pad token becomes EOS (padding is never scored). A template in the settings replaces
    the tokenizer's own. The tokenizer is exported with both; its maximum length and its padding and
    truncation sides are neither used nor changed. With compat=paper text is split as tokenizer.json
    says.

    Raises:
        ConfigError: the tokenizer cannot be loaded, lacks a token of the template or, with
            compat=paper, has no EOS.
    """
    source = os.path.expanduser(config.tokenizer or "") or model_source(config, cache_dir)
    revision = None if config.tokenizer else config.revision
    tokenizer = load_pretrained(
        "model.tokenizer" if config.tokenizer else "model.path",
        source,
        AutoTokenizer,
        revision=revision,
        trust_remote_code=config.trust_remote_code,
    )
    if compat is Compat.paper:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                [
                    f"model.tokenizer: {source} has no EOS token, with which data.compat=paper "
                    "ends responses (name one as eos_token in its tokenizer_config.json)"
                ]
            )
        _split_as_written(tokenizer, source, revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.chat_template is not None:
        use_template(tokenizer, config.chat_template)
    return tokenizer


def _split_as_written(
    tokenizer: PreTrainedTokenizerBase, source: str, revision: str | None
) -> None:
    """Split text as tokenizer.json says, which is what transformers 4 does.

    transformers 5 rebuilds some tokenizers (Mistral's) without their normalizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    file = cached_file(
        source,
        "tokenizer.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if backend is not None and file is not None:
        written = Tokenizer.from_file(file)
        backend.normalizer = written.normalizer
        backend.pre_tokenizer = written.pre_tokenizer
