"""Lanes of any size on the device, filled with numbers of real formats: what the kernels are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reference.codec import encode_pages

BF16 = PageFormat.BF16
PAGE_TOKENS = 32
PATTERN = 64
"""Pages that are encoded; the arena repeats them, which no cache notices"""


@dataclass(frozen=True)
class Heads:
    """A model's attention."""

    name: str
    heads: int
    kv_heads: int
    dim: int

    @property
    def scale(self) -> float:
        return self.dim**-0.5


LLAMA = Heads("Llama-3-8B", 32, 8, 128)
SMOL = Heads("SmolLM2-135M", 9, 3, 64)


@dataclass(frozen=True)
class Lanes:
    """Sequences of equal length, the newest `rows` tokens of each being the step's."""

    kv: PagedKV
    batch: LaneBatch
    bytes: int
    """What attention of one layer must read of pages"""


def lanes(
    shape: Heads,
    device: torch.device,
    sequences: int,
    context: int,
    fmt: PageFormat = BF16,
    rows: int = 1,
    layers: int = 1,
    spare: int = 0,
    votes: int = 0,
) -> Lanes:
    """All full pages are in `fmt`, what is left in bf16. The last `votes` rows of each sequence vote, if any."""
    layout = PageLayout(shape.dim, BF16, PAGE_TOKENS)
    sealed = 0 if fmt is BF16 else (context - rows) // layout.capacity(fmt)
    open_tokens = context - sealed * layout.capacity(fmt)
    columns = sealed + layout.pages(open_tokens)
    count = sequences * layers * shape.kv_heads * columns
    kv = PagedKV.allocate(layout, count + spare, sequences, layers, shape.kv_heads, columns, device)
    kv.table.copy_(torch.randperm(count).int().view(kv.table.shape))
    kv.kept.fill_(context)
    kv.sealed.fill_(sealed)
    kv.formats.fill_(int(fmt))
    fill(kv.data, layout, fmt if sealed else BF16)
    if sealed:
        fill_pages(kv.data, layout, kv.table[..., sealed:].flatten().long())
    for slot in range(sequences) if votes else ():
        kv.mass[slot] = torch.zeros(layers, shape.kv_heads, context, device=device)
    batch = LaneBatch(
        torch.arange(sequences, dtype=torch.int32),
        torch.arange(0, sequences * rows + 1, rows, dtype=torch.int32),
        torch.arange(context - rows, context, dtype=torch.int32).repeat(sequences),
        torch.full((sequences,), rows - votes, dtype=torch.int32),
    )
    size = sealed * layout.offsets(fmt).end + open_tokens * layout.token_bytes(BF16)
    return Lanes(kv, batch, sequences * shape.kv_heads * size)


def layers_beyond_cache(shape: Heads, sequences: int, context: int, fmt: PageFormat, cache_bytes: int) -> int:
    """Layers that together hold several times what the cache does."""
    layout = PageLayout(shape.dim, BF16, PAGE_TOKENS)
    one = sequences * shape.kv_heads * context * layout.token_bytes(fmt)
    return min(16, max(2, -(-4 * cache_bytes // one)))


def fill(data: Tensor, layout: PageLayout, fmt: PageFormat | None = None) -> None:
    """Makes full pages of all pages [n, page_bytes], in the compute format if no other is named."""
    pattern = _pattern(layout, layout.compute if fmt is None else fmt).to(data.device)
    whole = len(data) // PATTERN
    data[: whole * PATTERN].view(whole, *pattern.shape).copy_(pattern)
    data[whole * PATTERN :].copy_(pattern[: len(data) - whole * PATTERN])


def fill_pages(data: Tensor, layout: PageLayout, pages: Tensor) -> None:
    """The same of some `pages` [n] int64, in the compute format."""
    pattern = _pattern(layout, layout.compute).to(data.device)
    for some in pages.to(data.device).split(1 << 15):
        data[some] = pattern[torch.arange(len(some), device=data.device) % PATTERN]


@cache
def _pattern(layout: PageLayout, fmt: PageFormat) -> Tensor:
    """[PATTERN, page_bytes] uint8: full pages of tokens of unit scale."""
    tokens, rng = PATTERN * layout.capacity(fmt), torch.Generator().manual_seed(int(fmt))
    keys, values = (torch.randn(tokens, layout.head_dim, generator=rng) for _ in range(2))
    raw = encode_pages(keys, values, layout, fmt)
    return torch.nn.functional.pad(raw, (0, layout.page_bytes - raw.shape[1]))
