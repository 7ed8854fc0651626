"""What the engine's process asks of an engine, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from winnow.engine.errors import RequestError
from winnow.engine.messages import (
    Abort,
    EngineInfo,
    EngineStats,
    Finish,
    FromEngine,
    Rejected,
    Shorten,
    Submit,
    ToEngine,
)


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


def refused(request_id: str, error: RequestError) -> Rejected:
    """What is told of a request that its sender can mend."""
    return Rejected(request_id, "request", error.message, error.param, error.code)


def handle(engine: Steps, message: ToEngine) -> list[FromEngine]:
    """Does what a message asks for; what there is to answer at once is returned."""
    match message:
        case Submit() | Shorten():
            try:
                if isinstance(message, Submit):
                    engine.submit(message)
                else:
                    engine.shorten(message)
            except RequestError as error:
                return [refused(message.request_id, error)]
        case Abort():
            engine.abort(message.request_id)
        case Finish():
            return [*engine.finish(message.request_id, message.index)]
    return []
