"""examples/minimal.py trains, and its loss is that of the plain padded way."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.data.pairs import TokenizedPair
from tests.support.tiny_models import padded_logps, simpo_by_hand

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "minimal.py"


def test_the_example_trains(tiny_folder: Path) -> None:
    example = runpy.run_path(str(EXAMPLE))
    losses = example["main"](str(tiny_folder), steps=3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    pairs = []
    for record in example["RECORDS"]:
        user = {"role": "user", "content": record["prompt"]}
        prompt = tokenizer.apply_chat_template(
            [user], add_generation_prompt=True, return_dict=True
        ).input_ids
        replies = [f"{record[key]}<|im_end|>" for key in ("chosen", "rejected")]
        ids = [prompt, *(tokenizer(reply, add_special_tokens=False).input_ids for reply in replies)]
        first, chosen, rejected = (np.array(part, dtype=np.int32) for part in ids)
        pairs.append(TokenizedPair.of(first, chosen, rejected))
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        logps, lengths = padded_logps(model, pairs)
    by_hand = simpo_by_hand(logps, lengths, 2.0, 0.5, hinge=False, smoothing=0.0).mean()
    assert losses[0] == pytest.approx(by_hand.item(), rel=1e-5)
    assert losses[0] > losses[1] > losses[2]
