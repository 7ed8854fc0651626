"""A server with a draft model: the default model drafts for itself, so that its guesses are right."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ..models.checkpoints import random_model
from .serving import PATIENCE_S, Serving, serving

CONTEXT = "The harbour master counts the boats each morning and writes their names into a long green book. " * 12
DRAFT = {"method": "draft", "tokens": 4}


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    options = ("--kv-memory-gib", "0.5", "--draft-model", "default", "--draft-memory-gib", "0.5")
    with serving(tmp_path_factory.mktemp("drafting"), *options) as running:
        yield running


def ask(server: Serving, **body: Any) -> dict[str, Any]:
    with server.http() as http:
        answer: dict[str, Any] = http.post("/v1/completions", json={"max_tokens": 16} | body).raise_for_status().json()
    return answer


def test_answers_are_those_without_guesses(drafting: Serving) -> None:
    bodies = [
        {"prompt": CONTEXT[: 200 + 90 * i], "temperature": i % 2, "seed": i, "n": 1 + i % 2, "ignore_eos": True}
        for i in range(6)
    ]
    plain = [ask(drafting, **body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        guessed = list(pool.map(lambda body: ask(drafting, **body, speculative=DRAFT), bodies))
    for one, other in zip(plain, guessed, strict=True):
        assert [choice["text"] for choice in one["choices"]] == [choice["text"] for choice in other["choices"]]
        details = other["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] >= 12
        assert details["rejected_prediction_tokens"] == 0
    assert drafting.metric("spec_decode_num_accepted_tokens_total") >= 12 * len(bodies)
    drafting.until_idle()
    drafting.until(lambda: drafting.metric("draft_kv_cache_usage_perc") == 0)


def test_a_plan_that_looks_ahead(drafting: Serving) -> None:
    plan = {"kv": {"evict": {"policy": "spec_kv", "budget": 0.25, "lookahead": 8}, "format": "int8"}}
    answer = ask(drafting, prompt=CONTEXT, temperature=0, compression=plan)
    used = answer["usage"]["compression"]
    assert used["tokens_kept"]["max"] < 0.35 * used["tokens_seen"]
    assert used["bytes_held"] < 0.4 * used["bytes_uncompressed"]
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(ask, drafting, prompt=CONTEXT[:400], temperature=0) for _ in range(2)]
        again = ask(drafting, prompt=CONTEXT, temperature=0, compression=plan, speculative=DRAFT)
        for other in others:
            other.result()
    assert again["choices"] == answer["choices"]


@pytest.mark.parametrize("policy", ["spec_pc", "selective"])
def test_prompts_that_it_shortens(drafting: Serving, policy: str) -> None:
    body = {"prompt": CONTEXT + "\nWhat is green?", "context": [CONTEXT], "compression": {}}
    body["compression"] = {"prompt": {"policy": policy, "keep": 0.5}}
    used = ask(drafting, **body)["usage"]["compression"]["prompt"]
    assert 0 < used["context_after"] <= 0.5 * used["context_before"]


def test_a_model_of_other_tokens_ends_the_server(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    command = [sys.executable, "-m", "winnow.server.cli", "serve", "--port", "0", "--draft-model", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 2
    assert "its vocabulary has 160 tokens, and default 49152" in ended.stderr
