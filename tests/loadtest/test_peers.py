"""Servers that are measured beside ours: how they are asked, and what happens with what they cannot do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from client import BenchError, Client, NotMeasured
from contenders import TRANSFORMERS, Server, Speed
from report import Report
from scenarios import Bench, Sizes

from winnow.engine.evaluation.text import PromptBook


class Peer(BaseHTTPRequestHandler):
    """OpenAI's completions, a token a chunk, of a server that lacks what a test says."""

    takes_tokens = True
    knows_ignore_eos = True
    ends_after = 1000
    context = 1000
    reads_less = 0
    counts = True
    cached = 0

    def do_GET(self) -> None:
        answers = {"/v1/models": {"data": [{"id": "small"}]}, "/props": {"build_info": "b1"}}
        self._answer(answers[self.path]) if self.path in answers else self._answer({}, 404)

    def do_POST(self) -> None:
        ask = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = ask["prompt"]
        length = len(prompt) if isinstance(prompt, list) else len(prompt.split())
        if (isinstance(prompt, list) and not self.takes_tokens) or ("ignore_eos" in ask and not self.knows_ignore_eos):
            return self._answer({"error": {"message": "unknown"}}, 422)
        if length > self.context:
            return self._answer({"error": {"message": "the prompt is too long"}}, 400)
        tokens = min(ask["max_tokens"], self.ends_after)
        chunks: list[dict[str, Any]] = [{"choices": [{"text": "a"}]} for _ in range(tokens)]
        chunks.append({"choices": [{"text": "", "finish_reason": "length"}]})
        if self.counts:
            details = {"cached_tokens": self.cached}
            usage = {"completion_tokens": tokens, "prompt_tokens": length - self.reads_less}
            chunks.append({"choices": [], "usage": usage | {"prompt_tokens_details": details}})
        self._send("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n")

    def _answer(self, body: dict[str, Any], status: int = 200) -> None:
        self._send(json.dumps(body), status)

    def _send(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


class Listener(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that learnt enough hangs up."""


@contextmanager
def peer(**lacks: Any) -> Iterator[Client]:
    with Listener(("127.0.0.1", 0), type("Lacking", (Peer,), lacks)) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/v1"
            yield Client(url, lambda tokens: " ".join(map(str, tokens)))
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("lacks", "prompts", "ignores_eos"),
    [
        ({}, "token ids", True),
        ({"takes_tokens": False}, "text", True),
        ({"knows_ignore_eos": False}, "token ids", False),
        ({"takes_tokens": False, "knows_ignore_eos": False}, "text", False),
    ],
)
def test_a_peer_is_asked_as_it_can_be(lacks: dict[str, Any], prompts: str, ignores_eos: bool) -> None:
    with peer(**lacks) as client:
        client.probe()
        assert client.about() == {"model": "small", "version": "b1", "prompts": prompts, "ignores_eos": ignores_eos}
        assert Server("peer", client).decode("a", list(range(50)), 8).text == "a" * 8


def test_who_does_not_count_is_no_peer() -> None:
    with peer(counts=False) as client, pytest.raises(BenchError, match="usage"):
        client.probe()


@pytest.mark.parametrize(
    ("lacks", "why"),
    [
        ({"ends_after": 7}, "7 tokens came of 8"),
        ({"reads_less": 3}, "a prompt of 200 tokens was read as 197"),
        ({"context": 100}, "400: .*the prompt is too long"),
    ],
)
def test_what_was_not_asked_for_is_not_measured(lacks: dict[str, Any], why: str) -> None:
    with peer(**lacks) as client:
        for measure in (lambda s: s.decode("a", [5] * 200, 8), lambda s: s.together([[5] * 200] * 2, 8)):
            with pytest.raises(NotMeasured, match=why):
                measure(Server("peer", client))


def test_a_cache_does_not_answer() -> None:
    with peer(cached=2) as client:  # two first tokens of another prompt
        assert Server("peer", client).prefill([5] * 200) > 0
    with peer(cached=3) as client, pytest.raises(BenchError, match="in its cache"):
        Server("peer", client).prefill([5] * 200)


class Baseline:
    """Says what peers say, and what it holds."""

    name = TRANSFORMERS

    def decode(self, key: str, prompt: list[int], tokens: int) -> Speed:
        return Speed(1.0, text="a" * tokens, held_bytes=2**20)

    def prefill(self, prompt: list[int]) -> float:
        return 1.0

    def together(self, prompts: Sequence[list[int]], tokens: int) -> Speed:
        return Speed(1.0)


def test_who_cannot_be_measured_is_left_out_with_the_reason() -> None:
    said: list[str] = []
    report = Report("unit", {})
    sizes = Sizes(rounds=2, contexts=(50, 200), decode_tokens=8, prefill_tokens=200, together=(2,), together_prompt=50)
    bench = Bench(sizes, PromptBook(lambda text: list(text.encode()), "some text " * 100), report, said.append)
    with peer(context=100) as client:
        contenders = [Baseline(), Server("short", client)]
        bench.decode(contenders)
        bench.prefill(contenders)
        bench.together(contenders)
    figures = {(key, *cell): len(f.values) for key, table in report.tables.items() for cell, f in table.figures.items()}
    assert figures == {
        ("decode", "50 tokens", TRANSFORMERS): 2,
        ("decode", "50 tokens", "short"): 2,
        ("decode", "200 tokens", TRANSFORMERS): 2,
        ("held", "50 tokens", TRANSFORMERS): 2,
        ("held", "200 tokens", TRANSFORMERS): 2,
        ("prefill", "speed", TRANSFORMERS): 2,
        ("prefill", "time to first token", TRANSFORMERS): 2,
        ("together", "2 requests", TRANSFORMERS): 2,
        ("together", "2 requests", "short"): 2,
    }
    assert report.facts["texts_equal_to_transformers"] == {TRANSFORMERS: 2, "short": 1}
    left_out = {one["what"]: one["why"] for one in report.as_dict()["left_out"]}
    assert set(left_out) == {"bytes held", "decode, 200 tokens", "prefill"}
    assert "the prompt is too long" in left_out["prefill"]
    assert any("left out of prefill" in line for line in said)
