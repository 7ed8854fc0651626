"""The reference's page formats against formulas written another way: numpy, one number at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reference.codec import decode_pages, encode_pages, quantize_fp8
from winnow.kernels.reference.integers import quantize

from .build import randn

INTEGERS = [PageFormat.INT8, PageFormat.INT4, PageFormat.INT2]
LAYOUTS = [PageLayout(16), PageLayout(80, PageFormat.BF16), PageLayout(64, PageFormat.F32, 32)]


def _whole_page(layout: PageLayout, raw: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(raw, (0, layout.page_bytes - raw.shape[1]), value=255)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("fmt", INTEGERS)
def test_a_number_lies_where_the_layout_says(layout: PageLayout, fmt: PageFormat) -> None:
    capacity, dim, at = layout.capacity(fmt), layout.head_dim, layout.offsets(fmt)
    keys, values = randn(capacity, dim, seed=1), 3 * randn(capacity, dim, seed=2)
    page = encode_pages(keys, values, layout, fmt)[0].numpy()
    assert page.nbytes == at.end

    def half(start: int, i: int) -> np.float32:
        return np.float32(page[start + 2 * i : start + 2 * i + 2].view(np.float16)[0])

    def code_of(row: int, column: int, columns: int) -> int:
        """The code at a column of the packed row that begins at byte `row`."""
        if fmt is PageFormat.INT8:
            return int(page[row + column])
        if fmt is PageFormat.INT4:
            byte = int(page[row + column % (columns // 2)])
            return byte >> 4 if column >= columns // 2 else byte & 15
        return int(page[row + column // 4]) >> 2 * (column % 4) & 3

    tokens, channels = layout.key_block(fmt), layout.value_block(fmt)
    for t, d in [(0, 0), (1, dim - 1), (capacity // 2 - 1, 3), (capacity // 2, dim // 2), (capacity - 1, dim // 2 - 1)]:
        k_row, v_row = t // tokens * dim + d, d // channels * capacity + t
        k_group = keys[t // tokens * tokens :][:tokens, d].numpy()
        v_group = values[t, d // channels * channels :][:channels].numpy()
        k_code = code_of(at.keys + k_row * tokens * fmt.bits // 8, t % tokens, tokens)
        v_code = code_of(at.values + v_row * channels * fmt.bits // 8, d % channels, channels)
        for code, scale, zero, group, x in [
            (k_code, half(at.k_scale, k_row), half(at.k_zero, k_row), k_group, keys[t, d].numpy()),
            (v_code, half(at.v_scale, v_row), half(at.v_zero, v_row), v_group, values[t, d].numpy()),
        ]:
            levels = 2**fmt.bits - 1
            assert zero == np.float32(np.float16(group.min()))
            assert scale == np.float32(np.float16((group.max() - group.min()) / np.float32(levels)))
            assert code == np.clip(np.floor((x - zero) / scale + np.float32(0.5)), 0, levels)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("fmt", INTEGERS)
def test_a_quantized_number_comes_back_within_half_a_step(layout: PageLayout, fmt: PageFormat) -> None:
    pages, capacity, dim = 3, layout.capacity(fmt), layout.head_dim
    keys, values = (randn(pages * capacity, dim, seed=seed) for seed in (1, 2))
    raw = _whole_page(layout, encode_pages(keys, values, layout, fmt))
    k_groups = (pages * capacity // layout.key_block(fmt), layout.key_block(fmt), dim)
    v_groups = (pages * capacity, dim // layout.value_block(fmt), layout.value_block(fmt))
    for decoded, x, shape, group in zip(
        decode_pages(raw, layout, fmt), (keys, values), (k_groups, v_groups), (1, 2), strict=True
    ):
        x = x.view(shape)
        spread = x.amax(group, keepdim=True) - x.amin(group, keepdim=True)
        # Half a step, and what half precision takes from the zero point and from all the steps.
        bound = spread / (2**fmt.bits - 1) / 2 + (spread + x.abs().amax(group, keepdim=True)) * 2**-10
        assert bool(((decoded.view(shape) - x).abs() <= bound).all())


def _e4m3(code: int) -> float:
    """The number that eight bits of e4m3 mean, by its definition (arXiv:2209.05433)."""
    sign, exponent, fraction = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
    return sign * (fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fp8_is_the_nearest_number_under_one_scale_a_side(layout: PageLayout) -> None:
    fmt = PageFormat.FP8
    capacity, dim, at = layout.capacity(fmt), layout.head_dim, layout.offsets(fmt)
    parts = [randn(capacity, dim, seed=1) * 5, randn(capacity, dim, seed=2) ** 9 / 1000]  # values down to subnormals
    page = encode_pages(*parts, layout, fmt)[0].numpy()
    assert page.nbytes == at.end
    table = np.array(sorted((_e4m3(code), code) for code in range(256) if code & 127 != 127))
    for x, codes, where in [
        (parts[0].T, page[at.keys : at.values], at.k_scale),
        (parts[1], page[at.values : at.k_scale], at.v_scale),
    ]:
        numbers = x.numpy()
        scale = page[where : where + 2].view(np.float16)[0]
        assert scale == np.float16(np.abs(numbers).max() / np.float32(448))
        wanted = np.clip(numbers / np.float32(scale), -448, 448).astype(np.float64).ravel()
        stored = np.array([_e4m3(int(code)) for code in codes])
        places = np.searchsorted(table[:, 0], wanted).clip(1, len(table) - 1)
        nearest = np.minimum(np.abs(table[places - 1, 0] - wanted), np.abs(table[places, 0] - wanted))
        assert np.array_equal(np.abs(stored - wanted), nearest)
    raw = _whole_page(layout, torch.from_numpy(page)[None])
    assert torch.equal(decode_pages(raw, layout, fmt)[1].flatten(), torch.from_numpy(stored * float(scale)).float())


def test_fp8_of_nothing_and_of_too_much_is_finite() -> None:
    for x in (torch.zeros(1, 2, 8), torch.full((1, 2, 8), 1e-9), torch.full((1, 2, 8), 1e9)):
        codes, scale = quantize_fp8(x)
        assert bool((codes.float() * scale.float()).isfinite().all())


@pytest.mark.parametrize("fmt", [PageFormat.F32, PageFormat.BF16, PageFormat.F16])
def test_a_float_page_is_the_rounded_number(fmt: PageFormat) -> None:
    layout = PageLayout(16, PageFormat.F32)
    keys, values = (randn(2 * layout.capacity(fmt), 16, seed=seed) for seed in (1, 2))
    raw = _whole_page(layout, encode_pages(keys, values, layout, fmt))
    dtype = {PageFormat.F32: torch.float32, PageFormat.BF16: torch.bfloat16, PageFormat.F16: torch.float16}[fmt]
    for decoded, x in zip(decode_pages(raw, layout, fmt), (keys, values), strict=True):
        assert torch.equal(decoded, x.to(dtype).float())


MUSTAFAR = {PageFormat.MUSTAFAR50: 0.5, PageFormat.MUSTAFAR70: 0.7}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("fmt", "sparsity"), MUSTAFAR.items())
def test_mustafar_keeps_the_largest_numbers_of_a_token(layout: PageLayout, fmt: PageFormat, sparsity: float) -> None:
    capacity, dim = layout.capacity(fmt), layout.head_dim
    keys = randn(capacity, dim, seed=1)
    values = (2 * randn(capacity, dim, seed=2)).round() * 1000  # many are equal, one is beyond half precision
    values[0, 3] = -1e6
    raw = _whole_page(layout, encode_pages(keys, values, layout, fmt))
    for decoded, x in zip(decode_pages(raw, layout, fmt), (keys, values), strict=True):
        for token, held in zip(x.tolist(), decoded, strict=True):
            by_size = sorted((-abs(number), d) for d, number in enumerate(token))
            wanted = torch.zeros(dim)
            for _, d in by_size[: dim - int(sparsity * dim + 1e-9)]:
                wanted[d] = torch.tensor(token[d]).clamp(-65504, 65504).half()
            assert torch.equal(held, wanted)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_mustafar_lies_in_a_page_as_it_says(layout: PageLayout) -> None:
    fmt = PageFormat.MUSTAFAR70
    capacity, dim, at = layout.capacity(fmt), layout.head_dim, layout.offsets(fmt)
    keys, values = randn(capacity, dim, seed=1), randn(capacity, dim, seed=2)
    page = encode_pages(keys, values, layout, fmt)[0].numpy()
    for bitmap, numbers, x in ((at.parts[0], at.parts[1], keys), (at.parts[2], at.parts[3], values)):
        place = numbers
        for t in range(capacity):
            for d in range(dim):
                if page[bitmap + t * dim // 8 + d // 8] >> d % 8 & 1:
                    assert page[place : place + 2].view(np.float16)[0] == np.float16(x[t, d])
                    place += 2
        assert place in at.parts


def _gear(rows: torch.Tensor, is_keys: bool, rank: int, loops: int = 3) -> torch.Tensor:
    """What a side is after its compression, rows [R, N], in the steps of the original and with its QR."""
    columns = rows.shape[1]
    k = max(1, round(columns / 100))
    ends = [rows.topk(k, dim=-1, largest=largest) for largest in (False, True)]
    level = rows.clone()
    for end in ends:
        level.scatter_(-1, end.indices, rows.mean(-1, keepdim=True).expand(-1, k))
    low, high = level.amin(-1, keepdim=True).half().float(), level.amax(-1, keepdim=True)
    step = ((high - level.amin(-1, keepdim=True)) / 15).half().float()
    output = ((level - low) / step + 0.5).floor().clamp(0, 15) * step + low
    for end in ends:
        output.scatter_(-1, end.indices, end.values)
    error = (rows - output).double()
    by_token = error.T if is_keys else error
    index = torch.arange(1, by_token.shape[1] * rank + 1)
    channels = (index * 2654435761 % 2**32 / 2**32).double().view(-1, rank)
    for i in range(loops):
        if i == loops - 1:
            channels = torch.linalg.qr(channels).Q
        tokens = by_token @ channels
        if i == loops - 1:
            tokens = torch.linalg.qr(tokens).Q
        channels = by_token.T @ tokens
    change = (tokens @ channels.T).float()
    restored = output + (change.T if is_keys else change)
    for end in ends:
        restored.scatter_(-1, end.indices, end.values)
    return restored


@pytest.mark.parametrize("layout", [*LAYOUTS, PageLayout(128, PageFormat.BF16, 128)], ids=str)
def test_gear_is_what_its_steps_say(layout: PageLayout) -> None:
    fmt = PageFormat.GEAR
    capacity, dim = layout.capacity(fmt), layout.head_dim
    keys, values = (randn(capacity, dim, seed=seed) for seed in (1, 2))
    keys += 3 * randn(capacity, 1, seed=3) * randn(1, dim, seed=4)
    values[::7, 5] += 40
    raw = _whole_page(layout, encode_pages(keys, values, layout, fmt))
    k_held, v_held = decode_pages(raw, layout, fmt)
    torch.testing.assert_close(k_held.T, _gear(keys.T, True, 2), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(v_held, _gear(values, False, 2), atol=2e-3, rtol=1e-3)
    assert torch.equal(v_held[::7, 5], values[::7, 5].half().float()), "outliers are kept"


@pytest.mark.parametrize("x", [0.0, 0.5, 1e-9, 60000.0])
def test_a_gear_page_of_one_number(x: float) -> None:
    layout, fmt = PageLayout(32), PageFormat.GEAR
    side = torch.full((layout.capacity(fmt), 32), x)
    raw = _whole_page(layout, encode_pages(side, -side, layout, fmt))
    for decoded, sign in zip(decode_pages(raw, layout, fmt), (1, -1), strict=True):
        torch.testing.assert_close(decoded, sign * side, atol=2e-6, rtol=1e-3)


def test_half_precision_ends_where_it_ends() -> None:
    layout = PageLayout(16)
    far = torch.full((layout.capacity(PageFormat.F16), 16), 1e6)
    raw = _whole_page(layout, encode_pages(far, -far, layout, PageFormat.F16))
    assert [float(side[0, 0]) for side in decode_pages(raw, layout, PageFormat.F16)] == [65504.0, -65504.0]


@pytest.mark.parametrize("fmt", INTEGERS)
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
