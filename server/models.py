"""The models of this server, each with an engine process of its own, and which of them a request is for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import Request

from winnow.server.errors import ApiError
from winnow.server.metrics import Metrics
from winnow.server.service import Service
from winnow.server.settings import Settings, SettingsError

POLL_S = 0.1
"""How often an engine is asked whether its model is loaded"""


class Models:
    """
    Raises
        SettingsError: two models have a name in common
    """

    def __init__(self, settings: Settings, services: Sequence[Service], metrics: Metrics):
        """`services`: the first is asked where a request names no model (but see `choose`)."""
        self.settings = settings
        self.services = services
        self.metrics = metrics
        self.by_name: dict[str, Service] = {}
        self._starting: asyncio.Task[None] | None = None
        for service in services:
            for name in service.settings.model_names:
                if self.by_name.setdefault(name, service) is not service:
                    raise SettingsError(f"two models are called {name}; vision_model_name gives one of them another")

    def choose(self, asked: str | None, with_images: bool = False) -> tuple[Service, str]:
        """Who answers a request, and the name to answer with. Where no name is given that is the first model, of a
        request with images or videos the first one that sees.

        Raises
            ApiError: 404
        """
        if asked is None:
            seeing = (service for service in self.services if service.images is not None or not with_images)
            service = next(seeing, self.services[0])
            return service, service.name
        if asked not in self.by_name:
            message = f"this server has no such model; it has {', '.join(self.by_name)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.by_name[asked], asked

    # Their engines ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to start the engines and returns; `is_ready` tells when all models are loaded."""
        self._starting = asyncio.create_task(self._start_engines(), name="start engines")

    async def _start_engines(self) -> None:
        """On a GPU one by one, the first model's last: it takes what the others leave of `memory_utilization`."""
        for service in reversed(self.services):
            await service.client.start()
            while self.settings.device == "cuda" and not (service.client.is_ready or has_failed(service)):
                await asyncio.sleep(POLL_S)

    async def failure(self) -> Exception:
        """Waits for an engine that can never start."""
        assert self._starting is not None
        await self._starting
        futures = [service.client.failed for service in self.services if service.client.failed is not None]
        done, _ = await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()

    async def drain(self, seconds: float) -> None:
        """Admits nothing more, and returns when no request runs (see Admission.drain)."""
        await asyncio.gather(*(service.admission.drain(seconds) for service in self.services))

    def cut_all(self) -> None:
        for service in self.services:
            service.admission.cut_all()

    async def stop(self) -> None:
        """Cuts what still runs; a server that drains has done so before (see lifecycle.py)."""
        if self._starting is not None:
            self._starting.cancel()
        await asyncio.gather(*(service.stop() for service in self.services))

    @property
    def is_alive(self) -> bool:
        return all(service.is_alive for service in self.services)

    @property
    def are_up(self) -> bool:
        """Whether every engine has its model loaded."""
        return all(service.client.is_ready for service in self.services)

    @property
    def is_ready(self) -> bool:
        return all(service.is_ready for service in self.services)

    @property
    def is_draining(self) -> bool:
        return any(service.admission.is_draining for service in self.services)

    @property
    def running(self) -> int:
        """Requests under way."""
        return sum(len(service.admission.flights) for service in self.services)


def has_failed(service: Service) -> bool:
    return service.client.failed is not None and service.client.failed.done()


async def models_of(request: Request) -> Models:
    """A dependency; a plain function would be called in a thread."""
    models: Models = request.app.state.models
    return models
