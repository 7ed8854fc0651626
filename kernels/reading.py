"""What a sequence's decode rows read of its lanes: the rule that a plan makes, and what is kept between rows.

A rule says for every layer whether a row reads all, and how it chooses otherwise:

    protected = the lane's first `sinks` tokens and its newest `recent`
    candidates = the others: tokens, or the full pages that hold no protected token
    logit(candidate) = scale · q·K over some channels, or a bound of it for a page
    vote(candidate) = Σ softmax over the candidates of logit, over the query heads that vote together
    choice = protected + the candidates of the highest votes, up to `tokens` tokens

A choice is a mask: the row attends to the tokens it names as if no others were there, and touches no page without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from winnow.kernels.host import to_device


class ReadMode(IntEnum):
    """What a row does in a layer. The values are those of kernels/cpu/kernels.h."""

    ALL = 0
    ALL_AND_CHOOSE = 1
    """Reads all, and chooses for the layers that follow"""
    CHOSEN = 2
    """Chooses, then reads what it chose"""
    CHOSEN_BEFORE = 3
    """Reads what it chose in the last layer where it did"""


NEVER_SIMILAR = 2.0
"""A `similarity` that no cosine reaches: every row chooses anew"""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ReadRule:
    """How the rows of a sequence choose; made once for each plan. Its tensors are in host memory."""

    modes: Tensor
    """[layers] uint8: `ReadMode`"""
    tokens: int
    """Tokens that are chosen beside the protected ones; whole pages, where pages are, until they hold as many"""
    share: float = 0.0
    """In place of `tokens` where it is positive: this part of the tokens that the row sees, at least one"""
    sinks: int = 0
    recent: int = 1
    """The row's own token is always read"""
    channels: Tensor | None = None
    """[layers, kv_heads, n] int32: candidates are tokens, judged by these channels; None: pages, judged by bounds"""
    votes_by_layer: bool = False
    """All query heads of a layer choose the same tokens, instead of those of each lane theirs"""
    pool: int = 1
    """A token's vote is the highest of so many neighbours', itself included; odd"""
    similarity: float = NEVER_SIMILAR
    """A row whose queries' cosine to those of the last choice reaches this takes that choice over"""

    @property
    def by_bounds(self) -> bool:
        return self.channels is None

    @property
    def reuses(self) -> bool:
        """A row may take over what an earlier one chose: what was read cannot be taken back."""
        return self.similarity <= 1

    def __post_init__(self) -> None:
        if self.modes.dtype != torch.uint8 or self.modes.dim() != 1 or int(self.modes.max()) > max(ReadMode):
            raise ValueError("modes must be uint8 [layers]")
        choosing = (self.modes == ReadMode.CHOSEN) | (self.modes == ReadMode.ALL_AND_CHOOSE)
        if bool(((self.modes == ReadMode.CHOSEN_BEFORE) & ~choosing.int().cummax(0).values.bool()).any()):
            raise ValueError("a layer reads what was chosen before any layer chose")
        if self.tokens < 1 or self.sinks < 0 or self.recent < 1 or self.pool % 2 == 0:
            raise ValueError("a rule needs at least one token, the newest one, and an odd pool")
        if self.reuses and (not self.votes_by_layer or self.by_bounds):
            raise ValueError("choices are kept between rows where all heads choose the same tokens")
        if self.channels is not None and (self.channels.dtype != torch.int32 or not self.channels.is_contiguous()):
            raise ValueError("channels must be contiguous int32 [layers, kv_heads, n]")


@dataclass(slots=True)
class ReadState:
    """What a sequence that reads by a rule keeps from step to step, in the memory of its pages' device. It begins empty
    at the end of the prompt."""

    rule: ReadRule
    touched: Tensor
    """[3] int64: bytes that its rows read, bytes that reading all would have taken, rows"""
    touched_before: Tensor
    """The same without the rows of the newest step"""
    bounds: Tensor | None
    """[layers, kv_heads, pages, 2, D] bf16: least and greatest key channel of the lane's pages in a float format, from
    the first of them on, rounded outward. Sealed pages in a quantized format have them in their scales."""
    bounded: Tensor
    """[layers, kv_heads] int32: how many pages have bounds"""
    anchors: Tensor | None
    """[layers, q_heads, D] f32: the queries of the last choice"""
    anchored: Tensor
    """[layers] int32: tokens that were seen then; 0 before the first choice"""
    anchor_choice: Tensor | None
    """[layers, tokens] uint8: what was chosen then, protected tokens aside"""

    @classmethod
    def empty(
        cls,
        rule: ReadRule,
        layers: int,
        kv_heads: int,
        q_heads: int,
        head_dim: int,
        device: torch.device | None = None,
    ) -> ReadState:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            rule=rule,
            touched=zeros(3, dtype=torch.int64),
            touched_before=zeros(3, dtype=torch.int64),
            bounds=zeros(layers, kv_heads, 0, 2, head_dim, dtype=torch.bfloat16) if rule.by_bounds else None,
            bounded=zeros(layers, kv_heads, dtype=torch.int32),
            anchors=zeros(layers, q_heads, head_dim, dtype=torch.float32) if rule.reuses else None,
            anchored=zeros(layers, dtype=torch.int32),
            anchor_choice=zeros(layers, 0, dtype=torch.uint8) if rule.reuses else None,
        )

    @property
    def nbytes(self) -> int:
        """Counters aside."""
        kept = (self.bounds, self.anchors, self.anchor_choice)
        return sum(part.nbytes for part in kept if part is not None)

    @staticmethod
    def size(rule: ReadRule, layers: int, kv_heads: int, q_heads: int, head_dim: int, tokens: int, pages: int) -> int:
        """`nbytes` of a state that has been resized to so many tokens and pages."""
        bounds = layers * kv_heads * pages * 2 * head_dim * 2 if rule.by_bounds else 0
        return bounds + (layers * (q_heads * head_dim * 4 + tokens) if rule.reuses else 0)

    def resize(self, tokens: int, pages: int) -> None:
        """Room for lanes of so many tokens, and pages to be bounded."""
        if self.bounds is not None:
            self.bounds = _resized(self.bounds, 2, pages)
        if self.anchor_choice is not None:
            self.anchor_choice = _resized(self.anchor_choice, 1, tokens)

    def begin_step(self) -> None:
        self.touched_before.copy_(self.touched)

    def forget_step(self) -> None:
        """Its rows were taken out of the lanes, and are not counted. What they chose is not forgotten."""
        self.touched.copy_(self.touched_before)

    def forget_pages(self) -> None:
        """The lanes' pages hold other tokens now: their bounds say nothing any more."""
        self.bounded.zero_()

    def forget_newest(self, pages: Tensor) -> None:
        """The lanes were cut: of their pages in a float format the first `pages` [layers, kv_heads] are as before."""
        torch.minimum(self.bounded, to_device(pages.clamp_min(0), self.bounded.device), out=self.bounded)


def _resized(part: Tensor, dim: int, size: int) -> Tensor:
    if part.shape[dim] == size:
        return part
    shape, known = list(part.shape), min(part.shape[dim], size)
    shape[dim] = size
    resized = part.new_zeros(shape)
    resized.narrow(dim, 0, known).copy_(part.narrow(dim, 0, known))
    return resized
