"""Server-sent events, and clients that go away.

A stream is: chunks, then `data: [DONE]`. Its status and headers wait for the first chunk, so that whatever is refused
is refused with a proper status; but not longer than the ping interval, so that a long prefill is no silence. From then
on comment lines (`: ping`) fill silences, and an error is an event with OpenAI's error body, after which the stream
ends without `[DONE]`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from winnow.server.errors import ClientGone, answer

T = TypeVar("T")

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; the work is cancelled when the client goes away.

    Raises
        ClientGone, and what the work raises
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnect(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _cancel(task, gone)


async def start_stream(request: Request, events: AsyncGenerator[bytes, None], ping_s: float) -> EventStream:
    """A response that streams the events, made once the first is there or `ping_s` passed.

    Raises
        ClientGone, and what the events raise before the first
    """
    first = asyncio.ensure_future(anext(events))
    try:
        await while_connected(request, _settled(first, ping_s))
        if first.done():
            first.result()
    except BaseException:
        await _cancel(first)
        await events.aclose()
        raise
    return EventStream(first, events, ping_s)


class EventStream(Response):
    """Events, pings between them, and an end of it all when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, first: asyncio.Future[bytes], events: AsyncGenerator[bytes, None], ping_s: float):
        super().__init__(status_code=200, headers=HEADERS)
        del self.headers["content-length"]
        self.first = first
        self.events = events
        self.ping_s = ping_s
        self.sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_disconnect(receive))
        pump: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            pump = asyncio.create_task(self._pump(send))
            while not (pump.done() or gone.done()):
                await asyncio.wait({pump, gone}, timeout=self.ping_s, return_when=asyncio.FIRST_COMPLETED)
                if not pump.done() and self._silence_s() >= self.ping_s:
                    await self._send(send, PING)
            if pump.done():
                pump.result()
        finally:
            await _cancel(pump, gone, self.first)
            await self.events.aclose()
        if not gone.done() or gone.cancelled():
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, send: Send) -> None:
        async with aclosing(self.events):
            try:
                await self._send(send, await self.first)
                async for data in self.events:
                    await self._send(send, data)
            except Exception as error:
                await self._send(send, event(answer(error).body))
            else:
                await self._send(send, DONE)

    async def _send(self, send: Send, data: bytes) -> None:
        self.sent_at = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": data, "more_body": True})

    def _silence_s(self) -> float:
        return asyncio.get_running_loop().time() - self.sent_at


async def _settled(future: asyncio.Future[bytes], timeout_s: float) -> None:
    await asyncio.wait({future}, timeout=timeout_s)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*futures: asyncio.Future[Any]) -> None:
    """Cancels what is not done and waits until it is; its result is of no interest any more."""
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)
