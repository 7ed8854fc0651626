"""The default model, greedy, token for token what transformers says of the same file."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import LlamaForCausalLM

from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.engine.models.tokenizer import load_tokenizer
from winnow.kernels.dispatch import Backend

from .checkpoints import logits_of
from .lanes import greedy, prefill
from .reference import default_reference, greedy_of

TOKENS = 24


@pytest.fixture(scope="module")
def decoder(ops: Backend) -> Decoder:
    return load_model("default", ops, "f32")


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    return default_reference()


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "What is the capital of France?"}],
        [
            {"role": "system", "content": "You are a terse poet."},
            {"role": "user", "content": "Write two lines about 2024 autumn leaves."},
        ],
    ],
    ids=["question", "poem"],
)
def test_greedy_tokens(messages: list[dict[str, str]], decoder: Decoder, reference: LlamaForCausalLM) -> None:
    tokenizer = load_tokenizer("default")
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
    tokens = greedy_of(reference, prompt, TOKENS)
    torch.testing.assert_close(prefill(decoder, prompt), logits_of(reference, prompt), atol=1e-3, rtol=0)
    assert greedy(decoder, prompt, TOKENS) == tokens


def test_config_is_the_published_one(decoder: Decoder, reference: LlamaForCausalLM) -> None:
    config, published = decoder.config, reference.config
    assert config.rms_eps == pytest.approx(published.rms_norm_eps)
    assert (config.vocab_size, config.layers, config.heads, config.kv_heads) == (49152, 30, 9, 3)
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (576, 1536, 64)
    assert (config.max_position, config.tied_embeddings, config.eos_token_ids) == (8192, True, (2,))


def test_loading_is_logged_and_weights_are_counted(ops: Backend, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="winnow.engine.models.loader"):
        packed = load_model("default", ops, "int8")
    assert "loaded 14 of 30 layers" in caplog.messages
    assert 142_000_000 < packed.nbytes < 144_000_000
