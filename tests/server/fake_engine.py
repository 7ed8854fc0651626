"""A scripted stand-in for `winnow.engine.client.EngineClient`: no process, no model, the tokens that a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import msgspec

from winnow.engine.messages import (
    CompressionReport,
    EngineInfo,
    EngineStats,
    Output,
    Shorten,
    Shortened,
    Submit,
    TokenLogprob,
)
from winnow.engine.models.tokenizer import Tokenizer

REPORT = CompressionReport(
    tokens_seen=100,
    tokens_kept_min=20,
    tokens_kept_mean=25.5,
    tokens_kept_max=40,
    bytes_uncompressed=1000,
    bytes_held=255,
)
INFO = EngineInfo(
    model="scripted",
    max_model_len=2048,
    vocab_size=49152,
    layers=30,
    kv_heads=3,
    head_dim=64,
    compute_format="f32",
    page_bytes=8192,
    page_tokens=16,
    total_pages=1000,
    weights="int8",
)


class FakeEngine:
    """Says `reply` to every prompt, a token an output, whatever `max_tokens` and stop tokens allow. Under a plan's
    `vision` it reads half of the placeholders.

    `error_after` tokens it raises `error`; `pause_after` tokens it waits until `go_on()`.
    """

    def __init__(self, tokenizer: Tokenizer, reply: str | list[int] = "The capital of France is Paris."):
        self.tokenizer = tokenizer
        self.reply = tokenizer.encode(reply, False) if isinstance(reply, str) else reply
        self.info: EngineInfo | None = INFO
        self.stats = EngineStats(running=1, waiting=2, pages_free=600, pages_cached=100, pages_total=1000)
        self.is_ready = True
        self.heartbeat_age_s = 0.1
        self.restarts = 0
        self.failed: asyncio.Future[Exception] | None = None
        self.error: Exception | None = None
        self.error_after = 0
        self.pause_after: int | None = None
        self.tokens_per_output = 1
        self.cached_tokens = 0
        self.accepted_tokens = self.rejected_tokens = 0
        self.submits: list[Submit] = []
        self.shortens: list[Shorten] = []
        self.finished: list[tuple[str, int]] = []
        self.aborted: list[str] = []
        self.paused = asyncio.Event()
        """A request waits for `go_on()`"""
        self._go = asyncio.Event()
        self.calls: list[str] = []

    async def start(self) -> None:
        self.calls.append("start")
        self.failed = asyncio.get_running_loop().create_future()

    async def stop(self, drain_s: float) -> None:
        self.calls.append("stop")

    def go_on(self) -> None:
        self._go.set()

    def finish(self, request_id: str, index: int) -> None:
        self.finished.append((request_id, index))

    async def shorten(self, request: Shorten) -> Shortened:
        """Drops the first token of each part."""
        self.shortens.append(request)
        if self.error is not None:
            raise self.error
        dropped = {part.first for part in request.parts}
        tokens = sum(len(part.ends) for part in request.parts)
        left = [token for i, token in enumerate(request.prompt) if i not in dropped]
        return Shortened(request.request_id, left, tokens, tokens - len(dropped))

    async def generate(self, submit: Submit) -> AsyncGenerator[Output, None]:
        self.submits.append(submit)
        open_choices = set(range(submit.sampling.n))
        at = 0
        try:
            while open_choices:
                if self.pause_after is not None and at >= self.pause_after and not self._go.is_set():
                    self.paused.set()
                    await self._go.wait()
                if self.error is not None and at >= self.error_after:
                    open_choices.clear()
                    raise self.error
                await asyncio.sleep(0)
                for index in sorted(open_choices):
                    output = self._output(submit, index, at)
                    if output.finish_reason is not None:
                        open_choices.discard(index)
                    yield output
                at += self.tokens_per_output
        finally:
            if open_choices:
                self.aborted.append(submit.request_id)

    def _output(self, submit: Submit, index: int, at: int) -> Output:
        sampling = submit.sampling
        tokens = self.reply[at : at + self.tokens_per_output][: sampling.max_tokens - at]
        reason, stop_token = None, None
        if (submit.request_id, index) in self.finished:
            tokens, reason = [], "stop"
        else:
            ends = [i for i, token in enumerate(tokens) if token in sampling.stop_token_ids]
            if ends:
                tokens, reason, stop_token = tokens[: ends[0] + 1], "stop", tokens[ends[0]]
            elif at + len(tokens) >= min(sampling.max_tokens, len(self.reply)):
                reason = "length"
        return Output(
            request_id=submit.request_id,
            index=index,
            token_ids=tokens,
            logprobs=self._logprobs(tokens, sampling.logprobs),
            finish_reason=reason,
            stop_token=stop_token,
            cached_tokens=self.cached_tokens if reason else 0,
            accepted_tokens=self.accepted_tokens if reason else 0,
            rejected_tokens=self.rejected_tokens if reason else 0,
            compression=self._report(submit) if reason else None,
        )

    def _report(self, submit: Submit) -> CompressionReport:
        is_found = 0 < submit.document <= self.cached_tokens
        seen = sum(token in (self.info or INFO).sees.values() for token in submit.prompt)
        return msgspec.structs.replace(
            REPORT,
            document_tokens=submit.document,
            found_document=is_found,
            image_tokens=seen,
            image_tokens_kept=seen // 2 if "vision" in submit.plan else seen,
        )

    @staticmethod
    def _logprobs(tokens: list[int], top: int | None) -> list[TokenLogprob] | None:
        if top is None:
            return None
        return [TokenLogprob(-0.5, 1, [(token + i, -0.5 - i) for i in range(top)]) for token in tokens]
