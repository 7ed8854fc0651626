"""Requests made from our own OpenAPI page, good and bad ones: no answer is a 5xx, and errors have OpenAI's shape."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from winnow.engine.compression.registry import EVICTION
from winnow.engine.compression.vision.registry import VISION
from winnow.engine.models.tokenizer import load_tokenizer
from winnow.server.app import create_app
from winnow.server.protocol.responses import ErrorBody
from winnow.server.settings import load

from .fake_engine import FakeEngine

URLS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
FEW = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def schema() -> Any:
    tokenizer = load_tokenizer("default")
    app = create_app(load(), (FakeEngine(tokenizer), tokenizer))

    async def running(scope: Any, receive: Any, send: Any) -> None:
        """The application without its start and stop, which schemathesis would run around every request."""
        assert scope["type"] == "http"
        await app(scope, receive, send)

    return schemathesis.openapi.from_asgi("/openapi.json", running)


def test_plans_are_described(schema: Any) -> None:
    components = schema.raw_schema["components"]["schemas"]
    for request in ("ChatRequest", "CompletionRequest"):
        name, plan = components[request]["properties"]["compression"]["anyOf"]
        assert name == {"type": "string"}
        assert "kv" in plan["properties"]
    for name in EVICTION:
        assert f"Evict_{name}" in components
    for name in VISION:
        assert f"Vision_{name}" in components


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("url", URLS)
def test_no_request_breaks_the_server(schema: Any, url: str, mode: GenerationMode) -> None:
    operation = schema[url]["POST"]

    @FEW
    @given(st.data())
    def each(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        answer = case.call()
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            ErrorBody.model_validate(answer.json())

    each()
