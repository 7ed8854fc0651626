"""What the server needs of the engine. `winnow.engine.client.EngineClient` is it; tests bring a scripted one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Protocol

from winnow.engine.messages import EngineInfo, EngineStats, Output, Shorten, Shortened, Submit


class Client(Protocol):
    @property
    def info(self) -> EngineInfo | None:
        """None until the model was loaded once."""

    @property
    def stats(self) -> EngineStats: ...

    @property
    def is_ready(self) -> bool:
        """Whether the engine's process is up with the model loaded."""

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the engine was last heard."""

    @property
    def restarts(self) -> int: ...

    @property
    def failed(self) -> asyncio.Future[Exception] | None:
        """From `start` on; set when the engine cannot start and trying again would not help."""

    async def start(self) -> None: ...

    async def stop(self, drain_s: float) -> None: ...

    def generate(self, submit: Submit) -> AsyncGenerator[Output, None]:
        """Outputs of all choices until each has a finish reason; closing it early aborts the request.

        Raises
            RequestError, EngineDied
        """

    async def shorten(self, request: Shorten) -> Shortened:
        """What a plan leaves of a prompt; cancelling it aborts the request.

        Raises
            RequestError, EngineDied
        """

    def finish(self, request_id: str, index: int) -> None:
        """Ends one choice; its last output, with the report, still comes."""
