"""What models that are served ask of the kernels: the calls from which ahead-of-time reports and tests take variants.

A workload is one call of one operation, with shapes of a real model and a few sequences; its memory is never filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend, WeightKind
from winnow.kernels.kv import LaneBatch, PagedKV, Rest
from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reading import ReadMode, ReadRule, ReadState
from winnow.kernels.triton.device import page_formats
from winnow.kernels.vote import Vote

LAYERS = 2
KINDS: dict[torch.dtype, tuple[WeightKind, ...]] = {
    torch.float32: ("f32",),
    torch.bfloat16: ("bf16", "fp8"),
    torch.float16: ("f16",),
}
"""Of weights, by the activations beside them"""
SEALED = tuple(fmt for fmt in page_formats() if fmt not in (PageFormat.F32, PageFormat.BF16))
"""Formats that full pages are turned into, in which no new token is written"""


@dataclass(frozen=True)
class Model:
    name: str
    head_dim: int
    q_heads: int
    kv_heads: int
    hidden: int
    has_qk_norm: bool = False
    dtype: torch.dtype = torch.bfloat16
    """of activations"""

    @property
    def layout(self) -> PageLayout:
        if self.dtype is torch.float32:
            return PageLayout(self.head_dim, PageFormat.F32, 16)
        return PageLayout(self.head_dim, PageFormat.BF16 if self.dtype is torch.bfloat16 else PageFormat.F16, 32)


SMOLLM2 = Model("SmolLM2 135M", head_dim=64, q_heads=9, kv_heads=3, hidden=576)
LLAMA = Model("Llama 3.1 8B", head_dim=128, q_heads=32, kv_heads=8, hidden=4096)
QWEN = Model("Qwen3 8B", head_dim=128, q_heads=32, kv_heads=8, hidden=4096, has_qk_norm=True)
MODELS = (SMOLLM2, LLAMA, QWEN)
OTHER_HEADS = tuple(Model(f"heads of {dim}", dim, q_heads=32, kv_heads=8, hidden=32 * dim) for dim in (80, 96, 256))
"""Of no model in particular"""


@dataclass(frozen=True)
class Step:
    """A step of a model: `batch` sequences of `rows` rows each, over lanes of some full pages and open ones."""

    model: Model
    batch: int = 5
    rows: int = 1
    fmt: PageFormat | None = None
    """of full pages"""
    rest: PageFormat | None = None
    """of full pages behind them"""
    vote: Vote | None = None
    """its rows vote"""
    rule: ReadRule | None = None
    """its rows read by it"""
    has_positions: bool = False
    has_log_weights: bool = False
    pages: int = 4
    """full ones of each format"""
    tokens: int = 250
    """in open pages"""

    def build(self) -> tuple[PagedKV, LaneBatch, Tensor]:
        """Memory, rows and queries [T, Hq, D]."""
        model, layout = self.model, self.model.layout
        parts = [fmt for fmt in (self.fmt, self.rest) if fmt is not None]
        width = self.pages * len(parts) + layout.pages(self.tokens)
        pages = self.batch * LAYERS * model.kv_heads * width
        kv = PagedKV.allocate(layout, pages, self.batch, LAYERS, model.kv_heads, width)
        kv.table[:] = torch.arange(pages, dtype=torch.int32).view_as(kv.table)
        kv.kept.fill_(self.tokens + self.pages * sum(layout.capacity(fmt) for fmt in parts))
        for count, codes, fmt in ((kv.sealed, kv.formats, self.fmt), (kv.rest, kv.rest_formats, self.rest)):
            if fmt is not None:
                count.fill_(self.pages)
                codes.fill_(int(fmt))
        for slot in range(self.batch):
            self._add_sides(kv, slot)
        first, rows = int(kv.kept[0, 0, 0]) - self.rows, self.batch * self.rows
        batch = LaneBatch(
            slots=torch.arange(self.batch, dtype=torch.int32),
            cu_rows=self.rows * torch.arange(self.batch + 1, dtype=torch.int32),
            positions=torch.arange(first, first + self.rows, dtype=torch.int32).repeat(self.batch),
            first_vote=torch.full((self.batch,), self.rows if self.vote is None else 0, dtype=torch.int32),
        )
        batch.make_room_for_choices(kv)
        return kv, batch, torch.zeros(rows, model.q_heads, model.head_dim, dtype=model.dtype)

    def _add_sides(self, kv: PagedKV, slot: int) -> None:
        shape, model = (LAYERS, self.model.kv_heads, int(kv.kept[slot].max())), self.model
        if self.vote is not None:
            kv.votes[slot], kv.mass[slot] = self.vote, torch.zeros(shape)
            if self.vote.is_noisy:
                kv.noise[slot] = torch.zeros(shape)
            dim = model.head_dim
            kv.moments[slot] = torch.zeros(LAYERS, model.q_heads, 1 + dim, dim, dtype=torch.float64)
        if self.has_positions:
            kv.positions[slot] = torch.zeros(shape, dtype=torch.int32)
        if self.has_log_weights:
            kv.log_weights[slot] = torch.zeros(shape)
        if self.rule is not None:
            state = ReadState.empty(self.rule, LAYERS, model.kv_heads, model.q_heads, model.head_dim)
            state.resize(shape[2], kv.table.shape[3])
            kv.reading[slot] = state


@dataclass(frozen=True)
class Workload:
    name: str
    run: Callable[[], object] = field(repr=False)


def workloads(ops: Backend, batch: int = 5) -> Iterator[Workload]:
    """All of them, for steps of so many sequences: attention, what else a step does, what happens between steps."""
    for model in (SMOLLM2, LLAMA):
        yield from attention(ops, model, batch)
    f32 = replace(SMOLLM2, name="SmolLM2 135M f32", dtype=torch.float32)
    yield from attention(ops, f32, batch, (PageFormat.INT4,))
    f16 = replace(LLAMA, name="Llama 3.1 8B f16", dtype=torch.float16)
    yield from attention(ops, f16, batch, (PageFormat.INT4,))
    for model in OTHER_HEADS:
        yield from attention(ops, model, batch)
    for model in (*MODELS, *OTHER_HEADS, f16):
        yield from rows(ops, model, batch)
    for model in (SMOLLM2, LLAMA):
        yield from signals(ops, model, batch)
        yield from between_steps(ops, model)


def attention(ops: Backend, model: Model, batch: int, formats: tuple[PageFormat, ...] = SEALED) -> Iterator[Workload]:
    """Decode and prefill over open pages, over full pages of each format, and of two."""

    def call(what: str, step: Step, window: int = 0) -> Workload:
        def run() -> None:
            kv, rows, q = step.build()
            ops.attention(q, rows, kv, 0, 0.125, window)

        return Workload(f"{model.name}, {what}", run)

    for what, count in (("decode", 1), ("prefill", 200)):
        step = Step(model, batch, count)
        yield call(what, step)
        for fmt in formats:
            yield call(f"{what}, {fmt.label}", replace(step, fmt=fmt))
        yield call(f"{what}, int4 and int2", replace(step, fmt=PageFormat.INT4, rest=PageFormat.INT2))
        yield call(f"{what}, int4, votes", replace(step, fmt=PageFormat.INT4, vote=Vote(), has_positions=True))
        noisy = Vote("max", temperature=2.0, is_noisy=True)
        yield call(f"{what}, int4, noisy votes", replace(step, fmt=PageFormat.INT4, vote=noisy, has_positions=True))
        merged = replace(step, has_log_weights=True, has_positions=True)
        yield call(f"{what}, window, weighted tokens", merged, window=64)


def rows(ops: Backend, model: Model, batch: int) -> Iterator[Workload]:
    """A layer's other operations, on a row for each sequence and on a chunk of a prompt."""
    dim, heads, hidden = model.head_dim, model.q_heads + 2 * model.kv_heads, model.hidden

    def rope_write(step: Step) -> None:
        kv, rows, q = step.build()
        norm = torch.ones(dim) if model.has_qk_norm else None
        tables = torch.zeros(2, 4096, dim // 2)
        ops.rope_write(q.new_zeros(len(q), heads * dim), tables[0], tables[1], rows, kv, 0, norm, norm, 1e-5)

    def linear(count: int) -> None:
        for kind in KINDS[model.dtype]:
            weight = ops.pack(torch.zeros(256, hidden), kind)
            x = ops.embed(torch.zeros(count, dtype=torch.int32), weight)
            ops.linear(x, weight)
            ops.linear(x[:, :256].contiguous(), ops.pack(torch.zeros(hidden, 256), kind), out=x, accumulate=True)

    for what, count in (("decode", 1), ("prefill", 200)):
        step, x = Step(model, batch, count), torch.zeros(batch * count, hidden, dtype=model.dtype)
        yield Workload(f"{model.name}, {what}, rope_write", partial(rope_write, step))
        yield Workload(f"{model.name}, {what}, rms_norm", partial(ops.rms_norm, x, torch.ones(hidden), 1e-5))
        yield Workload(f"{model.name}, {what}, silu_mul", partial(ops.silu_mul, x.repeat(1, 4)))
        yield Workload(f"{model.name}, {what}, linear", partial(linear, batch * count))


def signals(ops: Backend, model: Model, batch: int) -> Iterator[Workload]:
    """What policies look at in a step: moments of queries, and choices of what to read."""
    modes = torch.full((LAYERS,), int(ReadMode.CHOSEN), dtype=torch.uint8)
    channels = torch.arange(16, dtype=torch.int32).expand(LAYERS, model.kv_heads, 16).contiguous()
    rules = {
        "bounds of pages": ReadRule(modes, tokens=64),
        "channels": ReadRule(modes, tokens=64, channels=channels),
        "channels, pooled": ReadRule(modes, tokens=64, channels=channels, votes_by_layer=True, pool=5, similarity=0.9),
    }

    def moments(step: Step) -> None:
        kv, rows, q = step.build()
        qkv = q.new_zeros(len(q), (model.q_heads + 2 * model.kv_heads) * model.head_dim)
        ops.query_moments(qkv, rows, kv, 0, torch.ones(model.head_dim) if model.has_qk_norm else None, 1e-5)

    def choose(step: Step) -> None:
        kv, rows, q = step.build()
        ops.choose_reads(q, rows, kv, 0, 0.125, 0)
        ops.attention(q, rows, kv, 0, 0.125, 0)

    for what, count in (("decode", 1), ("prefill", 200)):
        step = Step(model, batch, count, vote=Vote())
        yield Workload(f"{model.name}, {what}, query_moments", partial(moments, step))
    for fmt in (None, *SEALED):
        label = "open pages" if fmt is None else fmt.label
        for name, rule in rules.items():
            yield Workload(
                f"{model.name}, choose_reads, {name}, {label}", partial(choose, Step(model, fmt=fmt, rule=rule))
            )


def between_steps(ops: Backend, model: Model) -> Iterator[Workload]:
    """What compression does to lanes, and what it looks at."""
    lanes = (LAYERS, model.kv_heads)

    def repack(held: PageFormat | None, fmt: PageFormat, rest: PageFormat | None, count: int | None) -> None:
        kv, _, _ = Step(model, fmt=held, tokens=300).build()
        kept = int(kv.kept[0, 0, 0])
        keep = None if count is None else torch.arange(count, dtype=torch.int32).expand(*lanes, count).contiguous()
        counts = torch.full(lanes, kept if count is None else count, dtype=torch.int32)
        none, sealed = torch.zeros(lanes, dtype=torch.int32), torch.full(lanes, 1, dtype=torch.int32)
        second = None if rest is None else Rest(none, sealed, rest)
        ops.repack(kv, 0, keep, counts, none, kv.table[1].clone(), sealed, fmt, second)

    for fmt in SEALED:
        yield Workload(f"{model.name}, repack to {fmt.label}", partial(repack, None, fmt, None, None))
        yield Workload(f"{model.name}, repack of some {fmt.label}", partial(repack, fmt, fmt, None, 160))
    mixed = partial(repack, None, PageFormat.INT4, PageFormat.INT2, 290)
    yield Workload(f"{model.name}, repack to int4 and int2", mixed)

    def read_lanes(fmt: PageFormat | None) -> None:
        ops.read_lanes(Step(model, fmt=fmt).build()[0], 0, 0)

    for held in (None, *SEALED):
        yield Workload(f"{model.name}, read_lanes, {_label(held)}", partial(read_lanes, held))

    def write_lanes(fmt: PageFormat) -> None:
        kv, _, _ = Step(model).build()
        keys = torch.zeros(model.kv_heads, 150, model.head_dim)
        counts, none = (torch.full((model.kv_heads,), n, dtype=torch.int32) for n in (150, 0))
        ops.write_lanes(kv, 0, 0, keys, keys.clone(), counts, none, kv.table[0, 0].clone(), none + 1, fmt)

    def copy_pages() -> None:
        kv, _, _ = Step(model).build()
        ops.copy_pages(kv, torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([3, 4, 5], dtype=torch.int32))

    def merge_tokens() -> None:
        x, count = torch.zeros(model.kv_heads, 100, model.head_dim), torch.full((model.kv_heads,), 100).int()
        ops.nearest_rows(x, count, x.clone(), count)
        ops.sum_rows(x, torch.zeros(x.shape[:2]), torch.zeros(x.shape[:2], dtype=torch.int32), 50)

    yield Workload(f"{model.name}, write_lanes, int4", partial(write_lanes, PageFormat.INT4))
    yield Workload(f"{model.name}, copy_pages", copy_pages)
    yield Workload(f"{model.name}, nearest_rows and sum_rows", merge_tokens)


def _label(fmt: PageFormat | None) -> str:
    return "open pages" if fmt is None else fmt.label
