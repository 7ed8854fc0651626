"""The decoder-only transformer of the Llama family: Llama, SmolLM, Mistral, Qwen2, Qwen3.

x = embed(tokens)
x = x + out(attention(rope(qkv(norm(x)))))         for each layer, K and V going to pages
x = x + down(silu(gate(norm(x))) * up(norm(x)))
logits = head(norm(x))

Where ranks share a model, `out` and `down` of each yield a part of a sum, and embedding and head know a part of the
vocabulary (see engine/ranks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.engine.models.config import ModelConfig
from winnow.engine.ranks import ALONE, Ranks
from winnow.kernels.bases import Rope
from winnow.kernels.dispatch import Backend, Weight
from winnow.kernels.kv import LaneBatch, PagedKV

Watch = Callable[[int, Tensor], None]
"""Is shown each layer's number and queries [T, heads, head_dim], rotated, when the layer's keys are in their pages"""


@dataclass(frozen=True, slots=True)
class Block:
    """The weights of one layer. The matrices that read the same input are one: qkv, gate_up."""

    attention_norm: Tensor
    qkv: Weight
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Weight
    mlp_norm: Tensor
    gate_up: Weight
    down: Weight
    window: int

    @property
    def nbytes(self) -> int:
        return self.qkv.nbytes + self.out.nbytes + self.gate_up.nbytes + self.down.nbytes


class Decoder:
    """A loaded model. Stateless: keys and values live in the pages that the caller passes."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Backend,
        embedding: Weight,
        blocks: list[Block],
        norm: Tensor,
        head: Weight,
        ranks: Ranks = ALONE,
    ):
        """`head` is `embedding` itself where the two are tied; `ranks` share the model, whose heads are this one's."""
        self.config = config
        self.ranks = ranks
        self._ops = ops
        self._embedding = embedding
        self._blocks = blocks
        self._norm = norm
        self._head = head
        self._scale = config.head_dim**-0.5
        self._cos, self._sin = (table.to(ops.device()) for table in rope_tables(config))
        sections = torch.tensor(config.rope_sections, dtype=torch.int64)
        self._axes = torch.arange(len(sections)).repeat_interleave(sections).to(ops.device())

    def with_ops(self, wrap: Callable[[Backend], Backend]) -> Decoder:
        """The same weights behind other operations, made of its own; they must read what those have packed."""
        ops = wrap(self._ops)
        return Decoder(self.config, ops, self._embedding, self._blocks, self._norm, self._head, self.ranks)

    @property
    def rope(self) -> Rope:
        """The tables that turn queries and keys."""
        return Rope(self._cos, self._sin, self.config.rope_factor)

    def turns(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [n, head_dim / 2] of rows whose positions have three axes, `places` [3, n] int64: each frequency
        has those of its own axis (M-RoPE, Qwen2-VL, arXiv:2409.12191)."""
        rows = places[self._axes].T  # [n, head_dim / 2]
        return self._cos.gather(0, rows), self._sin.gather(0, rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrices."""
        tables = {id(weight): weight.nbytes for weight in (self._embedding, self._head)}
        return sum(tables.values()) + sum(block.nbytes for block in self._blocks)

    def forward(self, tokens: Tensor, batch: LaneBatch, kv: PagedKV, rows: Tensor) -> Tensor:
        """One pass over the rows of a step; their keys and values are written to pages.

        Args:
            tokens: [T] int32, the rows of `batch`.
            rows: [R] int64, the rows whose logits are wanted. Both are on the backend's device.

        Returns:
            [R, vocab] float32 logits.
        """
        return self.logits(self.hidden(tokens, batch, kv, rows))

    def hidden(self, tokens: Tensor, batch: LaneBatch, kv: PagedKV, rows: Tensor, watch: Watch | None = None) -> Tensor:
        """`forward` up to the last norm: [R, hidden_size], of which `logits` makes logits."""
        return self.through(self.embed(tokens), range(self.config.layers), batch, kv, rows, watch)

    def embed(self, tokens: Tensor) -> Tensor:
        """[T] int32 -> [T, hidden_size]: what the first layer reads."""
        if self.ranks.size == 1:
            return self._ops.embed(tokens, self._embedding)
        place = tokens - self.ranks.rank * self._embedding.rows
        is_here = (place >= 0) & (place < self._embedding.rows)
        x = self._ops.embed(place.where(is_here, 0), self._embedding)
        return self.ranks.sum(x.masked_fill_(~is_here[:, None], 0))

    def through(
        self, x: Tensor, layers: range, batch: LaneBatch, kv: PagedKV, rows: Tensor, watch: Watch | None = None
    ) -> Tensor:
        """A pass of hidden states [T, hidden_size], which are overwritten, through some layers.

        Returns what the next layer reads [T, hidden_size], or behind the last one, of `rows`, what `logits` does.
        """
        ops, eps, scale = self._ops, self.config.rms_eps, self._scale
        cos, sin = (self._cos, self._sin) if batch.rope is None else batch.rope
        last = self._blocks[-1]
        for layer in layers:
            block = self._blocks[layer]
            qkv = ops.linear(ops.rms_norm(x, block.attention_norm, eps), block.qkv)
            if kv.moments:
                ops.query_moments(qkv, batch, kv, layer, block.q_norm, eps)
            q = ops.rope_write(qkv, cos, sin, batch, kv, layer, block.q_norm, block.k_norm, eps)
            if kv.energy:
                ops.query_energy(q, batch, kv, layer)
            if watch is not None:
                watch(layer, q)
            if kv.reading:
                ops.choose_reads(q, batch, kv, layer, scale, block.window)
            mixed = ops.attention(q, batch, kv, layer, scale, block.window)
            if block is last:  # beyond its attention only the wanted rows matter
                x, mixed = x[rows], mixed[rows]
            self._add(x, mixed, block.out)
            gate_up = ops.linear(ops.rms_norm(x, block.mlp_norm, eps), block.gate_up)
            self._add(x, ops.silu_mul(gate_up), block.down)
        return x if layers.stop < len(self._blocks) else ops.rms_norm(x, self._norm, eps)

    def _add(self, x: Tensor, y: Tensor, weight: Weight) -> None:
        """x += weight(y), of which each rank has a part."""
        if self.ranks.size == 1:
            self._ops.linear(y, weight, out=x, accumulate=True)
        else:
            x += self.ranks.sum(self._ops.linear(y, weight))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[R, hidden_size] -> [R, vocab] float32, which is `out` where that is given and nobody shares the model."""
        if self.ranks.size > 1:
            part = hidden.new_empty((len(hidden), self._head.rows), dtype=torch.float32)
            self._ops.linear(hidden, self._head, out=part)
            return self.ranks.gather(part, 1)[:, : self.config.vocab_size].contiguous()
        if out is None:
            out = hidden.new_empty((len(hidden), self._head.rows), dtype=torch.float32)
        return self._ops.linear(hidden, self._head, out=out)


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, each [max_position, head_dim / 2] float32, with the bits that transformers computes."""
    inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32)
    angles = torch.arange(config.max_position, dtype=torch.float32)[:, None] * inv_freq
    return angles.cos() * config.rope_factor, angles.sin() * config.rope_factor
