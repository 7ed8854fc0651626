"""Greedy output without compression is transformers', token for token: alone, in company, in chunks of any size.

Nothing is tolerated. Where the two likeliest logits are nearly equal, rounding would decide: no prompt has such a
place, and the reference says so if one ever does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import Backend

from ..models.checkpoints import prompt_of, random_model
from ..models.reference import default_reference, likeliest_after
from .bench import Bench
from .texts import tokens_of_text

LENGTHS = [5, 6, 8, 11, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 97, 128, 200, 300, 450, 1300]
NEW = 6

PLANS: list[dict[str, Any]] = [
    {"kv": {"evict": {"policy": "h2o", "budget": 0.3, "during": "both", "interval": 4}}},
    {"kv": {"evict": {"policy": "snapkv", "budget": 30, "head_budget": "adaptive"}, "format": "int4"}},
    {"kv": {"format": "int8", "residual": 0}},
    {"kv": {"evict": {"policy": "random", "budget": 20}}},
]

Answers = dict[int, list[int]]


def prompt(length: int) -> list[int]:
    return tokens_of_text(length, start=7 * length % 2000)


@pytest.fixture(scope="module")
def answers(default_model: Decoder) -> Answers:
    """prompt length -> the engine's answer, with the engine to itself and the prompt read in chunks of 512."""
    bench = Bench(default_model, max_step_tokens=512)
    return {length: bench.alone(prompt(length), NEW).tokens for length in LENGTHS}


def test_alone(answers: Answers) -> None:
    reference = default_reference()
    for length, answer in answers.items():
        assert answer == likeliest_after(reference, prompt(length), answer), f"prompt of {length}"


@pytest.mark.parametrize("max_step_tokens", [32, 100])
def test_alone_in_smaller_chunks(default_model: Decoder, answers: Answers, max_step_tokens: int) -> None:
    bench = Bench(default_model, max_step_tokens=max_step_tokens)
    for length in (31, 32, 33, 97, 200):
        assert bench.alone(prompt(length), NEW).tokens == answers[length], f"prompt of {length}"


@pytest.mark.parametrize(("max_step_tokens", "lengths"), [(32, LENGTHS[:16]), (100, LENGTHS[4:20]), (512, LENGTHS[5:])])
def test_in_a_batch_of_sixteen(
    default_model: Decoder, answers: Answers, max_step_tokens: int, lengths: list[int]
) -> None:
    """Beside four that are compressed."""
    bench = Bench(default_model, max_step_tokens=max_step_tokens)
    for i, length in enumerate(lengths):
        bench.submit(f"{length}", prompt(length), NEW)
        if i % 4 == 0:
            bench.submit(f"compressed {i}", prompt(30 + 10 * i), 12, PLANS[i // 4])
    bench.run()
    assert len(lengths) == 16
    assert any({count > 1 for _, count in batch} == {False, True} for batch in bench.batches), "no mixed step"
    for length in lengths:
        assert bench.seen[f"{length}", 0].tokens == answers[length], f"prompt of {length}"


FAMILIES = [
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama with biases"),
    pytest.param("qwen2", {}, id="qwen2"),
    pytest.param(
        "qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}, id="qwen2 window"
    ),
    pytest.param("qwen3", {"head_dim": 32, "tie_word_embeddings": True}, id="qwen3"),
    pytest.param("mistral", {"sliding_window": 50}, id="mistral, window shorter than the prompt"),
    pytest.param("mistral", {"sliding_window": None}, id="mistral without window"),
]


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_families(family: str, changes: dict[str, Any], ops: Backend, tmp_path: Path) -> None:
    reference = random_model(family, max_position_embeddings=512, **changes)
    reference.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), ops, "f32")
    prompts = [prompt_of(length, length + 1) for length in (1, 16, 17, 77, 200, 301)]
    alone = Bench(model)
    answers = [alone.alone(tokens, 20).tokens for tokens in prompts]
    assert answers == [likeliest_after(reference, *pair) for pair in zip(prompts, answers, strict=True)]
    for max_step_tokens in (16, 90, 512):
        bench = Bench(model, max_step_tokens=max_step_tokens)
        assert [bench.alone(tokens, 20).tokens for tokens in prompts] == answers
        for i, tokens in enumerate(prompts):
            bench.submit(str(i), tokens, 20)
        bench.run()
        assert [bench.seen[str(i), 0].tokens for i in range(len(prompts))] == answers
