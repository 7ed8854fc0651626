"""Pages: parts that do not overlap, fit their page, and are aligned for vectors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.kernels.kv import PagedKV
from winnow.kernels.layout import BLOCK, VECTOR, PageFormat, PageLayout

from .build import fixed

layouts = st.builds(
    PageLayout,
    head_dim=st.integers(1, 16).map(lambda n: 16 * n),
    compute=st.sampled_from([PageFormat.F32, PageFormat.BF16]),
    page_tokens=st.integers(1, 16).map(lambda n: 16 * n),
)
formats = st.sampled_from(PageFormat)


@fixed()
@given(layouts, formats)
def test_parts_follow_each_other_and_fit_the_page(layout: PageLayout, fmt: PageFormat) -> None:
    at, tokens, dim = layout.offsets(fmt), layout.capacity(fmt), layout.head_dim
    side = tokens * dim * fmt.bits // 8
    k_scales, v_scales = 2 * dim * tokens // layout.key_block(fmt), 2 * tokens * dim // layout.value_block(fmt)
    parts = [(at.keys, side), (at.values, side)]
    if fmt.is_integer:
        parts += [(at.k_scale, k_scales), (at.k_zero, k_scales), (at.v_scale, v_scales), (at.v_zero, v_scales)]
    elif fmt is PageFormat.FP8:
        parts += [(at.k_scale, 2), (at.v_scale, 2)]
    assert tokens % layout.key_block(fmt) == dim % layout.value_block(fmt) == 0
    for (start, size), (following, _) in zip(parts, [*parts[1:], (at.end, 0)], strict=True):
        assert start + size == following
    assert at.keys == 0
    assert at.end <= layout.page_bytes
    assert at.values % VECTOR == 0
    assert at.k_scale % 2 == 0


@fixed()
@given(layouts, formats)
def test_a_page_wastes_less_than_one_step_of_its_capacity(layout: PageLayout, fmt: PageFormat) -> None:
    step = {PageFormat.INT4: 2 * VECTOR, PageFormat.INT2: BLOCK}.get(fmt, VECTOR)
    tokens = layout.capacity(fmt)
    assert tokens > 0
    assert tokens % step == 0
    assert layout.offsets(fmt).end + step * layout.token_bytes(fmt) > layout.page_bytes


@fixed()
@given(layouts)
def test_a_denser_format_never_holds_fewer_tokens(layout: PageLayout) -> None:
    assert layout.capacity(layout.compute) == layout.page_tokens
    held = [
        layout.capacity(fmt) for fmt in sorted(PageFormat, key=lambda fmt: -fmt.bits) if fmt.bits <= layout.compute.bits
    ]
    assert held == sorted(held)


@fixed()
@given(layouts, formats, st.integers(0, 5000))
def test_pages_are_just_enough(layout: PageLayout, fmt: PageFormat, tokens: int) -> None:
    pages, capacity = layout.pages(tokens, fmt), layout.capacity(fmt)
    assert pages * capacity >= tokens > (pages - 1) * capacity or pages == tokens == 0


@pytest.mark.parametrize("dim", [8, 24, 272])
def test_head_dims_that_kernels_cannot_read_are_refused(dim: int) -> None:
    with pytest.raises(ValueError, match="head_dim"):
        PageLayout(dim)


@pytest.mark.parametrize("tokens", [0, 8, 24, 272])
def test_page_sizes_that_kernels_cannot_read_are_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match="page_tokens"):
        PageLayout(64, page_tokens=tokens)


def test_new_tokens_cannot_be_written_quantized() -> None:
    with pytest.raises(ValueError, match="float"):
        PageLayout(64, PageFormat.INT8)


def test_a_format_is_found_by_its_label() -> None:
    assert [PageFormat.parse(fmt.label) for fmt in PageFormat] == list(PageFormat)


def test_allocated_lanes_are_empty() -> None:
    kv = PagedKV.allocate(PageLayout(64, PageFormat.BF16), pages=3, slots=2, layers=4, kv_heads=5, width=6)
    assert kv.data.shape == (3, kv.layout.page_bytes)
    assert kv.table.shape == (2, 4, 5, 6)
    assert kv.kept.shape == kv.sealed.shape == (2, 4, 5)
    assert bool((kv.table == -1).all())
    assert not kv.kept.any()
    assert not kv.sealed.any()
    assert kv.mass == kv.positions == {}
