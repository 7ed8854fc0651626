"""The C++ kernels compiled for every instruction set that this machine has, not only the one chosen at load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from winnow.kernels import cpu
from winnow.kernels.dispatch import Backend, backend
from winnow.kernels.layout import PageFormat, PageLayout

from .build import assert_same_bits, build, one_sequence, randn
from .repacking import plan
from .test_attention import MIXED
from .test_repack import MOVES

F32, BF16, INT8, INT4, INT2, FP8, *_ = PageFormat
computes = pytest.mark.parametrize("compute", [F32, BF16])


@pytest.fixture(params=["generic", "avx2", "avx512"])
def native(request: pytest.FixtureRequest) -> Iterator[Backend]:
    chosen = cpu.target()
    try:
        cpu.use_target(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield backend("cpu")
    cpu.use_target(chosen)


@computes
@pytest.mark.parametrize(("dim", "group"), [(16, 1), (80, 7), (128, 3)])
def test_attention(native: Backend, reference: Backend, compute: PageFormat, dim: int, group: int) -> None:
    state = build(PageLayout(dim, compute), MIXED)
    theirs, untouched, q = state.copy(), state.copy(), randn(state.rows, 2 * group, dim)
    out = native.attention(q, state.batch, state.kv, 0, dim**-0.5, 0)
    expected = reference.attention(q, theirs.batch, theirs.kv, 0, dim**-0.5, 0)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    for index, slot in enumerate(state.batch.slots.tolist()):
        batch, rows = one_sequence(state.batch, index)
        alone = replace(untouched.copy(), batch=batch)
        assert_same_bits(native.attention(q[rows], batch, alone.kv, 0, dim**-0.5, 0), out[rows])
        if slot in state.kv.mass:
            assert_same_bits(alone.kv.mass[slot], state.kv.mass[slot])
            torch.testing.assert_close(state.kv.mass[slot], theirs.kv.mass[slot], atol=2e-5, rtol=2e-5)


@computes
@pytest.mark.parametrize("name", ["evict, then seal with a residual", "seal odd counts", "seal to another format"])
def test_repack(native: Backend, reference: Backend, compute: PageFormat, name: str) -> None:
    arenas = []
    for ops in (native, reference):
        state = build(PageLayout(80, compute), [MOVES[name].held], layers=2, spare=99)
        plan(state, int(state.batch.slots[0]), MOVES[name]).run(ops, state.kv)
        arenas.append(state.kv.data)
    assert torch.equal(*arenas)


@pytest.mark.parametrize("kind", ["f32", "int8"])
def test_linear(native: Backend, reference: Backend, kind: str) -> None:
    weight, bias, x = randn(133, 264) / 16, randn(133, seed=2), randn(100, 264, seed=3)
    w = native.pack(weight, kind, bias)  # type: ignore[arg-type]
    y = native.linear(x, w)
    expected = reference.linear(x, reference.pack(weight, kind, bias))  # type: ignore[arg-type]
    torch.testing.assert_close(y, expected, atol=2e-5, rtol=1e-5)
    for count in range(1, 40):
        assert_same_bits(native.linear(x[:count].contiguous(), w), y[:count])


def test_norm_gate_and_rotation(native: Backend, reference: Backend) -> None:
    x, weight = randn(33, 576), randn(576, seed=2)
    torch.testing.assert_close(
        native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), atol=2e-6, rtol=1e-6
    )
    torch.testing.assert_close(native.silu_mul(x), reference.silu_mul(x), atol=2e-6, rtol=2e-6)
    state, table, norm = build(PageLayout(64), MIXED), randn(2000, 32), randn(64, seed=4)
    theirs, qkv = state.copy(), randn(state.rows, 10 * 64)
    args = (norm, norm, 1e-6)
    q = native.rope_write(qkv, table, table, state.batch, state.kv, 0, *args)
    expected = reference.rope_write(qkv, table, table, theirs.batch, theirs.kv, 0, *args)
    torch.testing.assert_close(q, expected, atol=2e-5, rtol=1e-5)
    for slot in state.batch.slots.tolist():
        for part, wanted in zip(
            native.read_lanes(state.kv, slot, 0), reference.read_lanes(theirs.kv, slot, 0), strict=True
        ):
            torch.testing.assert_close(part, wanted, atol=2e-5, rtol=1e-5)
