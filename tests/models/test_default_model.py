"""The default model, greedy, token for token what transformers says of the same file."""

from __future__ import annotations

import logging
from functools import cache

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model, resolve_model
from winnow.engine.models.tokenizer import load_tokenizer
from winnow.kernels.dispatch import Backend

from .lanes import greedy, prefill

TOKENS = 24


@pytest.fixture(scope="module")
def decoder(ops: Backend) -> Decoder:
    return load_model("default", ops, "f32")


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
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
    model = LlamaForCausalLM(config).eval()
    with pytest.MonkeyPatch.context() as patch:  # transformers asks for this table once per module: six seconds
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        path = str(resolve_model("default"))
        tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    return model


def greedy_of(model: LlamaForCausalLM, prompt: list[int]) -> tuple[torch.Tensor, list[int]]:
    """transformers' logits [tokens, vocab] of a prompt, and its likeliest continuation."""
    with torch.no_grad():
        step = model(torch.tensor([prompt]))
        logits, out = step.logits[0], [int(step.logits[0, -1].argmax())]
        while len(out) < TOKENS:
            step = model(torch.tensor([out[-1:]]), past_key_values=step.past_key_values)
            out.append(int(step.logits[0, -1].argmax()))
    return logits, out


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
    logits, tokens = greedy_of(reference, prompt)
    torch.testing.assert_close(prefill(decoder, prompt), logits, atol=1e-3, rtol=0)
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
    assert 134_000_000 < packed.nbytes < 137_000_000
