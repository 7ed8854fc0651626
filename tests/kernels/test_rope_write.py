"""From the projections to queries and pages: against complex rotation, and against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageFormat, PageLayout

from .build import Held, State, assert_same_bits, build, chunk_of, one_sequence, randn, sealed_pages

F32, BF16, INT8, INT4, INT2, FP8, *_ = PageFormat
POSITIONS = 600

CASES = {
    "one token": [Held((1,))],
    "a prompt of a page - 1": [Held((15,), rows=15)],
    "a prompt of a page": [Held((16,), rows=16)],
    "a prompt of a page + 1": [Held((17,), rows=17)],
    "the first token of a new page": [Held((17,))],
    "the last token of a page": [Held((32,))],
    "a chunk from within a page over two boundaries": [Held((50,), rows=30)],
    "lanes of ragged kept length": [Held((40, 3, 17, 16), rows=3)],
    "ragged sealed counts": [Held((40, 3, 16), rows=2, sealed=(1, 0, 2), fmt=INT8)],
    "an open part that is the new rows alone": [Held((5,), rows=5, sealed=(1,), fmt=INT8)],
    "decode and prefill in one batch, of different formats": [
        Held((60,), rows=1, fmt=INT8, sealed=(1,)),
        Held((33,), rows=33),
        Held((9, 20), rows=7, fmt=INT4, sealed=(1, 0)),
        Held((5,), rows=1),
    ],
}
cases = pytest.mark.parametrize("held", CASES.values(), ids=CASES.keys())


def _tables(dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(POSITIONS)[:, None] * 10000.0 ** -(torch.arange(dim // 2) * 2 / dim)
    return 1.2 * angles.cos(), 1.2 * angles.sin()  # with an attention factor, as YaRN has


def _rotated(x: Tensor, weight: Tensor | None, positions: Tensor) -> Tensor:
    """x [T, H, D] -> the same turned as complex numbers, in float64."""
    x, dim = x.double(), x.shape[2]
    if weight is not None:
        x = torch.nn.functional.rms_norm(x, (dim,), weight.double(), eps=1e-6)
    cos, sin = (table.double()[positions.long()][:, None] for table in _tables(dim))
    turned = torch.complex(*x.chunk(2, dim=2)) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], dim=2)


def _run(ops: Backend, state: State, qkv: Tensor, norms: bool) -> Tensor:
    dim = state.kv.layout.head_dim
    q_norm, k_norm = (randn(dim, seed=8), randn(dim, seed=9)) if norms else (None, None)
    return ops.rope_write(qkv, *_tables(dim), state.batch, state.kv, 1, q_norm, k_norm, 1e-6)


@cases
@pytest.mark.parametrize("compute", [F32, BF16])
@pytest.mark.parametrize("norms", [False, True])
def test_queries_are_turned_and_tokens_land_in_their_lanes(
    ops: Backend, held: list[Held], compute: PageFormat, norms: bool
) -> None:
    dim, q_heads, kv_heads, layer = 16, 6, 3, 1
    state = build(PageLayout(dim, compute), held, layers=2, kv_heads=kv_heads)
    before = state.copy()
    qkv = randn(state.rows, (q_heads + 2 * kv_heads) * dim)
    q = _run(ops, state, qkv, norms)

    heads = qkv.view(state.rows, -1, dim)
    q_weight, k_weight = (randn(dim, seed=8), randn(dim, seed=9)) if norms else (None, None)
    torch.testing.assert_close(
        q.double(), _rotated(heads[:, :q_heads], q_weight, state.batch.positions), atol=5e-6, rtol=1e-5
    )
    new_keys = _rotated(heads[:, q_heads:-kv_heads], k_weight, state.batch.positions)
    new_values = heads[:, -kv_heads:]
    step = {F32: 1e-6, BF16: 2**-8}[compute]
    for index, slot in enumerate(state.batch.slots.tolist()):
        rows = one_sequence(state.batch, index)[1]
        old_keys, old_values = ops.read_lanes(before.kv, slot, layer)
        keys, values = ops.read_lanes(state.kv, slot, layer)
        for head, kept in enumerate(state.kv.kept[slot, layer].tolist()):
            old = kept - (rows.stop - rows.start)
            torch.testing.assert_close(keys[head, old:kept].double(), new_keys[rows, head], atol=5e-6, rtol=step)
            expected = new_values[rows, head].to(torch.float32 if compute is F32 else torch.bfloat16).float()
            assert_same_bits(values[head, old:kept], expected)
            assert_same_bits(keys[head, :old], old_keys[head, :old])
            assert_same_bits(values[head, :old], old_values[head, :old])


@cases
@pytest.mark.parametrize("compute", [F32, BF16])
@pytest.mark.parametrize("norms", [False, True])
def test_pages_and_queries_match_the_reference(
    native: Backend, reference: Backend, held: list[Held], compute: PageFormat, norms: bool
) -> None:
    layout = PageLayout(80, compute)
    state = build(layout, held, layers=2, kv_heads=3)
    theirs = state.copy()
    qkv = randn(state.rows, (3 * 2 + 6) * 80)
    q, expected = _run(native, state, qkv, norms), _run(reference, theirs, qkv, norms)
    torch.testing.assert_close(q, expected, atol=5e-6, rtol=1e-5)
    # Every byte of the arena, as the format's numbers: a key's last bit may differ; NaN where nothing was written.
    dtype, step = (torch.float32, 1e-5) if compute is F32 else (torch.bfloat16, 2**-7)
    sealed = torch.zeros(state.kv.data.shape[0], dtype=torch.bool)
    sealed[sealed_pages(state.kv)] = True
    actual, wanted = (kv.data[~sealed].view(dtype).float() for kv in (state.kv, theirs.kv))
    torch.testing.assert_close(actual, wanted, atol=5e-6, rtol=step, equal_nan=True)
    assert torch.equal(state.kv.data[sealed], theirs.kv.data[sealed])


@pytest.mark.parametrize("norms", [False, True])
def test_a_row_has_the_same_bits_in_any_company(ops: Backend, norms: bool) -> None:
    held = [Held((40, 20), rows=20), Held((7,)), Held((60,), rows=12), Held((1,))]
    state = build(PageLayout(64), held, layers=2, kv_heads=2)
    qkv = randn(state.rows, 8 * 64)
    together = state.copy()
    q = _run(ops, together, qkv, norms)
    for index, slot in enumerate(state.batch.slots.tolist()):
        batch, rows = one_sequence(state.batch, index)
        alone = replace(state.copy(), batch=batch)
        assert_same_bits(_run(ops, alone, qkv[rows], norms), q[rows])
        for part, expected in zip(ops.read_lanes(alone.kv, slot, 1), ops.read_lanes(together.kv, slot, 1), strict=True):
            assert_same_bits(part, expected)


def test_a_chunk_has_the_same_bits_however_it_is_cut(ops: Backend) -> None:
    whole = build(PageLayout(64, BF16), [Held((50,), rows=40)], layers=2, kv_heads=2)
    qkv = randn(whole.rows, 8 * 64)
    cut = whole.copy()
    q = _run(ops, whole, qkv, True)
    for first, last in [(0, 1), (1, 7), (7, 23), (23, 40)]:
        cut.kv.kept[cut.batch.slots.long()] = 10 + last
        chunk = replace(cut, batch=chunk_of(whole.batch, first, last))
        assert_same_bits(_run(ops, chunk, qkv[first:last], True), q[first:last])
    assert torch.equal(cut.kv.data, whole.kv.data)


def test_rows_are_turned_by_their_angles_and_not_by_their_positions(ops: Backend) -> None:
    held = [Held((40, 20), rows=20), Held((7,)), Held((60,), rows=12)]
    state = build(PageLayout(64), held, layers=2, kv_heads=2)
    qkv = randn(state.rows, 8 * 64)
    angles = torch.randint(0, POSITIONS, (state.rows,), generator=torch.Generator().manual_seed(3)).int()
    turned, there = state.copy(), state.copy()
    turned.batch.angles = angles
    there.batch.positions = angles
    assert_same_bits(_run(ops, turned, qkv, True), _run(ops, there, qkv, True))
    assert torch.equal(turned.kv.data, there.kv.data)


@pytest.mark.parametrize("angle", [-1, POSITIONS])
def test_an_angle_outside_the_tables(ops: Backend, angle: int) -> None:
    state = build(PageLayout(64), [Held((5,), rows=3)], layers=2, kv_heads=2)
    state.batch.angles = state.batch.positions.clone()
    state.batch.angles[1] = angle
    with pytest.raises(IndexError):
        _run(ops, state, randn(3, 8 * 64), False)


def test_angles_of_another_number_of_rows(ops: Backend) -> None:
    state = build(PageLayout(64), [Held((5,), rows=3)], layers=2, kv_heads=2)
    state.batch.angles = state.batch.positions[:2].clone()
    with pytest.raises(ValueError, match="fit"):
        _run(ops, state, randn(3, 8 * 64), False)
