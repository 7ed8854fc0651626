"""One ASGI call under a test's control: read what is sent while it is sent, go away when you like."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import FastAPI


class Call:
    def __init__(self, app: FastAPI, path: str, body: dict[str, Any]):
        raw = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
            "scheme": "http",
            "client": ("127.0.0.1", 1),
            "server": ("w", 80),
            "root_path": "",
        }
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.inbox.put_nowait({"type": "http.request", "body": raw, "more_body": False})
        self.sent: list[dict[str, Any]] = []
        self.news = asyncio.Event()
        self.task = asyncio.create_task(app(scope, self.inbox.get, self._send))  # type: ignore[arg-type]

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        self.news.set()

    def disconnect(self) -> None:
        self.inbox.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    async def until(self, text: str) -> None:
        """Waits until it was sent."""
        while text not in self.text:
            self.news.clear()
            await asyncio.wait_for(self.news.wait(), 10)

    async def end(self) -> None:
        await asyncio.wait_for(self.task, 10)
