"""The engine's own process, whichever engine it is: `python -m winnow.engine.process SOCKET < settings.json`.

It loads the model, says what it is, and then steps for as long as there is work, reading the socket between steps. It
ends when the server tells it to, or when the server is gone.
"""

from __future__ import annotations

import gc
import logging
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence

from winnow.engine.build import build_engine, vllm_engine
from winnow.engine.config import EngineSettings
from winnow.engine.errors import ModelError
from winnow.engine.followers import lead
from winnow.engine.messages import FromEngine, Shutdown, ToEngine
from winnow.engine.ranks import ALONE, Ranks
from winnow.engine.steps import Steps, handle
from winnow.engine.wire import EXIT_MODEL_ERROR, LENGTH, MAX_FRAME, decode_to_engine, encode, frame

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
STATS_EVERY_S = 0.1
POLL_S = 0.005
"""How often threads are asked for what they do beside the engine"""


class EngineLoop:
    """Reads requests, steps, writes outputs."""

    def __init__(self, engine: Steps, sock: socket.socket, ranks: Ranks = ALONE):
        """`ranks`: who is to do the same (see followers.py)."""
        self._engine = engine
        self._ranks = ranks
        self._socket = sock
        self._buffer = bytearray()
        self._is_open = True
        self._told = 0.0

    def run(self) -> None:
        self._send([self._engine.info])
        while True:
            arrived = self._receive(self._wait_s())
            if not self._is_open or any(isinstance(message, Shutdown) for message in arrived):
                break
            self._ranks.told(encode(arrived) if arrived else b"")
            outputs = [answer for message in arrived for answer in handle(self._engine, message)]
            outputs += self._engine.step()
            now = time.monotonic()
            if now - self._told >= (HEARTBEAT_S if self._engine.is_idle and not outputs else STATS_EVERY_S):
                outputs.append(self._engine.stats)
                self._told = now
            if outputs:
                self._send(outputs)
        self._ranks.told(encode([Shutdown()]))
        self._engine.stop()

    def _wait_s(self) -> float:
        if self._engine.can_step:
            return 0.0
        return HEARTBEAT_S if self._engine.is_idle else POLL_S

    def _receive(self, wait_s: float) -> list[ToEngine]:
        """Whatever has arrived."""
        messages: list[ToEngine] = []
        while select.select([self._socket], [], [], wait_s)[0]:
            data = self._socket.recv(1 << 20)
            if not data:
                self._is_open = False
                return messages
            self._buffer += data
            wait_s = 0.0
        while len(self._buffer) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._buffer)
            if size > MAX_FRAME:
                raise ValueError("a frame on the engine's socket is too long")
            if len(self._buffer) < LENGTH.size + size:
                break
            body = bytes(self._buffer[LENGTH.size : LENGTH.size + size])
            del self._buffer[: LENGTH.size + size]
            messages += decode_to_engine(body)
        return messages

    def _send(self, messages: Sequence[FromEngine]) -> None:
        try:
            self._socket.sendall(frame(messages))
        except OSError:
            self._is_open = False


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine: %(message)s", stream=sys.stderr)
    # Ctrl-C, and what a service manager sends, reach the whole process group: the server drains and says when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings = EngineSettings.model_validate_json(sys.stdin.buffer.read())
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(sys.argv[1])
        try:
            ranks = lead(settings) if settings.tensor_parallel > 1 else ALONE
            engine = vllm_engine(settings) if settings.engine == "vllm" else build_engine(settings, ranks)
        except ModelError as error:
            log.error("%s", error)
            return EXIT_MODEL_ERROR
        # What is here now stays: later collections, and each CUDA graph that is recorded begins with one, pass it over.
        gc.collect()
        gc.freeze()
        EngineLoop(engine, sock, ranks).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
