"""Pages that lanes of two layers share: what is stored, and who finds it again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend, backend
from winnow.kernels.kv import Rest
from winnow.kernels.layer_merge import LayerMerge
from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reference.formats.mini_cache import slerp

from .build import Held, State, assert_same_bits, build, int32, randn

FMT = PageFormat.MINI_CACHE
LAYERS, HEADS = 5, 2


def angle(x: Tensor, y: Tensor) -> Tensor:
    x, y = (side.double() / side.double().norm(dim=-1, keepdim=True) for side in (x, y))
    return 2 * ((x - y).norm(dim=-1) / (x + y).norm(dim=-1)).atan()  # exact at small angles, as arccos is not


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 1.0])
def test_a_shared_direction_divides_the_angle(t: float) -> None:
    x, y = randn(50, 32, seed=1), 3 * randn(50, 32, seed=2)
    e = slerp(x, y, t)
    torch.testing.assert_close(e.norm(dim=-1), torch.ones(50).double())
    torch.testing.assert_close(angle(e, x), t * angle(x, y), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(angle(e, y), (1 - t) * angle(x, y), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "t", "wanted"),
    [
        ([3.0, 0, 0], [5.0, 0, 0], 0.6, [1.0, 0, 0]),  # the same direction
        ([0.0, 0, 0], [0.0, 2, 0], 0.6, [0.0, 1, 0]),  # one has none
        ([0.0, 0, 0], [0.0, 0, 0], 0.6, [0.0, 0, 0]),  # nor the other
        ([1.0, 0, 0], [-2.0, 0, 0], 0.3, [1.0, 0, 0]),  # opposite ones: the heavier
        ([1.0, 0, 0], [-2.0, 0, 0], 0.6, [-1.0, 0, 0]),
        ([0.0, 1, 0], [1.0, 0, 0], 0.5, [math.sqrt(0.5), math.sqrt(0.5), 0]),
    ],
)
def test_odd_directions(x: list[float], y: list[float], t: float, wanted: list[float]) -> None:
    torch.testing.assert_close(slerp(torch.tensor(x), torch.tensor(y), t), torch.tensor(wanted).double())


def oracle(x: Tensor, y: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """What the lower and the upper layer find of a token's vectors [n, D]: the paper's equations, token by token."""
    lower, upper = torch.empty_like(x), torch.empty_like(y)
    for i, (a, b) in enumerate(zip(x.double(), y.double(), strict=True)):
        u, v = a / a.norm(), b / b.norm()
        omega = math.acos(float(u @ v))
        e = math.sin((1 - t) * omega) / math.sin(omega) * u + math.sin(t * omega) / math.sin(omega) * v
        stored = (e / e.norm()).half().float()
        lower[i], upper[i] = stored * a.norm().half().float(), stored * b.norm().half().float()
    return lower, upper


def merged(ops: Backend, layout: PageLayout, tokens: int, first: int, t: float = 0.6) -> tuple[State, dict[int, int]]:
    """Lanes of open tokens of which the oldest fill as many pages of two layers as they can, but for the first three,
    which stay open in front; and who is the other layer of whom."""
    state = build(layout, [Held((tokens,), rows=2)], layers=LAYERS, kv_heads=HEADS, spare=40)
    kv, slot = state.kv, int(state.batch.slots[0])
    merge = LayerMerge(first, t)
    pairs = {lower: lower + 1 for lower in merge.lower_layers(LAYERS)}
    partner = pairs | {upper: lower for lower, upper in pairs.items()}
    pages = (tokens - 5) // layout.capacity(FMT)
    count = pages * layout.capacity(FMT)
    keep = torch.arange(tokens, dtype=torch.int32).repeat(LAYERS, HEADS, 1)
    order = torch.cat([torch.arange(3, 3 + count), torch.arange(3), torch.arange(3 + count, tokens)])
    keep[list(partner)] = order.int()
    rest = torch.zeros(LAYERS, HEADS, dtype=torch.int32)
    rest[list(partner)] = pages
    none = torch.zeros_like(rest)
    table = torch.full((LAYERS, HEADS, kv.table.shape[3]), -1, dtype=torch.int32)
    for layer in range(LAYERS):
        for head in range(HEADS):
            own = kv.table[slot, layer, head].tolist()  # a lane's own pages are written anew, the last ones first
            own = [page for page in reversed(own) if page >= 0]
            shared = int(rest[layer, head])
            columns = shared + layout.pages(tokens - shared * layout.capacity(FMT))
            table[layer, head, :columns] = int32(own[:columns])
            if shared and layer not in pairs:
                table[layer, head, :shared] = table[layer - 1, head, :shared]
    counts = torch.full((LAYERS, HEADS), tokens, dtype=torch.int32)
    ops.repack(kv, slot, keep, counts, none, table, none, layout.compute, Rest(none, rest, FMT, merge))
    kv.table[slot] = table
    kv.rest[slot], kv.rest_formats[slot] = rest, int(FMT)
    for (of, layer, head), keys in list(state.keys.items()):
        index = keep[layer, head].long()
        state.keys[of, layer, head], state.values[of, layer, head] = keys[index], state.values[of, layer, head][index]
    return state, partner


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_both_layers_find_their_tokens(name: str, dim: int, first: int) -> None:
    layout, ops, t = PageLayout(dim), backend(name), 0.6
    state, partner = merged(ops, layout, 150, first, t)
    kv, slot = state.kv, int(state.batch.slots[0])
    assert len(partner) == (LAYERS - first) // 2 * 2
    for layer in range(LAYERS):
        keys, values = ops.read_lanes(kv, slot, layer)
        for head in range(HEADS):
            count = int(kv.rest[slot, layer, head]) * layout.capacity(FMT)
            assert (count > 0) is (layer in partner)
            for side, made in ((keys[head], state.keys), (values[head], state.values)):
                own = made[slot, layer, head]
                assert_same_bits(side[count:], own[count:])
                if not count:
                    continue
                pair = sorted((layer, partner[layer]))
                both = oracle(*(made[slot, i, head][:count] for i in pair), t)
                wanted = both[pair.index(layer)]
                assert torch.allclose(side[:count], wanted, rtol=2**-9, atol=1e-6)
                near = (side[:count] != wanted).float().mean()
                assert near < 1e-3, "more than roundings of one bit differ"


def test_backends_store_the_same_bytes() -> None:
    layout = PageLayout(64)
    (one, partner), (other, _) = (merged(backend(name), layout, 200, 1) for name in ("cpu", "reference"))
    assert torch.equal(one.kv.table, other.kv.table)
    slot = int(one.batch.slots[0])
    for layer in range(LAYERS):
        shared = int(one.kv.rest[slot, layer, 0])
        pages = one.kv.table[slot, layer, :, :shared].long().flatten()
        raw, exact = (state.kv.data[pages, : layout.offsets(FMT).end] for state in (one, other))
        assert (raw != exact).float().mean() < 1e-3 if layer in partner else not shared


def test_attention_reads_each_layers_own_norms(native: Backend, reference: Backend) -> None:
    if FMT not in native.page_formats():
        pytest.skip("the backend has no pages that span layers")
    layout = PageLayout(32)
    state, _ = merged(native, layout, 400, 1)
    q = randn(state.rows, 6, 32, seed=9)
    outs = []
    for layer in range(LAYERS):
        exact = reference.attention(q, state.copy().batch, state.kv, layer, 0.2, 0)
        out = native.attention(q, state.copy().batch, state.kv, layer, 0.2, 0)
        torch.testing.assert_close(out, exact, atol=2e-6, rtol=1e-5)
        outs.append(out)
    assert not torch.allclose(outs[1], outs[2], atol=1e-2), "the layers have the same direction, but not the same norms"


def test_a_page_costs_two_lanes_the_bytes_of_one() -> None:
    for page_tokens in (16, 32, 64):
        layout = PageLayout(64, page_tokens=page_tokens)
        fit = layout.page_bytes // (2 * 2 * 64 + 8)
        assert layout.capacity(FMT) == (layout.page_bytes - 4) // (2 * 2 * 64 + 8) // 8 * 8
        assert fit - layout.capacity(FMT) < 8


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("damage", ["tokens", "pages", "table", "unmerged"])
def test_lanes_that_do_not_go_together_are_refused(name: str, damage: str) -> None:
    layout, ops = PageLayout(16), backend(name)
    state = build(layout, [Held((100,))], layers=4, kv_heads=1, spare=40)
    kv, slot = state.kv, int(state.batch.slots[0])
    none, rest = torch.zeros(4, 1, dtype=torch.int32), int32([0, 0, 1, 1])[:, None]
    keep = torch.arange(100, dtype=torch.int32).repeat(4, 1, 1)
    counts = torch.full((4, 1), 100, dtype=torch.int32)
    table = state.free[:40].view(4, 1, 10).clone()
    table[3, 0, 0] = table[2, 0, 0]
    first = 2
    if damage == "tokens":
        keep[3, 0, [4, 5]] = int32([5, 4])
    elif damage == "pages":
        rest[3] = 0
    elif damage == "table":
        table[3, 0, 0] = table[3, 0, 9]
    else:
        first = 3
    before = kv.data.clone()
    with pytest.raises((ValueError, IndexError)):
        ops.repack(
            kv, slot, keep, counts, none, table, none, layout.compute, Rest(none, rest, FMT, LayerMerge(first, 0.6))
        )
    lanes = kv.table[slot][kv.table[slot] >= 0].long()
    assert torch.equal(kv.data[lanes], before[lanes])


def test_no_page_of_two_layers_is_written_for_one(reference: Backend, native: Backend) -> None:
    layout = PageLayout(16)
    state = build(layout, [Held((100,))], kv_heads=1, spare=40)
    kv, slot = state.kv, int(state.batch.slots[0])
    keys, values = randn(1, 40, 16), randn(1, 40, 16, seed=2)
    for ops in (reference, native):
        with pytest.raises((ValueError, IndexError)):
            ops.write_lanes(kv, slot, 0, keys, values, int32([40]), int32([0]), state.free[None, :9], int32([1]), FMT)


def test_a_page_of_two_layers_is_held_by_both(reference: Backend) -> None:
    """One physical page: what is written to it both layers see."""
    state, partner = merged(reference, PageLayout(16), 100, 3)
    kv, slot = state.kv, int(state.batch.slots[0])
    assert partner == {3: 4, 4: 3}
    assert torch.equal(kv.table[slot, 3, :, 0], kv.table[slot, 4, :, 0])
    before = [reference.read_lanes(kv, slot, layer)[0].clone() for layer in range(LAYERS)]
    kv.data[kv.table[slot, 3, 0, 0].long(), :2] = 0
    changed = [bool((reference.read_lanes(kv, slot, layer)[0] != was).any()) for layer, was in enumerate(before)]
    assert changed == [False, False, False, True, True]
