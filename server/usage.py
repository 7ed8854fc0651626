"""What a request used: tokens, and memory as measured by the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from winnow.engine.messages import CompressionReport, Shortened


@dataclass
class Usage:
    """Totals of one request.

    `compression` counts every choice of every prompt: each of its numbers is the sum over these `sequences`, so that
    tokens_kept.mean / tokens_seen is the share of the context that was kept and bytes_held / bytes_uncompressed that of
    the memory. A page that several sequences share counts once for each of them. `read` is there under a plan that lets
    generated tokens read a part: bytes that one reads on average, and would with no such plan. Such a plan frees
    nothing: bytes_held does not fall for it, and grows by what is kept to choose by. `document` is there where one was
    compressed apart: its tokens, and those of them that did not have to be, since an earlier request had.

    `prompt_tokens` is what the model read: of a prompt that was shortened, what was left of it. Those that stand for
    images are all counted; `image_tokens_kept` says how many of them were read.
    """

    plan: dict[str, Any] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    """Of prompt_tokens, those that stand for images and videos"""
    image_tokens_kept: int = 0
    """Of these, what the plan's `vision` left for the model to read"""
    speculates: bool = False
    accepted_tokens: int = 0
    rejected_tokens: int = 0
    """Guessed and not said; unlike OpenAI's they are no part of completion_tokens"""
    reports: list[CompressionReport] = field(default_factory=list)
    shortened: list[tuple[int, Shortened]] = field(default_factory=list)
    """Of each prompt that was shortened: its tokens before, and what was left"""

    def as_dict(self) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens} | self._images(),
        }
        if self.speculates:
            usage["completion_tokens_details"] = {
                "accepted_prediction_tokens": self.accepted_tokens,
                "rejected_prediction_tokens": self.rejected_tokens,
            }
        if self.reports:
            usage["compression"] = self.compression(self.reports)
        return usage

    def _images(self) -> dict[str, int]:
        if not self.image_tokens:
            return {}
        return {"image_tokens": self.image_tokens, "image_tokens_kept": self.image_tokens_kept}

    def compression(self, reports: list[CompressionReport]) -> dict[str, Any]:
        """`usage.compression` of some sequences; also what the last chunk of a stream says of its choice."""
        prompt = {"prompt": _prompt(self.shortened)} if self.shortened else {}
        return _kept(self.plan, reports) | prompt


def _prompt(shortened: list[tuple[int, Shortened]]) -> dict[str, Any]:
    """Tokens of the prompts before and after they were shortened, and of what was marked in them."""
    return {
        "tokens_before": sum(before for before, _ in shortened),
        "tokens_after": sum(len(left.prompt) for _, left in shortened),
        "context_before": sum(left.context_tokens for _, left in shortened),
        "context_after": sum(left.context_kept for _, left in shortened),
    }


def _kept(plan: dict[str, Any] | None, reports: list[CompressionReport]) -> dict[str, Any]:
    said: dict[str, Any] = {
        "plan": plan,
        "sequences": len(reports),
        "squeezed": sum(report.squeezed_at is not None for report in reports),
        "tokens_seen": sum(report.tokens_seen for report in reports),
        "tokens_kept": {
            "min": sum(report.tokens_kept_min for report in reports),
            "mean": round(sum(report.tokens_kept_mean for report in reports), 3),
            "max": sum(report.tokens_kept_max for report in reports),
        },
        "bytes_uncompressed": sum(report.bytes_uncompressed for report in reports),
        "bytes_held": sum(report.bytes_held for report in reports),
    }
    if any(report.document_tokens for report in reports):
        said["document"] = {
            "tokens": sum(report.document_tokens for report in reports),
            "reused": sum(report.document_tokens for report in reports if report.found_document),
        }
    if formats := sorted({fmt for report in reports for fmt in report.tokens_by_format}):
        said["tokens_by_format"] = {
            fmt: round(sum(report.tokens_by_format.get(fmt, 0.0) for report in reports), 3) for fmt in formats
        }
    if tokens := sum(report.tokens_read for report in reports):
        said["read"] = {
            "tokens": tokens,
            "bytes_per_token": round(sum(report.bytes_read for report in reports) / tokens),
            "bytes_per_token_dense": round(sum(report.bytes_read_dense for report in reports) / tokens),
        }
    return said
