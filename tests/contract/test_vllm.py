"""`winnow serve --engine vllm`: needs an environment with winnow and vLLM; `make test-vllm` makes one for a CPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import BadRequestError, OpenAI
from transformers import AutoModelForCausalLM, PreTrainedModel

from winnow.engine.calibration.store import weights_hash
from winnow.engine.models.export import export_directory
from winnow.engine.models.files import resolve_model
from winnow.engine.models.tokenizer import load_tokenizer

from .serving import KEY, Serving, serving

PYTHON = os.environ.get("WINNOW_VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
pytestmark = [
    pytest.mark.skipif(PYTHON is None, reason="no vLLM: WINNOW_VLLM_PYTHON names no environment (make test-vllm)"),
    pytest.mark.timeout(1800),
]
PATIENCE_S = 600
"""vLLM takes half a minute to be imported and to compile what it samples with"""
OPTIONS = ("--engine", "vllm", "--max-model-len", "1024", "--max-seqs", "8", "--kv-memory-gib", "0.5")
OPTIONS += ("--no-cuda-graphs", "--threads", "2")
PROMPTS = (
    "The three primary colours are",
    "In 1969, the first people who walked on the moon",
    "def fibonacci(n):\n",
    "Once upon a time there was a king who",
)
NEW = 16


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


def vllm_serving(cache: Path, *options: str) -> AbstractContextManager[Serving]:
    assert PYTHON is not None
    return serving(cache, *OPTIONS, *options, python=PYTHON, patience_s=PATIENCE_S, WINNOW_CACHE=str(cache))


@pytest.fixture(scope="module")
def exact(cache: Path) -> Iterator[Serving]:
    """Weights, keys and values in f32."""
    with vllm_serving(cache, "--weights", "f32") as running:
        yield running


@pytest.fixture(scope="module")
def reference(cache: Path) -> PreTrainedModel:
    """The same weights in transformers."""
    folder = export_directory("default", cache / "exported" / weights_hash(resolve_model("default")))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def api(server: Serving) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, timeout=PATIENCE_S, max_retries=0)


def complete(server: Serving, prompt: Any, **options: Any) -> Any:
    plan = {"extra_body": options.pop("extra")} if "extra" in options else {}
    with api(server) as client:
        return client.completions.create(model="default", prompt=prompt, **options, **plan)


def test_greedy_tokens_are_those_of_transformers(exact: Serving, reference: PreTrainedModel) -> None:
    """Four prompts in one batch; logprobs too."""
    tokenizer = load_tokenizer("default")
    said = complete(exact, list(PROMPTS), max_tokens=NEW, temperature=0, logprobs=2)
    for prompt, choice in zip(PROMPTS, said.choices, strict=True):
        tokens = torch.tensor([tokenizer.encode(prompt, True)])
        wanted = reference.generate(
            tokens, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        new = wanted.sequences[0, tokens.shape[1] :].tolist()
        assert choice.logprobs.tokens == [tokenizer.decode([token]) for token in new]
        logprobs = torch.cat(wanted.logits).log_softmax(-1).amax(-1).tolist()
        assert choice.logprobs.token_logprobs == pytest.approx(logprobs, abs=2e-3)


def test_plans_are_refused_by_name(exact: Serving) -> None:
    for plan, path in (
        ({"kv": {"format": "fp8"}}, "compression.kv.format"),
        ({"kv": {"evict": {"policy": "snapkv", "budget": 0.5}}}, "compression.kv.evict"),
        ("balanced", "compression.kv.evict"),
        ({"prompt": {"policy": "selective", "keep": 0.5}}, "compression.prompt"),
    ):
        with pytest.raises(BadRequestError, match="vLLM") as refused:
            complete(exact, "a", max_tokens=1, extra={"compression": plan})
        assert refused.value.param == path
    for field, value in (("speculative", {"method": "prompt_lookup"}), ("forced", " b")):
        with pytest.raises(BadRequestError, match="vLLM") as refused:
            complete(exact, "a", max_tokens=4, extra={field: value})
        assert refused.value.param == field
    with exact.http() as http:
        card = http.get("/v1/models/default").json()
    assert list(card["compression"]["formats"]) == ["f32"]
    assert "compression.kv.evict" in card["compression"]["refused"]


def test_choices_are_drawn_by_their_seeds(exact: Serving) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.9, "seed": -1, "n": 3}
    first, again = (complete(exact, PROMPTS[0], **options) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    other = complete(exact, PROMPTS[0], **(options | {"seed": 7}))
    assert texts != [choice.text for choice in other.choices]


def test_ends(exact: Serving) -> None:
    """A stop string ends one choice, a biased token is said, too few tokens are none, and all blocks come back."""
    (choice,) = complete(exact, "1, 2, 3, 4,", max_tokens=30, temperature=0, stop=[" 8"]).choices
    assert (choice.finish_reason, choice.text) == ("stop", " 5, 6, 7,")
    comma = load_tokenizer("default").encode(",", False)
    options: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "logit_bias": {str(comma[0]): 100}}
    assert complete(exact, "One", **options).choices[0].text == ",,,"
    (choice,) = complete(exact, "1, 2, 3, 4,", max_tokens=5, extra={"stop_token_ids": comma}).choices
    assert choice.finish_reason in ("stop", "length")
    with pytest.raises(BadRequestError) as refused:
        complete(exact, "a", max_tokens=1, temperature=0.001)
    assert refused.value.param == "temperature"
    with (
        api(exact) as client,
        client.completions.create(model="default", prompt=PROMPTS[3], max_tokens=900, stream=True) as stream,
    ):
        next(iter(stream))
    exact.until_idle()


def test_usage_and_cached_prefixes(exact: Serving) -> None:
    prompt = [7 + i % 50 for i in range(300)]
    cached = []
    for salt in ("a", "a", "b"):
        said = complete(
            exact, prompt, max_tokens=2, temperature=0, extra={"cache_salt": salt, "ignore_eos": True}
        ).usage.model_dump()
        cached.append(said["prompt_tokens_details"]["cached_tokens"])
        report = said["compression"]
        assert (report["tokens_seen"], report["tokens_kept"]["min"]) == (301, 301)
        assert report["bytes_held"] == report["bytes_uncompressed"] > 301 * 30 * 3 * 64 * 2 * 4
        assert report["tokens_by_format"] == {"f32": 301}
    assert cached == [0, 256, 0], "whole blocks of 128, under an equal salt only"


def test_fp8_when_it_was_started_with_it(cache: Path) -> None:
    with vllm_serving(cache, "--vllm-arg", "kv_cache_dtype=fp8") as server:
        asked = {"compression": {"kv": {"format": "fp8"}}}
        messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
        with api(server) as client:
            said = client.chat.completions.create(
                model="default", messages=messages, temperature=0, max_tokens=12, extra_body=asked
            )
        assert said.choices[0].message.content == "The capital of France is Paris."
        report = said.usage.model_dump()["compression"]  # type: ignore[union-attr]
        assert report["plan"] == {"kv": {"format": "fp8", "residual": 0}}
        assert report["bytes_held"] * 2 == report["bytes_uncompressed"], "of bf16"
        with pytest.raises(BadRequestError, match="one format") as refused:
            complete(server, "a", max_tokens=1, extra={"compression": {"kv": {"format": "bf16"}}})
        assert refused.value.param == "compression.kv.format"


def test_what_it_cannot_be_started_with(cache: Path) -> None:
    """Said, and not tried again."""
    with (
        pytest.raises(AssertionError, match=r"vllm_args\.no_such: this vLLM has no such argument"),
        vllm_serving(cache, "--vllm-arg", "no_such=1"),
    ):
        pass
