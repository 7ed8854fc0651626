"""Running the application under uvicorn, and ending it without cutting anybody off.

First SIGTERM or SIGINT: not ready, new requests get 503 with Retry-After, running ones get `drain_s` to finish, then
they are cut with an error; then the process ends with status 0. A second signal cuts at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from winnow.server.models import Models
from winnow.server.settings import Settings

logger = logging.getLogger(__name__)

CLOSE_S = 5
"""Time for uvicorn to close connections once no request runs any more"""


class Server(uvicorn.Server):
    """uvicorn, which by itself stops listening at the first signal and dies of it in the end."""

    def __init__(self, config: uvicorn.Config, models: Models):
        super().__init__(config)
        self.models = models
        self.failure: Exception | None = None
        self._draining: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._watching = self._loop.create_task(self._watch_engines())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._watching is not None:
            self._watching.cancel()
        await super().shutdown(sockets)

    async def _watch_engines(self) -> None:
        """Ends the process when one of them will never start."""
        self.failure = await self.models.failure()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or not self.started:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._on_signal, signal.Signals(sig).name)

    def _on_signal(self, name: str) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain(name))
        else:
            self.models.cut_all()

    async def _drain(self, name: str) -> None:
        running, seconds = self.models.running, self.models.settings.drain_s
        logger.info("%s: finishing %d requests within %g s", name, running, seconds)
        await self.models.drain(seconds)
        self.should_exit = True


def serve(app: FastAPI, settings: Settings) -> None:
    """Returns after a drain.

    Raises
        ModelError: an engine cannot load its model
    """
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # it would log URLs; see middleware.Observe
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=CLOSE_S,
    )
    server = Server(config, app.state.models)
    server.run()
    if server.failure is not None:
        raise server.failure
