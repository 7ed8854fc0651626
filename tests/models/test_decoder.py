"""The decoder against transformers: every family, in one step, in chunks, and in company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import Backend
from winnow.kernels.kv import LaneBatch

from .checkpoints import logits_of, prompt_of, random_model
from .lanes import Lanes, prefill

TOLERANCE = 1e-4

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}

MODELS = [
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"tie_word_embeddings": True}, id="llama tied"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama with all biases"),
    pytest.param("llama", {"head_dim": 32}, id="llama, heads wider than hidden"),
    pytest.param("llama", {"num_key_value_heads": 4}, id="llama, a KV head for each head"),
    pytest.param("llama", {"rope_parameters": _LLAMA3}, id="llama3 rope"),
    pytest.param("llama", {"rope_parameters": _YARN}, id="yarn rope"),
    pytest.param("llama", {"rope_parameters": _YARN | {"attention_factor": 1.5}}, id="yarn rope, own factor"),
    pytest.param("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, id="linear"),
    pytest.param("mistral", {"sliding_window": 9}, id="mistral, window shorter than the prompt"),
    pytest.param("mistral", {"sliding_window": None}, id="mistral without window"),
    pytest.param("qwen2", {}, id="qwen2"),
    pytest.param("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, id="qwen2 window"),
    pytest.param("qwen3", {"head_dim": 32, "tie_word_embeddings": True}, id="qwen3 tied"),
    pytest.param("qwen3", {"head_dim": 16, "attention_bias": True}, id="qwen3 with biases"),
]


@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_logits_are_those_of_transformers(family: str, changes: dict[str, Any], tmp_path: Path, ops: Backend) -> None:
    model = random_model(family, **changes)
    model.save_pretrained(tmp_path)
    decoder = load_model(str(tmp_path), ops, "f32")
    prompt = prompt_of(45)
    expected = logits_of(model, prompt)

    whole = prefill(decoder, prompt)
    torch.testing.assert_close(whole, expected, atol=TOLERANCE, rtol=0)
    assert torch.equal(whole.argmax(-1), expected.argmax(-1))

    chunked = prefill(decoder, prompt, chunks=(1, 15, 17, 7))  # and five decode steps
    assert torch.equal(chunked, whole)


def test_company_changes_nothing(tmp_path: Path, ops: Backend) -> None:
    random_model("qwen3", head_dim=32).save_pretrained(tmp_path)
    decoder = load_model(str(tmp_path), ops, "f32")
    prompts = [prompt_of(length, seed=length) for length in (3, 33, 17)]
    alone = [prefill(decoder, prompt) for prompt in prompts]

    lanes = Lanes(decoder.config, slots=3)
    first = lanes.step(decoder, {2: prompts[2][:10], 0: prompts[0]})
    second = lanes.step(decoder, {1: prompts[1], 2: prompts[2][10:]})
    assert torch.equal(first[0], alone[0])
    assert torch.equal(second[1], alone[1])
    assert torch.equal(torch.cat([first[2], second[2]]), alone[2])


@pytest.mark.parametrize("rows", [[], [4], [1, 4], [4, 0]], ids=["none", "last", "two", "out of order"])
def test_only_wanted_rows_have_logits(rows: list[int], tmp_path: Path, ops: Backend) -> None:
    random_model("llama").save_pretrained(tmp_path)
    decoder = load_model(str(tmp_path), ops, "f32")
    lanes = Lanes(decoder.config)
    every = lanes.step(decoder, {0: prompt_of(5)})[0]

    batch = LaneBatch(*(torch.tensor(v, dtype=torch.int32) for v in ([0], [0, 5], [0, 1, 2, 3, 4], [5])))
    tokens = torch.tensor(prompt_of(5), dtype=torch.int32)
    logits = decoder.forward(tokens, batch, lanes.kv, torch.tensor(rows, dtype=torch.int64))
    assert torch.equal(logits, every[rows])


def test_int8_weights_are_near(tmp_path: Path, ops: Backend) -> None:
    model = random_model("llama", initializer_range=0.05)
    model.save_pretrained(tmp_path)
    prompt = prompt_of(30)
    exact = load_model(str(tmp_path), ops, "f32")
    packed = load_model(str(tmp_path), ops, "int8")
    error = (prefill(packed, prompt) - logits_of(model, prompt)).abs().max()
    assert error < 0.1 * logits_of(model, prompt).std()
    assert packed.nbytes < 0.35 * exact.nbytes
