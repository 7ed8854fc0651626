from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from ..prompt.encoders import random_classifier, random_sentence_encoder
from .serving import KEY, PATIENCE_S, Serving, serving


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("server")
    options = ["--kv-memory-gib", "1"]
    options += ["--embedding-model", str(random_sentence_encoder(folder / "sentences"))]
    options += ["--llmlingua2-model", str(random_classifier("bert", folder / "classifier"))]
    with serving(folder, *options) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE_S) as openai:
        yield openai
