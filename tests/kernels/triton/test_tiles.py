"""Blocks of a page's numbers, of every format, against the reference's decoding."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reference.codec import decode_pages, encode_pages
from winnow.kernels.triton.device import device, page_formats
from winnow.kernels.triton.tiles import keys_at, padded, page_keys, page_values, values_at

from ..build import randn


@triton.jit
def _read_page(
    pages: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    PAGE_BYTES: tl.constexpr,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
) -> None:
    page = pages + tl.program_id(0) * PAGE_BYTES
    here = (tl.program_id(0) * padded(C) + tl.arange(0, padded(C))[None, :]) * padded(D)
    tl.store(keys + here + tl.arange(0, padded(D))[:, None], page_keys(page, FORMAT, D, C))
    here = (tl.program_id(0) * padded(C) + tl.arange(0, padded(C))[:, None]) * padded(D)
    tl.store(values + here + tl.arange(0, padded(D))[None, :], page_values(page, FORMAT, D, C))


@triton.jit
def _gather(
    pages: tl.tensor,
    tokens: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    count: tl.tensor,
    PAGE_BYTES: tl.constexpr,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
) -> None:
    i, d = tl.arange(0, N), tl.arange(0, padded(D))
    token = tl.load(tokens + i, mask=i < count, other=0)
    page, place = pages + (token // C) * PAGE_BYTES, token % C
    block = keys_at(page[None, :], d[:, None], place[None, :], (i < count)[None, :], FORMAT, D, C)
    tl.store(keys + i[None, :] * padded(D) + d[:, None], block)
    block = values_at(page[:, None], place[:, None], d[None, :], (i < count)[:, None], FORMAT, D, C)
    tl.store(values + i[:, None] * padded(D) + d[None, :], block)


def _pages(fmt: PageFormat, dim: int, compute: PageFormat, count: tl.tensor) -> tuple[PageLayout, torch.Tensor]:
    layout = PageLayout(dim, compute, 32)
    tokens = count * layout.capacity(fmt)
    raw = encode_pages(randn(tokens, dim), randn(tokens, dim, seed=2), layout, fmt)
    pages = torch.full((count, layout.page_bytes), 255, dtype=torch.uint8)
    pages[:, : raw.shape[1]] = raw
    return layout, pages


@pytest.mark.parametrize("dim", [16, 64, 80])
@pytest.mark.parametrize(
    ("fmt", "compute"),
    [(fmt, PageFormat.F32) for fmt in page_formats()] + [(fmt, PageFormat.BF16) for fmt in page_formats()[1:]],
)
def test_a_page_is_read_as_the_reference_decodes_it(fmt: PageFormat, dim: int, compute: PageFormat) -> None:
    layout, pages = _pages(fmt, dim, compute, 2)
    capacity = layout.capacity(fmt)
    expected = decode_pages(pages, layout, fmt)
    keys, values = (torch.full((2, padded(capacity), padded(dim)), 9.0, device=device()) for _ in range(2))
    _read_page[(2,)](pages.to(device()), keys, values, layout.page_bytes, int(fmt), dim, capacity)
    for actual, side in zip((keys.cpu(), values.cpu()), expected, strict=True):
        # An encoded number is code * scale + zero: one rounding apart where that is a fused operation.
        torch.testing.assert_close(actual[:, :capacity, :dim].flatten(0, 1), side, atol=1e-6, rtol=1e-6)
        assert not actual[:, capacity:].any() and not actual[..., dim:].any()


@pytest.mark.parametrize("fmt", page_formats())
def test_tokens_are_gathered_from_many_pages(fmt: PageFormat) -> None:
    layout, pages = _pages(fmt, 80, PageFormat.F32, 5)
    capacity = layout.capacity(fmt)
    tokens = torch.randperm(5 * capacity, generator=torch.Generator().manual_seed(3))[:19].int()
    expected = decode_pages(pages, layout, fmt)
    keys, values = (torch.full((32, 128), 9.0, device=device()) for _ in range(2))
    _gather[(1,)](
        pages.to(device()), tokens.to(device()), keys, values, 19, layout.page_bytes, int(fmt), 80, capacity, 32
    )
    for actual, side in zip((keys.cpu(), values.cpu()), expected, strict=True):
        torch.testing.assert_close(actual[:19, :80], side[tokens.long()], atol=1e-6, rtol=1e-6)
        assert not actual[19:].any() and not actual[:, 80:].any()
