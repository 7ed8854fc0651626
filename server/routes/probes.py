"""What machines ask: /live, /ready, /health, /metrics, /version."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from winnow.server import __version__
from winnow.server.errors import ApiError
from winnow.server.protocol.responses import Status, Version
from winnow.server.service import Service, service_of

router = APIRouter()
Served = Annotated[Service, Depends(service_of)]


@router.get("/live", summary="Is the process worth keeping?")
async def live(service: Served) -> Status:
    """The event loop turns (or there is no answer) and the engine's heartbeat is fresh."""
    return _status(service.is_alive, "live", "the engine is not heard any more")


@router.get("/ready", summary="Should requests come here?")
async def ready(service: Served) -> Status:
    """The model is loaded, the engine is heard and the server is not shutting down."""
    why = "the server is shutting down" if service.admission.is_draining else "the engine is not ready"
    return _status(service.is_ready, "ready", why)


@router.get("/health", summary="Does the engine work?")
async def health(service: Served) -> Status:
    """As vLLM's: also true while the server finishes its last requests."""
    return _status(service.client.is_ready and service.is_alive, "ok", "the engine is not ready")


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(service: Served) -> Response:
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/version", summary="The server's version")
async def version() -> Version:
    return Version(version=__version__)


def _status(is_fine: bool, word: str, why_not: str) -> Status:
    if not is_fine:
        raise ApiError(503, why_not, type="service_unavailable_error", code="not_ready", headers={"Retry-After": "5"})
    return Status(status=word)
