"""Stop strings: found across token boundaries, never shown in part, and they end the choice in the engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.engine.models.tokenizer import Tokenizer
from winnow.server.stops import StopStrings

from .conftest import HELLO
from .fake_engine import FakeEngine

URL = "/v1/chat/completions"
TEXT = st.text("abc", max_size=12)


def feed(stops: StopStrings, parts: list[str]) -> str:
    return "".join(stops.push(part) for part in parts) + ("" if stops.found else stops.flush())


@given(st.lists(TEXT, max_size=8), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.booleans())
def test_as_if_the_text_were_whole(parts: list[str], stops: list[str], include: bool) -> None:
    """Cut at the stop string that is complete first, wherever the text is split."""
    matcher = StopStrings(stops, include)
    shown = feed(matcher, parts)
    text = "".join(parts)
    hits = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert matcher.found == bool(hits)
    end, start = min(hits, default=(len(text), len(text)))
    assert shown == text[: end if include else start]


@given(TEXT, st.text("abc", min_size=1, max_size=4))
def test_one_character_at_a_time(text: str, stop: str) -> None:
    matcher = StopStrings([stop])
    expected = text.split(stop)[0]
    shown = ""
    for char in text:
        shown += matcher.push(char)
        assert expected.startswith(shown)  # nothing that is out has to be taken back
    assert shown + ("" if matcher.found else matcher.flush()) == expected


async def ask(http: httpx.AsyncClient, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole choice, and the choices of a stream's chunks."""
    whole = (await http.post(URL, json={"messages": HELLO, **fields})).json()
    text = (await http.post(URL, json={"messages": HELLO, "stream": True, **fields})).text
    frames = [frame.removeprefix("data: ") for frame in text.strip().split("\n\n")]
    return whole, [json.loads(frame)["choices"][0] for frame in frames if frame != "[DONE]"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        (" of", "The capital"),
        ("l of Fr", "The capita"),
        (["xyz", "is P"], "The capital of France "),
        (["France", "al"], "The capit"),
        ("The", ""),
        (".", "The capital of France is Paris"),
        ("Paris.", "The capital of France is "),
        ("Paris!", "The capital of France is Paris."),
        ("Paris..", "The capital of France is Paris."),
    ],
)
async def test_where_the_text_ends(http: httpx.AsyncClient, engine: FakeEngine, stop: Any, shown: str) -> None:
    whole, chunks = await ask(http, stop=stop)
    stopped = shown != "The capital of France is Paris."
    choice = whole["choices"][0]
    assert choice["message"]["content"] == shown
    assert choice["finish_reason"] == ("stop" if stopped else "length")
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == shown
    assert chunks[-1]["finish_reason"] == choice["finish_reason"]
    ended_early = stopped and not shown.endswith(("Paris", "is "))  # there the reply was over anyway
    assert engine.finished == ([(submit.request_id, 0) for submit in engine.submits] if ended_early else [])


@pytest.mark.anyio
async def test_the_stop_string_is_shown_when_asked(http: httpx.AsyncClient) -> None:
    whole, _ = await ask(http, stop="l of", include_stop_str_in_output=True)
    assert whole["choices"][0]["message"]["content"] == "The capital of"


@pytest.mark.anyio
async def test_tokens_after_the_stop_are_not_counted(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.tokens_per_output = 5
    whole, _ = await ask(http, stop=" of")
    assert whole["usage"]["completion_tokens"] == 3
    assert whole["usage"]["compression"]["bytes_held"] == 255


@pytest.mark.anyio
async def test_logprobs_are_held_back_with_the_text(http: httpx.AsyncClient) -> None:
    whole, chunks = await ask(http, stop="capital of F", logprobs=True)
    content = whole["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["The", " capital"]  # " capital" begins before the stop string
    streamed = [entry["token"] for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
    assert streamed == ["The", " capital"]


@pytest.mark.anyio
async def test_not_before_min_tokens(http: httpx.AsyncClient) -> None:
    whole, _ = await ask(http, stop="a", min_tokens=4)
    assert whole["choices"][0]["message"]["content"] == "The capital of Fr"  # "capital" came too early


@pytest.mark.anyio
async def test_a_stop_string_ends_its_choice_only(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    plain = engine._output

    def second_differs(submit: Any, index: int, at: int) -> Any:
        engine.reply = tokenizer.encode("One two three four five." if index else "A b c d e f g h.", False)
        return plain(submit, index, at)

    engine._output = second_differs  # type: ignore[method-assign]
    body = (await http.post(URL, json={"messages": HELLO, "n": 2, "stop": " c"})).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["A b", "One two three four five."]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert engine.finished == [(engine.submits[0].request_id, 0)]
