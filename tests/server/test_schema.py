"""Requests made from our own OpenAPI page, good ones and bad ones: no answer is a 5xx, each error has OpenAI's shape."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error

from winnow.engine.models.tokenizer import load_tokenizer
from winnow.server.app import create_app
from winnow.server.protocol.responses import ErrorBody
from winnow.server.settings import load

from .fake_engine import FakeEngine


@pytest.fixture(scope="module")
def api() -> Any:
    app: FastAPI = create_app(load(), FakeEngine(load_tokenizer("default")))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
def test_no_request_breaks_the_server(case: Any) -> None:
    answer = case.call()
    case.validate_response(answer, checks=[not_a_server_error])
    if answer.status_code >= 400:
        ErrorBody.model_validate(answer.json())
