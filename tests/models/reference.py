"""transformers' side of comparisons: the default model, and greedy decoding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from winnow.engine.models.loader import resolve_model


@cache
def default_reference() -> LlamaForCausalLM:
    """transformers' reading of the tensors, in the model that SmolLM2-135M's published config describes."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    with no_init_weights():
        model = LlamaForCausalLM(config).eval()
    with pytest.MonkeyPatch.context() as patch:
        # transformers asks for this table once per module: six seconds. The library cuts the file into a million
        # pieces, each of which numpy tells that it is of a mapped file: two seconds.
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        patch.setattr(np, "memmap", lambda path, mode: np.fromfile(path, np.uint8))
        path = str(resolve_model("default"))
        tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    return model


def greedy_of(model: PreTrainedModel, prompt: Sequence[int], tokens: int) -> list[int]:
    """transformers' likeliest continuation of a prompt."""
    new, cache = list(prompt), None
    out: list[int] = []
    with torch.no_grad():
        while len(out) < tokens:
            step = model(torch.tensor([new]), past_key_values=cache, logits_to_keep=1)
            cache, new = step.past_key_values, [int(step.logits[0, -1].argmax())]
            out += new
    return out


NEAR_TIE = 1e-4


def likeliest_after(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """What transformers finds likeliest after the prompt, and after each token of an answer to it but the last.

    An answer that is equal to it is the greedy one; it takes one pass to know. Where the two likeliest logits are
    nearly equal, rounding would decide and nothing could be said: that is an error.
    """
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer[:-1]]]), logits_to_keep=len(answer)).logits[0]
    best, tokens = logits.topk(2)
    margin = float((best[:, 0] - best[:, 1]).min())
    assert margin > NEAR_TIE, f"a near tie, {margin}, in what follows a prompt of {len(prompt)} tokens: choose another"
    return tokens[:, 0].tolist()
