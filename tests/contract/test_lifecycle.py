"""Signals, and an engine that dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from winnow.engine.models.files import resolve_model

from .serving import KEY, PATIENCE_S, serving

SMALL = ("--kv-memory-gib", "0.5")
BODY: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 120, "ignore_eos": True, "stream": True}


def read_first(response: httpx.Response) -> Any:
    """The stream's lines, the first of them read."""
    lines = response.iter_lines()
    assert next(lines).startswith("data: ")
    return lines


def test_sigterm_lets_requests_finish(tmp_path: Path) -> None:
    with serving(tmp_path, *SMALL) as server, server.http() as http:
        with http.stream("POST", "/v1/completions", json=BODY) as response:
            lines = read_first(response)
            server.process.send_signal(signal.SIGTERM)
            server.until(lambda: not server.is_ready())
            assert http.get("/live").status_code == 200
            refused = http.post("/v1/completions", json=BODY)
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
        assert server.process.wait(PATIENCE_S) == 0


def test_sigterm_cuts_what_takes_too_long(tmp_path: Path) -> None:
    with serving(tmp_path, *SMALL, "--drain-s", "0.2") as server, server.http() as http:
        with http.stream("POST", "/v1/completions", json=BODY | {"max_tokens": 4000}) as response:
            lines = read_first(response)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert '"code":"overloaded"' in rest[-1]
        assert server.process.wait(PATIENCE_S) == 0


def test_an_engine_that_dies_comes_back(tmp_path: Path) -> None:
    with serving(tmp_path, *SMALL) as server:
        with server.http() as http:
            with http.stream("POST", "/v1/completions", json=BODY | {"max_tokens": 4000}) as response:
                lines = read_first(response)
                (engine,) = server.engine_pids()
                os.kill(engine, signal.SIGKILL)
                rest = [line for line in lines if line]
            assert '"code":"engine_died"' in rest[-1]
            assert http.get("/live").status_code == 200
        with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            if not server.is_ready():
                with pytest.raises(openai.InternalServerError):
                    client.completions.create(model="default", prompt="x")
            server.until(server.is_ready)
            assert client.completions.create(model="default", prompt="Hello", max_tokens=2).choices[0].text
        assert server.metric("engine_restarts_total") == 1


def test_a_model_that_does_not_load(tmp_path: Path) -> None:
    """A file that was cut short: the server says so and ends."""
    import subprocess
    import sys

    short = tmp_path / "short.gguf"
    with resolve_model("default").open("rb") as whole, short.open("wb") as part:
        part.write(whole.read(20 << 20))
    command = [sys.executable, "-m", "winnow.server.cli", "serve", "--port", "0", "--model", str(short)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 2
    assert "winnow: " in result.stderr
