"""bf16 activations at the sizes of real models: the Triton backend on a GPU against `reference`."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend, WeightKind
from winnow.kernels.kv import PagedKV
from winnow.kernels.layout import PageFormat
from winnow.kernels.vote import Vote

from ..kernels.build import Held, State, one_sequence, randn
from ..kernels.repacking import Move, plan
from .moved import (
    BF16,
    CHUNKS,
    DECODE,
    FP8,
    INT2,
    INT4,
    INT8,
    LLAMA,
    SMOLLM,
    assert_near,
    attend,
    fresh,
    moved,
    paged,
    queries,
)

shapes = pytest.mark.parametrize("shape", [LLAMA, SMOLLM], ids=["llama", "smollm"])
batches = pytest.mark.parametrize("held", [DECODE, CHUNKS, DECODE + CHUNKS], ids=["decode", "chunks", "mixed"])


# Attention -----------------------------------------------------------------------------------------------------------


@shapes
@batches
@pytest.mark.parametrize("window", [0, 100])
def test_attention(
    gpu: Backend, reference: Backend, held: list[Held], shape: tuple[int, int, int], window: int
) -> None:
    state = paged(held, shape)
    there, q = moved(state, gpu), queries(state, shape)
    arena = there.kv.data.clone()
    out = attend(gpu, there.kv, there.batch, q.to(gpu.device()), window)
    assert out.dtype == torch.bfloat16
    assert_near(out, attend(reference, state.kv, state.batch, q.float(), window))
    assert torch.equal(there.kv.data, arena), "attention writes no page"


@shapes
def test_attention_over_a_long_lane(gpu: Backend, reference: Backend, shape: tuple[int, int, int]) -> None:
    state = paged([Held((20_000, 31), evicted=True), Held((7, 20), sealed=(150, 1), fmt=INT4)], shape)
    there, q = moved(state, gpu), queries(state, shape)
    out = attend(gpu, there.kv, there.batch, q.to(gpu.device()))
    assert_near(out, attend(reference, state.kv, state.batch, q.float()))


VOTES = {
    "sum": Vote(),
    "fading": Vote(decay=0.9),
    "warm": Vote(temperature=1.7),
    "largest": Vote(reduce="max"),
    "noisy": Vote(is_noisy=True),
}


@pytest.mark.parametrize("vote", VOTES.values(), ids=VOTES)
def test_votes(gpu: Backend, reference: Backend, vote: Vote) -> None:
    held = [
        Held((700, 200), rows=100, first_vote=36),
        Held((50, 33), rows=33, sealed=(9, 2), fmt=INT8, first_vote=0),
        Held((40,), sealed=(7, 20), first_vote=0),
        Held((64,), rows=64),
    ]
    state = paged(held, LLAMA)
    for slot, mass in state.kv.mass.items():
        mass.zero_()
        state.kv.votes[slot] = vote
        if vote.is_noisy:
            state.kv.noise[slot] = randn(*mass.shape, seed=slot)
    there, q = moved(state, gpu), queries(state, LLAMA)
    out = attend(gpu, there.kv, there.batch, q.to(gpu.device()))
    assert_near(out, attend(reference, state.kv, state.batch, q.float()))
    assert len(state.kv.mass) == 3
    for slot, mass in state.kv.mass.items():
        assert_near(there.kv.mass[slot], mass)


@shapes
def test_a_row_has_the_same_bits_alone(gpu: Backend, shape: tuple[int, int, int]) -> None:
    """Whoever else is in the batch: decode rows, chunks, lanes of other formats and lengths."""
    voters = [Held((90, 300), rows=20, first_vote=0), Held((2000,), first_vote=0), Held((9, 1), sealed=(40, 3))]
    there = moved(paged(DECODE + CHUNKS + voters, shape), gpu)
    q = queries(there, shape).to(gpu.device())
    before = {slot: mass.clone() for slot, mass in there.kv.mass.items()}
    together = attend(gpu, there.kv, there.batch, q)
    mass = {slot: part.clone() for slot, part in there.kv.mass.items()}
    for slot, part in before.items():
        there.kv.mass[slot].copy_(part)
    for index in range(len(there.batch.slots)):
        batch, rows = one_sequence(there.batch, index)
        alone = attend(gpu, there.kv, batch, q[rows])
        assert torch.equal(alone, together[rows]), f"sequence {index}"
    for slot, part in mass.items():
        assert torch.equal(there.kv.mass[slot], part), f"mass of slot {slot}"


# What becomes of a step ----------------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("norms", [False, True])
def test_rope_write(gpu: Backend, reference: Backend, shape: tuple[int, int, int], norms: bool) -> None:
    dim, kv_heads, group = shape
    state = paged(DECODE + CHUNKS, shape, layers=2)
    there = moved(state, gpu)
    angles = torch.arange(8192)[:, None] * 500000.0 ** -(torch.arange(dim // 2) * 2 / dim)
    tables = (angles.cos(), angles.sin(), randn(dim, seed=8), randn(dim, seed=9))
    qkv = randn(state.rows, (group + 2) * kv_heads * dim).bfloat16()

    def write(ops: Backend, state: State, qkv: Tensor) -> Tensor:
        cos, sin, q_norm, k_norm = (table.to(ops.device()) for table in tables)
        more = (q_norm, k_norm) if norms else (None, None)
        return ops.rope_write(qkv, cos, sin, state.batch, state.kv, 1, *more, 1e-6)

    q, expected = write(gpu, there, qkv.to(gpu.device())), write(reference, state, qkv.float())
    assert q.dtype == torch.bfloat16
    torch.testing.assert_close(q.float().cpu(), expected, atol=1e-5, rtol=2**-8)
    # Pages differ where rounding to bf16 fell otherwise: in few numbers, which are close.
    ours, theirs = there.kv.data.cpu().view(torch.bfloat16), state.kv.data.view(torch.bfloat16)
    differ = ours.view(torch.int16) != theirs.view(torch.int16)
    torch.testing.assert_close(ours[differ].float(), theirs[differ].float(), atol=1e-5, rtol=2**-7)
    assert differ.float().mean() < 1e-2


@pytest.mark.parametrize("rows", [1, 7, 64, 700])
def test_rows(gpu: Backend, reference: Backend, rows: int) -> None:
    x, weight, gate_up = 3 * randn(rows, 4096), randn(4096, seed=2), 2 * randn(rows, 2 * 14336, seed=3)
    x, gate_up, to = x.bfloat16(), gate_up.bfloat16(), gpu.device()
    near = partial(torch.testing.assert_close, atol=1e-5, rtol=2**-8)
    near(gpu.rms_norm(x.to(to), weight.to(to), 1e-5).float().cpu(), reference.rms_norm(x.float(), weight, 1e-5))
    near(gpu.silu_mul(gate_up.to(to)).float().cpu(), reference.silu_mul(gate_up.float()))


TYPES: dict[WeightKind, torch.dtype] = {"bf16": torch.bfloat16, "f16": torch.float16, "fp8": torch.bfloat16}
"""Of activations"""


@pytest.mark.parametrize("rows", [1, 17, 300])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("size", [(6144, 4096), (576, 1536), (100, 72)], ids=str)
def test_linear(gpu: Backend, kind: WeightKind, rows: int, size: tuple[int, int]) -> None:
    """Into a new matrix, added to one, and into f32; (100, 72): sizes for which libraries have no product in fp8."""
    to = gpu.device()
    weight, bias = randn(*size, seed=1) / size[1] ** 0.5, randn(size[0], seed=2)
    x = randn(rows, size[1], seed=3).to(TYPES[kind])
    w = gpu.pack(weight.to(to), kind, bias.to(to))
    assert w.nbytes < size[0] * (size[1] * (1 if kind == "fp8" else 2) + 8)
    exact = x.double() @ weight.double().T + bias
    near = partial(assert_near, part=5e-2 if kind == "fp8" else 1e-2)
    y = gpu.linear(x.to(to), w)
    assert y.dtype == x.dtype
    near(y, exact)
    before = randn(rows, size[0], seed=4).to(x.dtype)
    near(gpu.linear(x.to(to), w, out=before.to(to, copy=True), accumulate=True), exact + before.double())
    out = torch.full((rows, size[0]), torch.nan, device=to)
    assert gpu.linear(x.to(to), w, out=out) is out
    near(out, exact)


@pytest.mark.parametrize("kind", TYPES)
def test_embed(gpu: Backend, kind: WeightKind) -> None:
    weight, tokens = randn(1000, 576), torch.tensor([0, 999, 3, 3], dtype=torch.int32)
    rows = gpu.embed(tokens.to(gpu.device()), gpu.pack(weight, kind))
    assert rows.dtype == TYPES[kind]
    assert_near(rows, weight[tokens.long()], part=5e-2 if kind == "fp8" else 1e-2)


# Pages ---------------------------------------------------------------------------------------------------------------

MOVES = {
    "seal": Move(Held((2100, 900)), INT4, residual=64),
    "seal a page behind others": Move(Held((130,), sealed=(12, 9)), INT4, start=(12, 9)),
    "evict": Move(Held((2100, 900)), BF16, keep=(700, 300), residual=9999),
    "evict, then seal": Move(Held((2100, 900)), INT8, keep=(700, 300), residual=32),
    "evict sealed tokens": Move(Held((40,), sealed=(20, 30), fmt=FP8), FP8, keep=(500, 600)),
    "to two bits": Move(Held((2100, 900)), INT2, residual=20),
    "to another format": Move(Held((40,), sealed=(20, 30), fmt=INT8), INT4),
}


@pytest.mark.parametrize("fresh_pages", [False, True], ids=["in place", "to fresh pages"])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@shapes
def test_repack_writes_the_bytes_of_the_reference(
    gpu: Backend, reference: Backend, move: Move, fresh_pages: bool, shape: tuple[int, int, int]
) -> None:
    kv_heads = shape[1]
    move = Move(move.held, move.fmt, move.keep, move.start, move.residual, fresh_pages)
    state = paged([move.held, Held((50, 7), sealed=(1, 0))], shape, layers=4)
    free = torch.arange(len(state.kv.data), len(state.kv.data) + 4 * kv_heads * 80, dtype=torch.int32)
    state.kv.data = torch.cat([state.kv.data, torch.zeros(len(free), state.kv.layout.page_bytes, dtype=torch.uint8)])
    state.free = free
    there, slot = moved(state, gpu), int(state.batch.slots[0])
    job = plan(state, slot, move)
    job.run(reference, state.kv)
    job.run(gpu, there.kv)
    assert torch.equal(there.kv.data.cpu(), state.kv.data)
    for kv in (state.kv, there.kv):
        job.commit(kv)
    for layer in (0, 3):
        for ours, theirs in zip(
            gpu.read_lanes(there.kv, slot, layer), reference.read_lanes(state.kv, slot, layer), strict=True
        ):
            torch.testing.assert_close(ours.float().cpu(), theirs, atol=0, rtol=0)


def test_copied_pages(gpu: Backend) -> None:
    there = moved(paged([Held((300,))], LLAMA, layers=2), gpu)
    before, count = there.kv.data.clone(), len(there.kv.data)
    src = torch.arange(0, count // 2, dtype=torch.int32)
    dst = src + count // 2
    gpu.copy_pages(there.kv, src, dst)
    assert torch.equal(there.kv.data[dst.long()], before[src.long()])
    assert torch.equal(there.kv.data[: count // 2], before[: count // 2])


# Graphs --------------------------------------------------------------------------------------------------------------


def _layer(gpu: Backend, state: State, qkv: Tensor, cos: Tensor, sin: Tensor, shape: tuple[int, int, int]) -> Tensor:
    q = gpu.rope_write(qkv, cos, sin, state.batch, state.kv, 0, None, None, 1e-5)
    return gpu.silu_mul(attend(gpu, state.kv, state.batch, q))


@shapes
def test_a_replayed_graph_does_what_launches_do(gpu: Backend, shape: tuple[int, int, int]) -> None:
    """A decode step's operations, recorded once and replayed on other numbers in the same places."""
    dim, kv_heads, group = shape
    there = moved(paged([*DECODE, Held((100,), first_vote=0)], shape), gpu)
    device = gpu.device()
    cos, sin = torch.rand(2, 8192, dim // 2, device=device)
    inputs = [randn(there.rows, (group + 2) * kv_heads * dim, seed=seed).bfloat16().to(device) for seed in (1, 2)]

    def state(kv: PagedKV) -> list[Tensor]:
        return [kv.data.clone(), *(mass.clone() for mass in kv.mass.values())]

    begin = state(there.kv)
    expected = []
    for qkv in inputs:
        expected.append((_layer(gpu, there, qkv, cos, sin, shape), state(there.kv)))
    for part, was in zip([there.kv.data, *there.kv.mass.values()], begin, strict=True):
        part.copy_(was)

    held = inputs[0].clone()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = _layer(gpu, there, held, cos, sin, shape)
    for qkv, (wanted, after) in zip(inputs, expected, strict=True):
        held.copy_(qkv)
        graph.replay()
        assert torch.equal(out, wanted)
        for part, was in zip(state(there.kv), after, strict=True):
            assert torch.equal(part, was)


def test_a_step_is_brought_over_once(gpu: Backend) -> None:
    """All layers of a step read one copy of its tables; a step that follows sees what changed."""
    state = paged([Held((70, 40))], SMOLLM, layers=2)
    there, q = moved(state, gpu), queries(state, SMOLLM).to(gpu.device())
    first = attend(gpu, there.kv, there.batch, q)
    native = there.batch.native
    attend(gpu, there.kv, there.batch, q, layer=1)
    assert there.batch.native is native
    slot = int(there.batch.slots[0])
    there.kv.table[slot, 0] = there.kv.table[slot, 0].roll(1, 0)
    there.kv.kept[slot, 0] = there.kv.kept[slot, 0].roll(1, 0)
    there.kv.positions[slot][0] = there.kv.positions[slot][0].roll(1, 0)
    there.kv.stale.add(slot)
    group = SMOLLM[2] * SMOLLM[0]
    rolled = q.view(1, SMOLLM[1], -1).roll(1, 1).view_as(q)
    again = attend(gpu, there.kv, fresh(there.batch), rolled)
    assert torch.equal(again, first.view(1, SMOLLM[1], group).roll(1, 1).view_as(first))


@pytest.mark.parametrize("fmt", [BF16, INT8, INT4, INT2, FP8])
def test_pages_of_every_format_are_read_as_they_are(gpu: Backend, reference: Backend, fmt: PageFormat) -> None:
    """`read_lanes` and `write_lanes` there and back: the bytes that were there."""
    state = paged([Held((40,), sealed=(3, 7), fmt=fmt)], LLAMA, layers=1)
    there, slot = moved(state, gpu), int(state.batch.slots[0])
    for ours, theirs in zip(gpu.read_lanes(there.kv, slot, 0), reference.read_lanes(state.kv, slot, 0), strict=True):
        torch.testing.assert_close(ours.float().cpu(), theirs, atol=0, rtol=0)
