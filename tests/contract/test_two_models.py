"""Two models in one server: an engine process each, and one that dies takes nothing from the other."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from .serving import serving

TWO = ("--kv-memory-gib", "0.5", "--vision-model", "default", "--vision-model-name", "second")
TWO += ("--vision-memory-gib", "0.25", "--vision-weights", "f32")
BODY: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


def test_each_has_an_engine(tmp_path: Path) -> None:
    with serving(tmp_path, *TWO) as server, server.http() as http:

        def texts() -> list[str]:
            answers = [http.post("/v1/completions", json=BODY | {"model": name}) for name in ("default", "second")]
            return [answer.raise_for_status().json()["choices"][0]["text"] for answer in answers]

        first, second = (http.get(f"/v1/models/{name}").json() for name in ("default", "second"))
        assert (first["weights"], second["weights"]) == ("int8", "f32")
        assert first["kv"]["total_pages"] == 2 * second["kv"]["total_pages"]
        said = texts()
        assert all(said)

        pids = server.engine_pids()
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGKILL)
        server.until(lambda: not server.is_ready())
        names = (first["root"], second["root"])
        up = next(name for name in names if server.metric("engine_ready", model_name=name))
        assert http.post("/v1/completions", json=BODY | {"model": up}).status_code == 200
        down = next(name for name in names if name != up)
        refused = http.post("/v1/completions", json=BODY | {"model": down})
        assert refused.status_code == 503
        server.until(server.is_ready)
        assert texts() == said
        restarts = {name: server.metric("engine_restarts_total", model_name=name) for name in names}
        assert restarts == {up: 0, down: 1}
