"""The other processes of a model that several share: `python -m winnow.engine.followers RANK MEETING < settings`.

The engine's own process is the first rank and starts them. They do what it does, message by message and step by step
(see engine/ranks.py), and say nothing. If one of them ends, all do: the server starts the engine again. They end when
the first one does.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from winnow.engine.build import build_engine
from winnow.engine.config import EngineSettings
from winnow.engine.engine import Engine
from winnow.engine.errors import ModelError
from winnow.engine.messages import Shutdown
from winnow.engine.ranks import Ranks
from winnow.engine.steps import handle
from winnow.engine.wire import EXIT_MODEL_ERROR, decode_to_engine

log = logging.getLogger(__name__)


def lead(settings: EngineSettings) -> Ranks:
    """Starts the others and meets them; this process is the first rank."""
    if sys.platform == "linux":  # all are on this machine, whose name may lead elsewhere
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="winnow-") as folder:  # writable by this user only
        meeting = str(Path(folder) / "meeting")
        for rank in range(1, settings.tensor_parallel):
            command = [sys.executable, "-m", "winnow.engine.followers", str(rank), meeting]
            process = subprocess.Popen(command, stdin=subprocess.PIPE)
            assert process.stdin is not None
            process.stdin.write(settings.model_dump_json().encode() + b"\n")
            process.stdin.flush()  # and stays open: its end tells them that this process is gone
            threading.Thread(target=_end_with, args=(rank, process), daemon=True).start()
        return Ranks.join(0, settings.tensor_parallel, meeting, settings.device)


def _end_with(rank: int, process: subprocess.Popen[bytes]) -> None:
    """Ends this process when a follower does: it may be waiting for that one, and would wait for long."""
    status = process.wait()
    if status:
        log.error("rank %d ended with status %d", rank, status)
        os._exit(EXIT_MODEL_ERROR if status == EXIT_MODEL_ERROR else 1)


def _end_with_leader() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)


def follow(engine: Engine) -> None:
    """Does what the first rank does until it ends."""
    while True:
        told = engine.arena.ranks.told(b"")
        for message in decode_to_engine(told) if told else []:
            if isinstance(message, Shutdown):
                return engine.stop()
            handle(engine, message)
        engine.step()


def main() -> int:
    rank, meeting = int(sys.argv[1]), sys.argv[2]
    form = f"%(asctime)s %(levelname)s engine, rank {rank}: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, stream=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings = EngineSettings.model_validate_json(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_leader, daemon=True).start()
    try:
        follow(build_engine(settings, Ranks.join(rank, settings.tensor_parallel, meeting, settings.device)))
    except ModelError as error:
        log.error("%s", error)
        return EXIT_MODEL_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
