"""`winnow serve` in a process of its own, for as long as it is measured."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from client import BenchError, Client

START_S = 300
STOP_S = 30


@contextmanager
def winnow(name: str, **settings: str | float | bool) -> Iterator[str]:
    """The URL of a server on a free loopback port that is ready; stopped by SIGTERM at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "winnow.server.cli", "serve", "--port", str(port), "--log-level", "warning"]
    for key, value in settings.items():
        option = key.replace("_", "-")
        command += (
            [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}={value}"]
        )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WINNOW_")}
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(name, process, url, log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(name: str, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"the server {name} did not start:\n{log.read_text(errors='replace')[-2000:]}")
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def metric(text: str, name: str) -> float:
    """The value of a metric that has one sample, out of what /metrics says; 0 where it is missing."""
    found = re.search(rf"^winnow:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def arena_gib(client: Client, requests: int, tokens: int) -> float:
    """Memory that holds so many uncompressed requests of `tokens` tokens, with a page to spare in each of their
    lanes, as the server says that pages are."""
    kv = client.get("/v1/models").json()["data"][0]["kv"]
    pages = -(-tokens // kv["page_tokens"]) + 1
    return float(requests * pages * kv["layers"] * kv["kv_heads"] * kv["page_bytes"]) / 2**30
