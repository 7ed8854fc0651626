"""A real server in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

KEY = "contract-key"
PATIENCE_S = 120
HTTP_ONLY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Without certificates: a client that reads them takes longer to make than a request to send"""


@dataclass
class Serving:
    process: subprocess.Popen[bytes]
    url: str
    log: Path
    patience_s: float = PATIENCE_S

    def http(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE_S, verify=HTTP_ONLY)

    def metric(self, name: str, **labels: str) -> float:
        """A metric that has one sample with these labels."""
        with self.http() as http:
            text = http.get("/metrics").raise_for_status().text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        (value,) = (
            sample.value
            for sample in samples
            if sample.name == f"winnow:{name}" and labels.items() <= sample.labels.items()
        )
        return value

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", verify=HTTP_ONLY).status_code == 200
        except httpx.TransportError:
            return False

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for what must come."""
        deadline = time.monotonic() + self.patience_s
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def until_idle(self) -> None:
        """No sequence runs or waits, and no page is held."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        self.until(lambda: not any(self.metric(name) for name in names))

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def engine_pids(self) -> list[int]:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if "engine.process" in Path(f"/proc/{child}/cmdline").read_text()]


@contextmanager
def serving(
    folder: Path, *options: str, python: str = sys.executable, patience_s: float = PATIENCE_S, **variables: str
) -> Iterator[Serving]:
    """A server of the default model that is ready; ended by SIGTERM, if it still runs, with status 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    command = [python, "-m", "winnow.server.cli", "serve", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WINNOW_")}
    environment |= {"WINNOW_API_KEY": f"other,{KEY}", "OMP_WAIT_POLICY": "passive"} | variables
    with (
        log.open("wb") as output,
        subprocess.Popen([*command, *options], stdout=output, stderr=output, env=environment) as process,
    ):
        try:
            server = Serving(process, f"http://127.0.0.1:{port}", log, patience_s)
            server.until(server.is_ready)
            yield server
            if process.poll() is None:
                assert server.terminate() == 0, log.read_text()
            assert "Traceback" not in log.read_text()
            assert "unexpected" not in log.read_text()
        finally:
            process.kill()
