"""Pages: parts that do not overlap, fit their page, and are aligned for vectors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.kernels.kv import PagedKV
from winnow.kernels.layout import BLOCK, VECTOR, Offsets, PageFormat, PageLayout

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
    if fmt.is_opened:
        assert at.parts[0] == at.keys == 0
        assert at.values in at.parts
        assert at.end == at.parts[-1] <= layout.page_bytes
        assert list(at.parts) == sorted(set(at.parts))
        return
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
    more = layout.offsets(fmt).end + step * layout.token_bytes(fmt)
    if fmt.is_opened:
        more = Offsets(fmt, layout.head_dim, tokens + step).end
    assert more > layout.page_bytes


@fixed()
@given(layouts)
def test_a_denser_format_never_holds_fewer_tokens(layout: PageLayout) -> None:
    assert layout.capacity(layout.compute) == layout.page_tokens
    held = [
        layout.capacity(fmt)
        for fmt in sorted((fmt for fmt in PageFormat if not fmt.is_opened), key=lambda fmt: -fmt.bits)
        if fmt.bits <= layout.compute.bits
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


def test_every_format_says_what_it_does() -> None:
    assert all(fmt.what and fmt.mean_bits > 0 for fmt in PageFormat)
    assert len({fmt.what for fmt in PageFormat}) == len(PageFormat)


def test_mean_bits_are_what_pages_hold() -> None:
    layout = PageLayout(128, PageFormat.BF16, 64)
    for fmt in PageFormat:
        held = 8 * layout.offsets(fmt).end / (2 * 128 * layout.capacity(fmt) * (2 if fmt.spans_layers else 1))
        assert held == pytest.approx(fmt.mean_bits, rel=0.1) or not fmt.is_opened


def test_allocated_lanes_are_empty() -> None:
    kv = PagedKV.allocate(PageLayout(64, PageFormat.BF16), pages=3, slots=2, layers=4, kv_heads=5, width=6)
    assert kv.data.shape == (3, kv.layout.page_bytes)
    assert kv.table.shape == (2, 4, 5, 6)
    assert kv.kept.shape == kv.sealed.shape == (2, 4, 5)
    assert bool((kv.table == -1).all())
    assert not kv.kept.any()
    assert not kv.sealed.any()
    assert kv.mass == kv.positions == {}
