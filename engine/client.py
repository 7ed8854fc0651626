"""The server's side of the engine: starts its process, talks to it, and starts it again when it dies. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from winnow.engine.config import EngineSettings
from winnow.engine.errors import EngineDied, ModelError, RequestError
from winnow.engine.messages import (
    Abort,
    EngineInfo,
    EngineStats,
    Finish,
    FromEngine,
    Output,
    Rejected,
    Shorten,
    Shortened,
    Shutdown,
    Submit,
    ToEngine,
)
from winnow.engine.wire import EXIT_MODEL_ERROR, LENGTH, decode_from_engine, frame

log = logging.getLogger(__name__)

LOST = "the engine stopped while it held this request; it is being started again"


class EngineClient:
    """One engine process. All methods belong to one event loop."""

    def __init__(self, settings: EngineSettings):
        self.settings = settings
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.is_ready = False
        self.restarts = 0
        self._heard = time.monotonic()
        self._writer: asyncio.StreamWriter | None = None
        self._queues: dict[str, asyncio.Queue[Output | Shortened | Exception]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self.failed: asyncio.Future[Exception] | None = None
        """Set when the engine cannot start and trying again would not help"""

    @property
    def heartbeat_age_s(self) -> float:
        return time.monotonic() - self._heard

    async def start(self) -> None:
        """Begins to start the process and returns; `is_ready` tells when the model is loaded."""
        self.failed = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def stop(self, drain_s: float = 0.0) -> None:
        """Waits up to `drain_s` for the requests that run, ends the process, and fails what is left."""
        deadline = time.monotonic() + drain_s
        while self._queues and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        supervisor.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await supervisor

    async def generate(self, submit: Submit) -> AsyncGenerator[Output, None]:
        """Outputs of all choices until each has a finish reason; closing it early aborts the request.

        Raises
            RequestError  the engine refuses it
            EngineDied    it was lost
        """
        left = submit.sampling.n
        queue = self._ask(submit)
        try:
            while left:
                item = await queue.get()
                if isinstance(item, Exception):
                    left = 0
                    raise item
                assert isinstance(item, Output)
                left -= item.finish_reason is not None
                yield item
        finally:
            del self._queues[submit.request_id]
            if left:
                self._send([Abort(submit.request_id)])

    async def shorten(self, request: Shorten) -> Shortened:
        """What the plan leaves of a prompt; cancelling it aborts the request.

        Raises
            as `generate`
        """
        queue, answer = self._ask(request), None
        try:
            answer = await queue.get()
            if isinstance(answer, Exception):
                raise answer
            assert isinstance(answer, Shortened)
            return answer
        finally:
            del self._queues[request.request_id]
            if answer is None:
                self._send([Abort(request.request_id)])

    def _ask(self, request: Submit | Shorten) -> asyncio.Queue[Output | Shortened | Exception]:
        """Sends a request; what comes of it is queued until its sender forgets the queue."""
        if not self.is_ready:
            raise EngineDied("the engine is starting")
        queue: asyncio.Queue[Output | Shortened | Exception] = asyncio.Queue()
        self._queues[request.request_id] = queue
        self._send([request])
        return queue

    def finish(self, request_id: str, index: int) -> None:
        """Ends one choice; its last output, with the report, still comes."""
        self._send([Finish(request_id, index)])

    def _send(self, messages: list[ToEngine]) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(messages))

    # The process -----------------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        pause_s = 1.0
        while True:
            began = time.monotonic()
            status = await self._run_once()
            if status == EXIT_MODEL_ERROR and self.failed is not None and not self.failed.done():
                self.failed.set_result(ModelError("the model cannot be loaded; the engine's log says why"))
                return
            pause_s = 1.0 if time.monotonic() - began > 60 else min(30.0, pause_s * 2)
            log.error("the engine ended with status %s; starting it again in %.0f s", status, pause_s)
            await asyncio.sleep(pause_s)
            self.restarts += 1

    async def _run_once(self) -> int | None:
        """One life of the process, from its start to its end."""
        connected: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

        async def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await connected.put((reader, writer))

        with tempfile.TemporaryDirectory(prefix="winnow-") as folder:  # readable by this user only
            path = str(Path(folder) / "engine.sock")
            server = await asyncio.start_unix_server(on_connect, path)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "winnow.engine.process",
                path,
                stdin=asyncio.subprocess.PIPE,
                env={
                    # Threads that wait for the next kernel spin briefly and then sleep: the server needs the cores too.
                    "OMP_WAIT_POLICY": "passive",
                    "GOMP_SPINCOUNT": "2000",
                    **os.environ,
                },
            )
            self._process = process
            try:
                assert process.stdin is not None
                process.stdin.write(self.settings.model_dump_json().encode())
                process.stdin.close()
                ended = asyncio.create_task(process.wait())
                accepted = asyncio.create_task(connected.get())
                await asyncio.wait({ended, accepted}, return_when=asyncio.FIRST_COMPLETED)
                if accepted.done():
                    reader, self._writer = accepted.result()
                    await self._read(reader)
                accepted.cancel()
                return await asyncio.wait_for(asyncio.shield(ended), 10)
            except TimeoutError:
                return None
            finally:
                self._lose_all()
                await self._end(process)
                server.close()

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Makes sure that the process is gone: a word first, then a signal."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.write(frame([Shutdown()]))
                writer.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 5)
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Hands out what the engine says until the connection ends."""
        try:
            while True:
                (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                for message in decode_from_engine(await reader.readexactly(size)):
                    self._handle(message)
                self._heard = time.monotonic()
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    def _handle(self, message: FromEngine) -> None:
        match message:
            case Output() | Shortened() | Rejected():
                queue = self._queues.get(message.request_id)
                if queue is None:
                    return  # aborted meanwhile
                if not isinstance(message, Rejected):
                    queue.put_nowait(message)
                elif message.kind == "request":
                    queue.put_nowait(RequestError(message.param, message.message, message.code))
                else:
                    queue.put_nowait(EngineDied(message.message))
            case EngineStats():
                self.stats = message
            case EngineInfo():
                self.info = message
                self.is_ready = True
                log.info("the engine is ready: %s, %d tokens of context", message.model, message.max_model_len)

    def _lose_all(self) -> None:
        self.is_ready = False
        for queue in self._queues.values():
            queue.put_nowait(EngineDied(LOST))
