from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from ..prompt.encoders import random_classifier, random_sentence_encoder
from .serving import KEY, PATIENCE_S, Serving, serving


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An XLM-RoBERTa for token classification, as LLMLingua-2 is published, with random weights."""
    return random_classifier("xlm-roberta", tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, classifier: Path) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("server")
    options = ["--kv-memory-gib", "1"]
    options += ["--embedding-model", str(random_sentence_encoder(folder / "sentences"))]
    options += ["--llmlingua2-model", str(classifier)]
    with serving(folder, *options) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE_S) as openai:
        yield openai
