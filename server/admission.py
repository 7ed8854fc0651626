"""Who may come in: a queue bounded in requests, prompt tokens and bytes of images, deadlines, the drain at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from winnow.engine.errors import Overloaded, WinnowError
from winnow.server.errors import ApiError
from winnow.server.settings import Settings

T = TypeVar("T")

RETRY_FULL_S = 1
RETRY_DRAINING_S = 5
LANDING_S = 5
"""Time for requests that were cut to say so"""


class Flight:
    """One request between its admission and its last token.

    Its prompts count as queued from admission until the first of them has a token.
    """

    def __init__(self, admission: Admission, prompts: int, timeout_s: float):
        self.admission = admission
        self.prompts = prompts
        self.tokens = 0
        self.image_bytes = 0
        self.is_queued = True
        self.error: WinnowError = ApiError(504, "the request took too long", type="server_error", code="timeout")
        self.deadline = asyncio.get_running_loop().time() + timeout_s
        self._timeout: asyncio.Timeout | None = None

    def take(self, tokens: int) -> None:
        """Queues the prompts' tokens; the last number counts.

        Raises
            Overloaded
        """
        others = self.admission.queued_tokens - self.tokens
        if others and others + tokens > self.admission.max_tokens:
            raise Overloaded(f"{others} prompt tokens are waiting already", RETRY_FULL_S)
        self.tokens = tokens

    def hold(self, image_bytes: int) -> None:
        """Queues more of its images, as they were sent or as the model takes them.

        Raises
            Overloaded
        """
        others = self.admission.queued_image_bytes - self.image_bytes
        if others and others + self.image_bytes + image_bytes > self.admission.max_image_bytes:
            raise Overloaded(f"{others} bytes of images are waiting already", RETRY_FULL_S)
        self.image_bytes += image_bytes

    def leave_queue(self) -> None:
        self.is_queued = False

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """Waits until the deadline, or until the request is cut; then raises `error`."""
        try:
            async with asyncio.timeout_at(self.deadline) as self._timeout:
                return await awaitable
        except TimeoutError as late:
            if self._timeout is not None and self._timeout.expired():
                raise self.error from late
            raise
        finally:
            self._timeout = None

    def cut(self, error: WinnowError) -> None:
        """Ends the request's waiting, now and from now on."""
        self.error = error
        self.deadline = asyncio.get_running_loop().time()
        if self._timeout is not None:
            self._timeout.reschedule(self.deadline)


class Admission:
    def __init__(self, settings: Settings):
        self.max_requests = settings.max_queue_requests
        self.max_tokens = settings.max_queue_tokens
        self.max_image_bytes = settings.max_queue_image_bytes
        self.timeout_s = settings.request_timeout_s
        self.flights: set[Flight] = set()
        self.is_draining = False
        self._landed = asyncio.Event()

    @property
    def queued_requests(self) -> int:
        return sum(flight.prompts for flight in self.flights if flight.is_queued)

    @property
    def queued_tokens(self) -> int:
        return sum(flight.tokens for flight in self.flights if flight.is_queued)

    @property
    def queued_image_bytes(self) -> int:
        return sum(flight.image_bytes for flight in self.flights if flight.is_queued)

    @contextmanager
    def board(self, prompts: int) -> Iterator[Flight]:
        """A request's stay.

        Raises
            Overloaded
        """
        if self.is_draining:
            raise Overloaded("the server is shutting down", RETRY_DRAINING_S)
        waiting = self.queued_requests
        if waiting and waiting + prompts > self.max_requests:
            raise Overloaded(f"{waiting} requests are waiting already", RETRY_FULL_S)
        flight = Flight(self, prompts, self.timeout_s)
        self.flights.add(flight)
        try:
            yield flight
        finally:
            self.flights.discard(flight)
            self._landed.set()

    async def drain(self, seconds: float) -> None:
        """Admits nothing more, lets what runs finish for a while, then cuts the rest and waits until they are gone."""
        self.is_draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._all_landed()
        except TimeoutError:
            self.cut_all()
            with suppress(TimeoutError):  # who does not read his answer is not waited for
                async with asyncio.timeout(LANDING_S):
                    await self._all_landed()

    def cut_all(self) -> None:
        for flight in self.flights:
            flight.cut(Overloaded("the server shut down before the answer was complete", RETRY_DRAINING_S))

    async def _all_landed(self) -> None:
        while self.flights:
            self._landed.clear()
            await self._landed.wait()
