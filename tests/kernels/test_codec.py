"""The reference's page formats against formulas written another way: numpy, one number at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reference.codec import decode_pages, encode_pages, quantize

from .build import randn

QUANTIZED = [PageFormat.INT8, PageFormat.INT4]
LAYOUTS = [PageLayout(16), PageLayout(80, PageFormat.BF16), PageLayout(64, PageFormat.F32, 32)]


def _whole_page(layout: PageLayout, raw: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(raw, (0, layout.page_bytes - raw.shape[1]), value=255)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_a_number_lies_where_the_layout_says(layout: PageLayout, fmt: PageFormat) -> None:
    capacity, dim, at = layout.capacity(fmt), layout.head_dim, layout.offsets(fmt)
    keys, values = randn(capacity, dim, seed=1), 3 * randn(capacity, dim, seed=2)
    page = encode_pages(keys, values, layout, fmt)[0].numpy()
    assert page.nbytes == at.end

    def half(start: int, i: int) -> np.float32:
        return np.float32(page[start + 2 * i : start + 2 * i + 2].view(np.float16)[0])

    def nibble(byte: int, high: bool) -> int:
        return byte >> 4 if high else byte & 15

    for t, d in [(0, 0), (1, dim - 1), (capacity // 2 - 1, 3), (capacity // 2, dim // 2), (capacity - 1, dim // 2 - 1)]:
        if fmt is PageFormat.INT8:
            k_code, v_code = page[at.keys + d * capacity + t], page[at.values + t * dim + d]
        else:
            k_byte = page[at.keys + d * (capacity // 2) + t % (capacity // 2)]
            v_byte = page[at.values + t * (dim // 2) + d % (dim // 2)]
            k_code, v_code = nibble(k_byte, t >= capacity // 2), nibble(v_byte, d >= dim // 2)
        for code, scale, zero, group, x in [
            (k_code, half(at.k_scale, d), half(at.k_zero, d), keys[:, d].numpy(), keys[t, d].numpy()),
            (v_code, half(at.v_scale, t), half(at.v_zero, t), values[t].numpy(), values[t, d].numpy()),
        ]:
            levels = 2**fmt.bits - 1
            assert zero == np.float32(np.float16(group.min()))
            assert scale == np.float32(np.float16((group.max() - group.min()) / np.float32(levels)))
            assert code == np.clip(np.floor((x - zero) / scale + np.float32(0.5)), 0, levels)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_a_quantized_number_comes_back_within_half_a_step(layout: PageLayout, fmt: PageFormat) -> None:
    pages, capacity, dim = 3, layout.capacity(fmt), layout.head_dim
    keys, values = (randn(pages * capacity, dim, seed=seed) for seed in (1, 2))
    raw = _whole_page(layout, encode_pages(keys, values, layout, fmt))
    for decoded, x, group in zip(decode_pages(raw, layout, fmt), (keys, values), (0, 1), strict=True):
        paged = x.view(pages, capacity, dim)
        spread = paged.amax(group + 1, keepdim=True) - paged.amin(group + 1, keepdim=True)
        # Half a step, and what half precision takes from the zero point and from 255 or 15 steps.
        bound = spread / (2**fmt.bits - 1) / 2 + (spread + paged.abs().amax(group + 1, keepdim=True)) * 2**-10
        assert bool(((decoded - x).view_as(paged).abs() <= bound).all())


@pytest.mark.parametrize("fmt", [PageFormat.F32, PageFormat.BF16])
def test_a_float_page_is_the_rounded_number(fmt: PageFormat) -> None:
    layout = PageLayout(16, PageFormat.F32)
    keys, values = (randn(2 * layout.capacity(fmt), 16, seed=seed) for seed in (1, 2))
    raw = _whole_page(layout, encode_pages(keys, values, layout, fmt))
    dtype = torch.float32 if fmt is PageFormat.F32 else torch.bfloat16
    for decoded, x in zip(decode_pages(raw, layout, fmt), (keys, values), strict=True):
        assert torch.equal(decoded, x.to(dtype).float())


@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize(
    ("x", "expected"),
    [
        pytest.param([0.0] * 8, [0.0] * 8, id="zeros"),
        pytest.param([0.5] * 8, [0.5] * 8, id="a constant"),
        pytest.param([1e-9, 0.0], [0.0, 0.0], id="a spread below the least scale"),
        pytest.param([1e6, 1e6], [65504.0, None], id="beyond half precision"),
    ],
)
def test_odd_groups(fmt: PageFormat, x: list[float], expected: list[float | None]) -> None:
    codes, scale, zero = quantize(torch.tensor(x), fmt)
    restored = codes.float() * scale.float() + zero.float()
    assert bool(restored.isfinite().all())
    assert float(scale) >= float(torch.tensor(1e-6).half())
    for value, wanted in zip(restored.tolist(), expected, strict=True):
        assert wanted is None or value == pytest.approx(wanted, abs=2e-6, rel=1e-3)
