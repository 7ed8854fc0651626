"""What machines ask: /live, /ready, /health, /metrics, /version."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from winnow.server import __version__
from winnow.server.errors import ApiError
from winnow.server.models import Models, models_of
from winnow.server.protocol.responses import Status, Version

router = APIRouter()
Served = Annotated[Models, Depends(models_of)]


@router.get("/live", summary="Is the process worth keeping?")
async def live(models: Served) -> Status:
    """The event loop turns (or there is no answer) and every engine's heartbeat is fresh."""
    return _status(models.is_alive, "live", "an engine is not heard any more")


@router.get("/ready", summary="Should requests come here?")
async def ready(models: Served) -> Status:
    """All models are loaded, their engines are heard and the server is not shutting down."""
    why = "the server is shutting down" if models.is_draining else "not every engine is ready"
    return _status(models.is_ready, "ready", why)


@router.get("/health", summary="Do the engines work?")
async def health(models: Served) -> Status:
    """As vLLM's: also true while the server finishes its last requests."""
    return _status(models.are_up and models.is_alive, "ok", "not every engine is ready")


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(models: Served) -> Response:
    return Response(generate_latest(models.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/version", summary="The server's version")
async def version() -> Version:
    return Version(version=__version__)


def _status(is_fine: bool, word: str, why_not: str) -> Status:
    if not is_fine:
        raise ApiError(503, why_not, type="service_unavailable_error", code="not_ready", headers={"Retry-After": "5"})
    return Status(status=word)
