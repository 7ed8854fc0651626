from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from .serving import KEY, PATIENCE_S, Serving, serving


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("server"), "--kv-memory-gib", "1") as running:
        yield running


@pytest.fixture
def client(server: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE_S) as openai:
        yield openai
