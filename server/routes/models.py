"""GET /v1/models: what is served, and every word that a plan may use."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from winnow.server.models import Models, models_of
from winnow.server.service import Service

router = APIRouter()


@router.get("/v1/models", summary="The models, with their compression")
async def list_models(models: Annotated[Models, Depends(models_of)]) -> dict[str, Any]:
    return {"object": "list", "data": [_card(service, name) for name, service in models.by_name.items()]}


@router.get("/v1/models/{model:path}", summary="One model")
async def get_model(model: str, models: Annotated[Models, Depends(models_of)]) -> dict[str, Any]:
    return _card(*models.choose(model))


def _card(service: Service, name: str) -> dict[str, Any]:
    """OpenAI's fields, vLLM's `max_model_len`, and ours; `sees` is what the model reads beside text. Facts of
    the engine are null while it is not up."""
    info = service.client.info
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "winnow",
        "root": service.name,
        "parent": None,
        "max_model_len": info.max_model_len if info else None,
        "max_stream_len": info.max_stream_len if info else None,
        "draft_max_len": info.draft_max_len if info else None,
        "sees": list(info.sees) if info else None,
        "device": service.settings.device,
        "weights": service.settings.weights,
        "kv": info
        and {
            "layers": info.layers,
            "kv_heads": info.kv_heads,
            "head_dim": info.head_dim,
            "compute_format": info.compute_format,
            "page_bytes": info.page_bytes,
            "page_tokens": info.page_tokens,
            "total_pages": info.total_pages,
        },
        "compression": service.plans.catalogue_of(info),
        "speculative": service.speculations.catalogue,
    }
