"""What calibrators measure, against loops over what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnow.engine.calibration.head_classes import PROMPTS, ROUNDS, HeadClasses
from winnow.engine.calibration.registry import CALIBRATED
from winnow.engine.calibration.run import calibrate
from winnow.engine.calibration.text import default_text, excerpts
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import backend

from ..engine.masked import MaskedRun, causal, run_masked
from ..models.checkpoints import prompt_of, random_model

LAYERS, Q_HEADS, KV_HEADS, GROUP = 3, 4, 2, 2


@pytest.fixture(scope="module", params=[{}, {"sliding_window": 20}], ids=["llama", "mistral, short window"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Decoder]:
    path: Path = tmp_path_factory.mktemp("model")
    reference = random_model("mistral" if request.param else "llama", max_position_embeddings=640, **request.param)
    reference.save_pretrained(path)
    return reference, load_model(str(path), backend("cpu"), "f32")


def dense(reference: PreTrainedModel, tokens: list[int]) -> MaskedRun:
    window = getattr(reference.config, "sliding_window", None) or 0
    return run_masked(reference, tokens, causal(LAYERS, KV_HEADS, len(tokens), window))


def projected_queries(model: PreTrainedModel, tokens: list[int]) -> list[Tensor]:
    """[tokens, q_heads, head_dim] of each layer before RoPE."""
    seen: list[Tensor] = []

    def hook(module: Any, args: Any, output: Tensor) -> None:
        seen.append(output[0].unflatten(-1, (Q_HEADS, -1)))

    handles = [layer.self_attn.q_proj.register_forward_hook(hook) for layer in model.model.layers]
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return seen


def test_query_statistics(models: tuple[PreTrainedModel, Decoder]) -> None:
    reference, decoder = models
    text = prompt_of(1300)
    profile = calibrate(decoder, "tri_attention", text)
    layers = zip(*[projected_queries(reference, part) for part in excerpts(text, 48, 512)], strict=True)
    for layer, parts in enumerate(layers):
        queries = torch.cat(parts).double()
        half = queries.shape[-1] // 2
        length = (queries[..., :half] ** 2 + queries[..., half:] ** 2).sqrt()
        torch.testing.assert_close(profile["mean"][layer], queries.mean(0).float(), atol=2e-4, rtol=0)
        torch.testing.assert_close(profile["length"][layer], length.mean(0).float(), atol=2e-4, rtol=0)


def test_heavy_channels(models: tuple[PreTrainedModel, Decoder]) -> None:
    reference, decoder = models
    text = prompt_of(200)
    profile = calibrate(decoder, "double_sparsity", text)
    run = dense(reference, text)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            wanted = torch.zeros(run.keys.shape[-1])
            for token in range(200):
                for q_head in range(head * GROUP, head * GROUP + GROUP):
                    wanted += (run.queries[layer, q_head, token] * run.keys[layer, head, token]).abs() / (200 * GROUP)
            weight, channels = profile["weight"][layer, head], profile["channels"][layer, head].long()
            torch.testing.assert_close(weight, wanted, atol=1e-4, rtol=1e-4)
            assert sorted(channels.tolist()) == list(range(len(wanted)))
            assert (weight[channels].diff() <= 0).all()


@pytest.mark.parametrize("method", ["matryoshka", "cskv"])
def test_bases(models: tuple[PreTrainedModel, Decoder], method: str) -> None:
    """They span what a singular value decomposition of all tokens says, and are orthonormal."""
    reference, decoder = models
    text = prompt_of(200)
    profile = calibrate(decoder, method, text)
    run, inv_freq = dense(reference, text), torch.tensor(decoder.config.inv_freq, dtype=torch.float64)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            keys, values = run.keys[layer, head].double(), run.values[layer, head].double()
            if method == "cskv":
                turn = torch.exp(-1j * torch.arange(200)[:, None] * inv_freq)
                before = torch.complex(*keys.chunk(2, dim=-1)) * turn
                keys = torch.cat([before.real, before.imag], dim=-1)
            for part, tokens in (("keys", keys), ("values", values)):
                basis = profile[part][layer, head].double()
                rank = tokens.shape[1] // 2
                leading = torch.linalg.svd(tokens).Vh[:rank].T
                assert basis.shape == leading.shape
                torch.testing.assert_close(basis @ basis.T, leading @ leading.T, atol=2e-2, rtol=0)
                torch.testing.assert_close(basis.T @ basis, torch.eye(rank).double(), atol=2e-3, rtol=0)


def test_head_classes(models: tuple[PreTrainedModel, Decoder]) -> None:
    reference, decoder = models
    profile = calibrate(decoder, "razor_attention", [])
    prompts = HeadClasses(decoder.config).prompts([])
    assert len(prompts) == PROMPTS
    period = len(prompts[0]) // ROUNDS
    assert period == 80  # half of the vocabulary: shorter than 512 and than a quarter of the context
    echo, induction = torch.zeros(2, LAYERS, Q_HEADS)
    for prompt in prompts:
        assert len(set(prompt[:period])) == period
        assert prompt == prompt[:period] * ROUNDS
        attention = dense(reference, prompt).attention
        for query in range(period, len(prompt)):
            for earlier in range(query % period, query, period):
                echo += attention[:, :, query, earlier]
                induction += attention[:, :, query, earlier + 1]
    queries = PROMPTS * period * (ROUNDS - 1)
    torch.testing.assert_close(profile["echo"], echo / queries, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(profile["induction"], induction / queries, atol=1e-5, rtol=1e-3)


def test_progress_and_repetition(models: tuple[PreTrainedModel, Decoder]) -> None:
    """The same text gives the same bits; the bar goes from nothing to all."""
    _, decoder = models
    for method in CALIBRATED:
        told: list[tuple[int, int]] = []
        first = calibrate(
            decoder, method, prompt_of(600), lambda read, prompts, told=told: told.append((read, prompts))
        )
        again = calibrate(decoder, method, prompt_of(600))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first)
        total = told[0][1]
        assert told == [(read, total) for read in range(total + 1)]


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (1, [(0, 1)]),
        (10, [(0, 10)]),
        (11, [(0, 10)]),
        (25, [(0, 10), (15, 25)]),
        (100, [(0, 10), (30, 40), (60, 70), (90, 100)]),
    ],
)
def test_excerpts(tokens: int, wanted: list[tuple[int, int]]) -> None:
    text = list(range(tokens))
    assert excerpts(text, 4, 10) == [text[start:end] for start, end in wanted]


def test_the_default_text_is_long_enough() -> None:
    assert len(default_text()) > 6 * 48 * 512  # about four characters a token
