"""Greedy output on a GPU is transformers', token for token in float32; bf16 and f16 stray from float32 no further than
transformers' own do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from winnow.engine.graphs import Graphs
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import Backend, WeightKind

from ..engine.bench import Bench, Seen
from ..models.checkpoints import logits_of, prompt_of, random_model
from ..models.reference import likeliest_after

FAMILIES = [
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama with biases"),
    pytest.param("llama", {"head_dim": 80}, id="llama, heads of no power of two"),
    pytest.param("qwen2", {"num_attention_heads": 6, "hidden_size": 96}, id="qwen2, groups of three"),
    pytest.param("qwen3", {"head_dim": 32, "tie_word_embeddings": True}, id="qwen3"),
    pytest.param("mistral", {"sliding_window": 50}, id="mistral, window shorter than the prompt"),
]
LENGTHS = (1, 31, 32, 33, 200, 301)
NEW = 20


def bench_of(model: Decoder, gpu: Backend, **settings: Any) -> Bench:
    """Its pages hold no numbers where nothing was written."""
    bench = Bench(model, ops=gpu, profiles={}, **({"device": "cuda", "page_tokens": 32} | settings))
    bench.engine.arena.kv.data.fill_(255)
    return bench


def together(bench: Bench, prompts: list[list[int]]) -> list[Seen]:
    for i, tokens in enumerate(prompts):
        bench.submit(str(i), tokens, NEW)
    bench.run()
    return [bench.seen[str(i), 0] for i in range(len(prompts))]


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_families(
    family: str, changes: dict[str, Any], gpu: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = random_model(family, max_position_embeddings=512, **changes)
    reference.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), gpu, "f32")
    prompts = [prompt_of(length, length + 1) for length in LENGTHS]
    sizes = replayed_sizes(monkeypatch)
    bench = bench_of(model, gpu)
    answers = [bench.alone(tokens, NEW).tokens for tokens in prompts]
    assert answers == [likeliest_after(reference, *pair) for pair in zip(prompts, answers, strict=True)]
    assert set(sizes) == {1}
    for settings in ({}, {"max_step_tokens": 64}, {"cuda_graphs": False}, {"max_step_tokens": 48, "page_tokens": 16}):
        sizes.clear()
        assert [seen.tokens for seen in together(bench_of(model, gpu, **settings), prompts)] == answers, settings
        assert any(size > 1 for size in sizes) is settings.get("cuda_graphs", True)


@pytest.mark.parametrize(("weights", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_sixteen_bits(weights: WeightKind, dtype: torch.dtype, gpu: Backend, tmp_path: Path) -> None:
    """Error of the logits, as a share of their size, where all read the same tokens."""
    narrow = random_model("llama", max_position_embeddings=512, num_hidden_layers=2).to(dtype)
    narrow.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), gpu, weights)
    prompts = [prompt_of(length, length + 1) for length in LENGTHS]
    seen = together(bench_of(model, gpu, weights=weights), prompts)
    texts = [[*prompt, *each.tokens[:-1]] for prompt, each in zip(prompts, seen, strict=True)]
    theirs = [logits_of(narrow, text)[-NEW:] for text in texts]
    wide = narrow.float()
    for each, other, text in zip(seen, theirs, texts, strict=True):
        ours = torch.stack([each.logits[at] for at in sorted(each.logits)]).cpu()
        exact = logits_of(wide, text)[-NEW:]
        assert ours.dtype == torch.float32
        assert error(ours, exact) < 2 * error(other.float(), exact) + 0.002


def error(logits: Tensor, exact: Tensor) -> float:
    return float((logits - exact).norm() / exact.norm())


def replayed_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the recorded steps that are replayed from now on."""
    sizes: list[int] = []
    find = Graphs._find

    def watched(self: Graphs, host: Any) -> Any:
        recorded = find(self, host)
        sizes.extend([] if recorded is None else [recorded.step.size])
        return recorded

    monkeypatch.setattr(Graphs, "_find", watched)
    return sizes
