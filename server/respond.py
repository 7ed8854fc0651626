"""A generation as an HTTP answer: whole, or as a stream."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from winnow.server.answers import Answer, Whole
from winnow.server.generation import Generation
from winnow.server.sse import event, start_stream, while_connected


async def respond(request: Request, generation: Generation, answer: Answer) -> Response:
    """
    Raises
        what `Generation.pieces` raises, and ClientGone
    """
    if generation.request.stream:
        ping_s = generation.service.settings.ping_s
        return await start_stream(request, _events(generation, answer), ping_s)
    body = await while_connected(request, _whole(generation, answer))
    return Response(body, media_type="application/json")


async def _whole(generation: Generation, answer: Answer) -> bytes:
    choices: dict[int, Whole] = defaultdict(Whole)
    async with aclosing(generation.pieces()) as pieces:
        async for piece in pieces:
            choices[piece.choice].add(piece)
    shown = [answer.whole(i, choice) for i, choice in sorted(choices.items())]
    return msgspec.json.encode(answer.envelope(shown, is_chunk=False) | {"usage": generation.usage.as_dict()})


async def _events(generation: Generation, answer: Answer) -> AsyncGenerator[bytes, None]:
    """Chunks. When the request has a plan, each choice's last chunk says in `compression` what was kept of it; the
    usage chunk, when it was asked for, has the sums of the whole request."""
    opened: set[int] = set()
    no_usage = {"usage": None} if generation.request.wants_usage_chunk else {}
    async with aclosing(generation.pieces()) as pieces:
        async for piece in pieces:
            if piece.choice not in opened:
                opened.add(piece.choice)
                if (opening := answer.opening(piece.choice)) is not None:
                    yield event(answer.envelope([opening], is_chunk=True) | no_usage)
            if piece.is_empty:
                continue
            chunk = answer.envelope([answer.chunk(piece)], is_chunk=True) | no_usage
            if generation.has_plan and piece.report is not None:
                chunk["compression"] = generation.usage.compression([piece.report])
            yield event(chunk)
    if generation.request.wants_usage_chunk:
        yield event(answer.envelope([], is_chunk=True) | {"usage": generation.usage.as_dict()})
