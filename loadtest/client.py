"""A client of /v1/completions that streams and keeps the time of everything that arrives."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

TIMEOUT = httpx.Timeout(900.0, connect=10.0)


class BenchError(Exception):
    """What keeps a measurement from being one; the message says whose answer it was."""


class NotMeasured(BenchError):
    """What one server cannot do, or did differently from what was asked: others are measured without it."""


@dataclass(frozen=True)
class Ask:
    """One request, greedy, that always gets all its tokens."""

    prompt: list[int]
    max_tokens: int
    plan: dict[str, Any] | None = None
    """None where the server knows no plans"""
    speculative: dict[str, Any] | None = None
    forced: list[int] = field(default_factory=list)
    """The first of these tokens; their logprobs are asked for"""


@dataclass
class Completion:
    """One answer while it arrives. Times are those of `time.perf_counter`."""

    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    """When text came"""
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    compression: dict[str, Any] | None = None
    accepted_tokens: int = 0
    logprobs: list[float] = field(default_factory=list)
    """Of the tokens of an answer that was forced"""
    is_done: bool = False

    @property
    def is_decoding(self) -> bool:
        return bool(self.arrivals) and not self.is_done

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second from the first token to the last."""
        return (self.tokens - 1) / (self.arrivals[-1] - self.arrivals[0])

    @property
    def gaps_s(self) -> list[float]:
        """Times between arrivals."""
        return [after - before for before, after in pairwise(self.arrivals)]


class Client:
    """One OpenAI-compatible server.

    Servers differ in what they take: `probe` finds out whether prompts may be token ids and whether `ignore_eos` is
    known; where not, text is sent, and answers may end early. `about` says what was found.
    """

    def __init__(self, url: str, decode: Callable[[list[int]], str], api_key: str | None = None):
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = ""
        self._decode = decode
        self._takes_tokens = self._ignores_eos = True
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def http(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT, limits=limits, headers=self._headers)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, headers=self._headers).raise_for_status()

    def about(self) -> dict[str, Any]:
        """What is served, by which version, and how it is asked."""
        return {
            "model": self.model,
            "version": self._version(),
            "prompts": "token ids" if self._takes_tokens else "text",
            "ignores_eos": self._ignores_eos,
        }

    def _version(self) -> str | None:
        """As vLLM and Winnow, or as llama.cpp say it; None of who does not."""
        for path, key in (("/version", "version"), ("/props", "build_info")):
            try:
                return str(self.get(path).json()[key])
            except (httpx.HTTPError, ValueError, LookupError, TypeError):
                continue
        return None

    def probe(self) -> None:
        """Asks for the model's name and finds a form of request that is accepted. Raises BenchError."""
        try:
            self.model = self.get("/v1/models").json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise BenchError(f"{self.url}/v1/models: {error}") from error
        problem: Exception | None = None
        for self._takes_tokens, self._ignores_eos in ((True, True), (False, True), (True, False), (False, False)):
            try:
                self.complete([Ask(list(range(100, 116)), 2)])
                return
            except BenchError as error:
                problem = error
        raise BenchError(f"{self.url} takes no form of request that is known here: {problem}")

    def complete(self, asks: Sequence[Ask]) -> list[Completion]:
        """Sends all of them at once and waits for all."""

        async def run() -> list[Completion]:
            completions = [Completion() for _ in asks]
            async with self.http() as http:
                pairs = zip(asks, completions, strict=True)
                await asyncio.gather(*(self.stream(http, ask, completion) for ask, completion in pairs))
            return completions

        try:
            return asyncio.run(run())
        except httpx.HTTPError as error:
            raise BenchError(f"{self.url}: {error or type(error).__name__}") from error

    async def stream(self, http: httpx.AsyncClient, ask: Ask, into: Completion) -> None:
        """Sends one request; `into` grows while the answer arrives."""
        into.sent = time.perf_counter()
        async with http.stream("POST", "/v1/completions", json=self._body(ask)) as response:
            if response.status_code != 200:
                await response.aread()
                kind = NotMeasured if 400 <= response.status_code < 500 else BenchError
                raise kind(f"{self.url}: {response.status_code}: {response.text[:300]}")
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    _take(json.loads(line[6:]), into)
        into.is_done = True
        if not into.arrivals:
            raise BenchError(f"{self.url}: an answer without text")
        if not into.tokens:
            raise NotMeasured(f"{self.url}: an answer without `usage`: nobody knows how many tokens it has")

    def _body(self, ask: Ask) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": ask.prompt if self._takes_tokens else self._decode(ask.prompt),
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._ignores_eos:
            body["ignore_eos"] = True
        if ask.plan is not None:
            body["compression"] = ask.plan
        if ask.speculative is not None:
            body["speculative"] = ask.speculative
        if ask.forced:
            body |= {"forced": ask.forced, "logprobs": 0}
        return body


def _take(chunk: dict[str, Any], into: Completion) -> None:
    if "error" in chunk:
        raise BenchError(str(chunk["error"]))
    for choice in chunk.get("choices") or ():
        if choice.get("text") or choice.get("finish_reason"):
            into.arrivals.append(time.perf_counter())
            into.text += choice.get("text") or ""
        if choice.get("logprobs"):
            into.logprobs += choice["logprobs"]["token_logprobs"]
    usage = chunk.get("usage")
    if usage:
        into.tokens = usage["completion_tokens"]
        into.prompt_tokens = usage["prompt_tokens"]
        into.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        into.compression = usage.get("compression")
        details = usage.get("completion_tokens_details") or {}
        into.accepted_tokens = details.get("accepted_prediction_tokens") or 0
