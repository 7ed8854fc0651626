"""A running server as the one who is asked, by nothing but its HTTP API.

A server tells the likeliest tokens only, and by their text, so what is said of whole distributions is approximate: see
`measures.Few`. Agreement is exact but for tokens that look alike; losses, answers and bytes are exact.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import httpx
import numpy as np

from winnow.engine.errors import EvalError, RequestError
from winnow.engine.evaluation.measures import Few
from winnow.engine.evaluation.targets import SEED, Answer, Ask

T = TypeVar("T")

TIMEOUT = httpx.Timeout(900.0, connect=10.0)
TOP = 20
"""Likeliest tokens to ask for; a server that tells fewer is asked for what it says"""
TOGETHER = 16
"""Requests under way at once"""


class ServerTarget:
    """A Winnow server. Raises EvalError where it cannot be reached or is none."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sees: bool = False,
    ):
        """`sees`: the first of the server's models that sees images is asked, not the first of all."""
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._transport = transport
        cards = self._run(self._get("/v1/models"))["data"]
        card = next((card for card in cards if not sees or "image" in (card.get("sees") or ())), None)
        if card is None:
            raise EvalError(f"{url} has no model that sees images")
        if "compression" not in card or not card.get("max_model_len"):
            raise EvalError(f"{url} is no Winnow server, or it is not ready")
        self.model = str(card["id"])
        self.weights = str(card["weights"])
        self.max_model_len = int(card["max_model_len"])
        self._texts: dict[tuple[int, ...], str] = {}
        """Of what was encoded: an answer's text begins with that of its forced tokens"""

    def encode(self, text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        tokens: list[int] = self._run(self._post("/tokenize", body))["tokens"]
        self._texts[tuple(tokens)] = text
        return tokens

    def decode(self, tokens: list[int]) -> str:
        return str(self._run(self._post("/detokenize", {"tokens": tokens}))["prompt"])

    def ask(self, asks: Sequence[Ask]) -> list[Answer | RequestError]:
        async def all_of_them() -> list[Answer | RequestError]:
            gate = asyncio.Semaphore(TOGETHER)

            async def one(ask: Ask) -> Answer | RequestError:
                async with gate:
                    return await self._ask(http, ask)

            async with self._client() as http:
                return list(await asyncio.gather(*map(one, asks)))

        return self._run(all_of_them())

    async def _ask(self, http: httpx.AsyncClient, ask: Ask) -> Answer | RequestError:
        if ask.image is not None:
            return await self._ask_about(http, ask.image, ask)
        body = {
            "model": self.model,
            "prompt": ask.prompt,
            "max_tokens": len(ask.forced) + ask.new,
            "temperature": 0,
            "seed": SEED,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "compression": ask.plan,
        }
        if "prompt" in ask.plan:
            body |= {"prompt": ask.context + ask.question, "context": ask.context, "add_special_tokens": False}
        if ask.forced:
            body["forced"] = ask.forced
        if ask.foretells:
            body["logprobs"] = TOP
        data = await self._answer(http, "/v1/completions", body)
        if isinstance(data, RequestError):
            return data
        choice, report = data["choices"][0], data["usage"]["compression"]
        foretold = None
        if ask.foretells:
            told = slice(1, len(ask.forced))
            logprobs = choice["logprobs"]
            foretold = Few(
                tuple(logprobs["top_logprobs"][told]), np.array(logprobs["token_logprobs"][told], np.float32)
            )
        text = choice["text"].removeprefix(self._texts.get(tuple(ask.forced), ""))
        reading = report.get("read")
        read = None if reading is None else reading["bytes_per_token"] / reading["bytes_per_token_dense"]
        return Answer(text, foretold, report["bytes_held"], report["bytes_uncompressed"], read)

    async def _ask_about(self, http: httpx.AsyncClient, image: bytes, ask: Ask) -> Answer | RequestError:
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": ask.question}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": ask.new,
            "temperature": 0,
            "seed": SEED,
            "compression": ask.plan,
        }
        data = await self._answer(http, "/v1/chat/completions", body)
        if isinstance(data, RequestError):
            return data
        text, usage = data["choices"][0]["message"]["content"], data["usage"]
        report, of_prompt = usage["compression"], usage["prompt_tokens_details"]
        return Answer(
            text,
            None,
            report["bytes_held"],
            report["bytes_uncompressed"],
            image_tokens=of_prompt["image_tokens"],
            image_kept=of_prompt["image_tokens_kept"],
        )

    async def _answer(self, http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any] | RequestError:
        answer = await http.post(path, json=body)
        if answer.status_code == 400:
            error = answer.json()["error"]
            return RequestError(error["param"], error["message"], error["code"])
        return self._checked(answer)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT, headers=self._headers, transport=self._transport)

    async def _get(self, path: str) -> dict[str, Any]:
        async with self._client() as http:
            return self._checked(await http.get(path))

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self._client() as http:
            return self._checked(await http.post(path, json=body))

    def _checked(self, answer: httpx.Response) -> dict[str, Any]:
        if answer.status_code != 200:
            raise EvalError(f"{answer.request.url}: {answer.status_code}: {answer.text[:300]}")
        data: dict[str, Any] = answer.json()
        return data

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return asyncio.run(work)
        except httpx.HTTPError as error:
            raise EvalError(f"{self._url}: {error or type(error).__name__}") from error
