"""Text completions, whole answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from winnow.engine.errors import ModelError
from winnow.engine.models.tokenizer import Tokenizer
from winnow.server.protocol.responses import Completion
from winnow.server.service import sampling_defaults
from winnow.server.settings import Settings

from .conftest import Connect
from .fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


async def ask(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await http.post("/v1/completions", json=fields)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    Completion.model_validate(body)
    return body


async def test_sixteen_tokens_by_default(http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    body = await ask(http, prompt="Once upon a time")
    assert engine.submits[0].sampling.max_tokens == 16
    assert engine.submits[0].prompt == tokenizer.encode("Once upon a time")
    assert body["choices"][0]["text"] == "The capital of France is Paris."
    assert body["id"].startswith("cmpl-")


async def test_the_default_shrinks_to_what_is_left(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(http, prompt=[5] * 2040)
    assert engine.submits[0].sampling.max_tokens == 8


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["a", "b"], None),
        (["a", [7]], None),
    ],
)
async def test_prompt_forms(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, prompt: Any, prompts: Any
) -> None:
    body = await ask(http, prompt=prompt, n=2, max_tokens=3)
    expected = prompts or [tokenizer.encode(p) if isinstance(p, str) else p for p in prompt]
    assert [submit.prompt for submit in engine.submits] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(expected)))
    assert all(choice["text"] == "The capital of" for choice in body["choices"])
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert body["usage"]["completion_tokens"] == 6 * len(expected)
    assert len({submit.request_id for submit in engine.submits}) == len(expected)


async def test_echo(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    body = await ask(http, prompt=["Say: ", tokenizer.encode("Tell: ")], echo=True, max_tokens=3)
    assert [choice["text"] for choice in body["choices"]] == ["Say: The capital of", "Tell: The capital of"]


async def test_logprobs(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = await ask(http, prompt="x", logprobs=2, max_tokens=3)
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["The", " capital", " of"]
    assert logprobs["text_offset"] == [0, 3, 11]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    assert engine.submits[0].sampling.logprobs == 2
    chosen_only = await ask(http, prompt="x", logprobs=0, max_tokens=3)
    assert chosen_only["choices"][0]["logprobs"]["top_logprobs"] is None


async def test_best_of_n(http: httpx.AsyncClient) -> None:
    assert len((await ask(http, prompt="x", n=2, best_of=2))["choices"]) == 2


async def test_one_failing_prompt_fails_the_request(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    from winnow.engine.errors import EngineDied

    engine.error, engine.error_after = EngineDied("gone"), 2
    answer = await http.post("/v1/completions", json={"prompt": ["a", "b"]})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_died"


async def test_the_model_s_own_sampling_defaults(
    connect: Connect, engine: FakeEngine, tmp_path: Path, settings: Settings
) -> None:
    """As vLLM does: what generation_config.json says holds where the request says nothing."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "do_sample": true}')
    async with connect(model=str(tmp_path)) as http:
        await ask(http, prompt="a")
        await ask(http, prompt="a", temperature=0.0, top_k=None)
    async with connect(model=str(tmp_path), generation_config="none") as http:
        await ask(http, prompt="a")
    sampled = [(submit.sampling.temperature, submit.sampling.top_k) for submit in engine.submits]
    assert sampled == [(0.6, 20), (0.0, 20), (1.0, 0)]
    (tmp_path / "generation_config.json").write_text('{"temperature": -1}')
    with pytest.raises(ModelError, match=r"generation_config.json cannot be used: temperature"):
        sampling_defaults(settings.model_copy(update={"model": str(tmp_path)}))


@pytest.mark.parametrize("forced", [" is a long", [5, 6, 7]])
async def test_forced_tokens_go_to_the_engine(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, forced: Any
) -> None:
    await ask(http, prompt=["This", "That"], forced=forced)
    tokens = tokenizer.encode(forced, False) if isinstance(forced, str) else forced
    assert [submit.forced for submit in engine.submits] == [tokens] * 2
    assert engine.submits[0].sampling.max_tokens == 16 + len(tokens)


async def test_stop_strings_count_after_forced_tokens(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    """The scripted engine says what it always says, as if it had been forced to."""
    body = await ask(http, prompt="x", forced=engine.reply[:3], stop=[" capital", " France"])
    assert body["choices"][0]["text"] == "The capital of"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"forced": [1, 2], "n": 2}, "n"),
        ({"forced": [1, 2], "max_tokens": 2}, "max_tokens"),
        ({"forced": [1, 2], "echo": True}, "echo"),
        ({"forced": [49152]}, "forced"),
        ({"forced": [-1]}, "forced"),
        ({"forced": 7}, "forced"),
        ({"forced": ["a"]}, "forced"),
    ],
)
async def test_what_cannot_be_forced(http: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    answer = await http.post("/v1/completions", json={"prompt": "x"} | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
