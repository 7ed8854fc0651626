"""Sections of `make bench-gpu` that time kernels, beside torch's own on dense keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import linear, scaled_dot_product_attention

from gpu_clock import Call, first, seconds, seconds_launched, seconds_replayed, synchronize
from gpu_lanes import BF16, LLAMA, PAGE_TOKENS, SMOL, Heads, Lanes, lanes, layers_beyond_cache
from gpu_section import Section, cache_bytes
from winnow.kernels.dispatch import Backend, WeightKind
from winnow.kernels.layout import PageFormat, PageLayout

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None

FORMATS = (BF16, PageFormat.INT4, PageFormat.INT8, PageFormat.FP8, PageFormat.INT2)
SDPA, FLASH_ATTN = "torch SDPA", "flash-attn"
DENSE_KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


@dataclass(frozen=True)
class Kernels:
    """The measurements; each method adds one figure, or one to each of two tables."""

    section: Section
    ops: Backend

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.ops.device(), dtype=torch.bfloat16)

    def lanes(self, shape: Heads, sequences: int, context: int, fmt: PageFormat = BF16, **more: int) -> Lanes:
        return lanes(shape, self.ops.device(), sequences, context, fmt, **more)

    def replayed(self, calls: Sequence[Call]) -> float:
        self.section.first_run(first(calls))
        try:
            return seconds_replayed(calls)
        except RuntimeError as error:
            self.section.not_captured(error)
            return seconds_launched(calls)

    def launched(self, calls: Sequence[Call]) -> float:
        self.section.first_run(first(calls))
        return seconds_launched(calls)

    def with_host(self, call: Call) -> float:
        self.section.first_run(first([call]))
        return seconds(call)

    def attention(self, shape: Heads, state: Lanes) -> float:
        """Seconds of a layer's attention. Only steps of single rows that do not vote are replayed by the engine too."""
        q = self.randn(len(state.batch.positions), shape.heads, shape.dim)
        layers = range(state.kv.table.shape[1])
        calls = [partial(self.ops.attention, q, state.batch, state.kv, layer, shape.scale, 0) for layer in layers]
        is_decode = len(q) == len(state.batch.slots) and not state.kv.mass
        return self.replayed(calls) if is_decode else self.launched(calls)

    # Decode ----------------------------------------------------------------------------------------------------------

    def decode(self, shape: Heads, sequences: int, context: int, fmt: PageFormat) -> None:
        layers = layers_beyond_cache(shape, sequences, context, fmt, cache_bytes())
        state = self.lanes(shape, sequences, context, fmt, layers=layers)
        self.add_decode(shape, sequences, context, fmt.label, self.attention(shape, state), state.bytes)

    def add_decode(
        self, shape: Heads, sequences: int, context: int, column: str, taken: float, size: int, note: str = ""
    ) -> None:
        title, row = f"Decode attention of a layer, {shape.name}", f"{sequences} x {context}"
        times = self.section.table(f"decode {shape.name}", title, base_column=SDPA)
        times.add(row, column, "µs", 1e6 * taken, note)
        speeds = self.section.table(f"decode bandwidth {shape.name}", f"{title}: bytes of keys and values a second")
        speeds.add(row, column, "GB/s", size / taken / 1e9, note)

    def dense_decode(self, shape: Heads, sequences: int, context: int) -> None:
        """Torch's fastest kernel for this; only those count that read keys of a group of query heads once."""
        copies = layers_beyond_cache(shape, sequences, context, BF16, cache_bytes())
        q = self.randn(sequences, shape.heads, 1, shape.dim)
        dense = [self.randn(2, sequences, shape.kv_heads, context, shape.dim) for _ in range(copies)]
        found: dict[str, float] = {}
        for name, kernel in DENSE_KERNELS.items():
            if found and kernel is SDPBackend.MATH:
                break
            try:
                found[name] = self.replayed([partial(_sdpa, kernel, q, *kv) for kv in dense])
            except RuntimeError:  # has nothing for these shapes
                synchronize()
        best = min(found, key=lambda name: found[name])
        self.add_decode(shape, sequences, context, SDPA, found[best], dense[0].nbytes, best)
        if flash_attn_with_kvcache is not None:
            by_token = [kv.transpose(2, 3).contiguous() for kv in dense]
            taken = self.replayed([partial(flash_attn_with_kvcache, q.transpose(1, 2), *kv) for kv in by_token])
            self.add_decode(shape, sequences, context, FLASH_ATTN, taken, dense[0].nbytes)

    # Prefill ---------------------------------------------------------------------------------------------------------

    def prefill(self, shape: Heads, context: int, fmt: PageFormat) -> None:
        state = self.lanes(shape, 1, context, fmt, rows=self.section.sizes.chunk)
        self.add_prefill(shape, context, fmt.label, self.attention(shape, state))

    def dense_prefill(self, shape: Heads, context: int) -> None:
        chunk = self.section.sizes.chunk
        q, mask = self.randn(1, shape.heads, chunk, shape.dim), causal_lower_right(chunk, context)
        k, v = self.randn(2, 1, shape.kv_heads, context, shape.dim)
        call = partial(scaled_dot_product_attention, q, k, v, mask, enable_gqa=True)
        self.add_prefill(shape, context, SDPA, self.launched([call]))

    def add_prefill(self, shape: Heads, context: int, column: str, taken: float) -> None:
        chunk = self.section.sizes.chunk
        # A row reads what came before the chunk and, on average, half of the chunk; q·K and p·V.
        work = 4 * shape.heads * shape.dim * chunk * (context - chunk / 2)
        title = f"Attention of a chunk of {chunk} tokens, {shape.name}"
        table = self.section.table(f"prefill {shape.name}", title, base_column=SDPA)
        table.add(f"of {context}", column, "µs", 1e6 * taken, f"{work / taken / 1e12:.0f} TFLOP/s")

    def votes(self, row: str, column: str, sequences: int, context: int, rows: int, voters: int) -> None:
        title = f"Attention of a layer while rows vote, {LLAMA.name}"
        table = self.section.table("votes", title, base_column="none votes")
        state = self.lanes(LLAMA, sequences, context, rows=rows, layers=2, votes=voters)
        table.add(row, column, "µs", 1e6 * self.attention(LLAMA, state))

    # Repack ----------------------------------------------------------------------------------------------------------

    def seal(self, fmt: PageFormat) -> None:
        """The newest tokens of every lane, which fill one page of the format."""
        sizes, full = self.section.sizes, PageLayout(LLAMA.dim, BF16, PAGE_TOKENS).capacity(fmt)
        lanes_ = sizes.layers * LLAMA.kv_heads
        state = self.lanes(LLAMA, 1, sizes.repacked // full * full, fmt, rows=full, layers=sizes.layers, spare=lanes_)
        start, to = state.kv.sealed[0].clone(), state.kv.table[0].clone()
        fresh = torch.arange(len(state.kv.data) - lanes_, len(state.kv.data), dtype=torch.int32)
        to[..., int(start.max()) :] = -1
        to[..., int(start.max())] = fresh.view(start.shape)
        counts = torch.full_like(start, full)
        taken = self.with_host(partial(self.ops.repack, state.kv, 0, None, counts, start, to, start + 1, fmt))
        self.add_repack("seal a page's worth of tokens", fmt, taken)

    def evict(self, fmt: PageFormat) -> None:
        """A quarter of the tokens of every lane, which go to fresh pages."""
        sizes, layout = self.section.sizes, PageLayout(LLAMA.dim, BF16, PAGE_TOKENS)
        shape, count = (sizes.layers, LLAMA.kv_heads), sizes.repacked // 4
        sealed = 0 if fmt is BF16 else count // layout.capacity(fmt)
        columns = sealed + layout.pages(count - sealed * layout.capacity(fmt))
        spare = columns * shape[0] * shape[1]
        state = self.lanes(LLAMA, 1, sizes.repacked, layers=sizes.layers, spare=spare)
        fresh = torch.arange(len(state.kv.data) - spare, len(state.kv.data), dtype=torch.int32)
        keep = torch.rand(*shape, sizes.repacked).argsort(-1)[..., :count].sort(-1).values.int()
        counts, none = torch.full(shape, count, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
        to = fresh.view(*shape, columns)
        keep = keep.to(self.ops.device())
        taken = self.with_host(partial(self.ops.repack, state.kv, 0, keep, counts, none, to, none + sealed, fmt))
        self.add_repack(f"keep {count} of {sizes.repacked} tokens", fmt, taken)

    def copy(self) -> None:
        lanes_ = self.section.sizes.layers * LLAMA.kv_heads
        state = self.lanes(LLAMA, 1, PAGE_TOKENS, layers=self.section.sizes.layers, spare=lanes_)
        source = torch.arange(lanes_, dtype=torch.int32)
        taken = self.with_host(partial(self.ops.copy_pages, state.kv, source, source + lanes_))
        self.add_repack("copy a page", BF16, taken)

    def add_repack(self, row: str, fmt: PageFormat, taken: float) -> None:
        title = f"In each of {self.section.sizes.layers} x {LLAMA.kv_heads} lanes, {LLAMA.name}, host included"
        self.section.table("repack", title).add(row, fmt.label, "ms", 1e3 * taken)

    # Rows ------------------------------------------------------------------------------------------------------------

    def rms_norm(self, rows: int) -> None:
        hidden = self.section.sizes.hidden
        weight = torch.rand(hidden, device=self.ops.device()) + 0.5
        self.add_row("rms_norm", rows, partial(self.ops.rms_norm, self.randn(rows, hidden), weight, 1e-5))

    def silu_mul(self, rows: int) -> None:
        self.add_row("silu_mul", rows, partial(self.ops.silu_mul, self.randn(rows, 2 * self.section.sizes.wide)))

    def rope_write(self, rows: int) -> None:
        together = (rows, 1, 1) if rows <= 64 else (1, rows, rows)
        state = self.lanes(LLAMA, together[0], together[1], rows=together[2])
        cos, sin = torch.rand(2, rows, LLAMA.dim // 2, device=self.ops.device())
        qkv = self.randn(rows, (LLAMA.heads + 2 * LLAMA.kv_heads) * LLAMA.dim)
        more = (cos, sin, state.batch, state.kv, 0, None, None, 1e-5)
        self.add_row("rope_write", rows, partial(self.ops.rope_write, qkv, *more))

    def add_row(self, row: str, rows: int, call: Call) -> None:
        title = f"Row by row, {self.section.sizes.hidden} and {self.section.sizes.wide} wide"
        self.section.table("rows", title).add(row, f"{rows} rows", "µs", 1e6 * self.replayed([call]))

    def linear(self, name: str, n: int, k: int, kind: WeightKind | None) -> None:
        """`kind` None: torch's own product in bf16."""
        copies = -(-cache_bytes() * 4 // (2 * n * k))
        plain = [self.randn(n, k) / k**0.5 for _ in range(copies)]
        packed = [] if kind is None else [self.ops.pack(weight.float(), kind) for weight in plain]
        for rows in self.section.sizes.rows:
            x = self.randn(rows, k)
            own = [partial(self.ops.linear, x, weight) for weight in packed]
            taken = self.replayed(own or [partial(linear, x, weight) for weight in plain])
            table = self.section.table("linear", "Matrix products")
            table.add(f"{name} {n} x {k}, {kind or 'torch bf16'}", f"{rows} rows", "µs", 1e6 * taken)


def _sdpa(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def decode(section: Section, ops: Backend) -> None:
    """One new token of each sequence over its lanes."""
    kernels = Kernels(section, ops)
    for shape in (LLAMA, SMOL):
        for size in section.sizes.decode:
            for fmt in FORMATS:
                section.run(f"decode {shape.name} {size} {fmt.label}", partial(kernels.decode, shape, *size, fmt))
            section.run(f"decode {shape.name} {size} dense", partial(kernels.dense_decode, shape, *size))


def prefill(section: Section, ops: Backend) -> None:
    """A chunk of one prompt over what came before it; and what it costs that rows vote."""
    kernels, sizes = Kernels(section, ops), section.sizes
    for shape in (LLAMA, SMOL):
        for context in sizes.prefill:
            for fmt in (BF16, PageFormat.INT8, PageFormat.INT4) if context > sizes.chunk else (BF16,):
                section.run(
                    f"prefill {shape.name} {context} {fmt.label}", partial(kernels.prefill, shape, context, fmt)
                )
            section.run(f"prefill {shape.name} {context} dense", partial(kernels.dense_prefill, shape, context))
    for sequences, context in sizes.decode[:2]:
        for column, voters in (("none votes", 0), ("all vote", 1)):
            row = f"decode {sequences} x {context}"
            section.run(f"votes {row}: {column}", partial(kernels.votes, row, column, sequences, context, 1, voters))
    row, last = f"chunk of {sizes.chunk} of {sizes.prefill[-1]}", min(64, sizes.chunk)
    for column, voters in (("none votes", 0), (f"the last {last} vote", last), ("all vote", sizes.chunk)):
        measure = partial(kernels.votes, row, column, 1, sizes.prefill[-1], sizes.chunk, voters)
        section.run(f"votes {row}: {column}", measure)


def repack(section: Section, ops: Backend) -> None:
    """What compression costs when it happens, to all lanes of one sequence of a whole model."""
    kernels = Kernels(section, ops)
    for fmt in FORMATS[1:]:
        section.run(f"seal {fmt.label}", partial(kernels.seal, fmt))
    for fmt in FORMATS[:2]:
        section.run(f"evict {fmt.label}", partial(kernels.evict, fmt))
    section.run("copy pages", kernels.copy)


def rows(section: Section, ops: Backend) -> None:
    """What works row by row, in the sizes of Llama-3-8B."""
    kernels, sizes = Kernels(section, ops), section.sizes
    for one in (kernels.rms_norm, kernels.silu_mul, kernels.rope_write):
        for count in sizes.rows:
            section.run(f"{one.__name__} of {count} rows", partial(one, count))
    qkv = (LLAMA.heads + 2 * LLAMA.kv_heads) * LLAMA.dim
    shapes = {"qkv": (qkv, sizes.hidden), "gate_up": (2 * sizes.wide, sizes.hidden), "down": (sizes.hidden, sizes.wide)}
    kinds: tuple[WeightKind | None, ...] = ("bf16", "fp8", None)
    for name, (n, k) in shapes.items():
        for kind in kinds:
            section.run(f"linear {name} {kind or 'torch'}", partial(kernels.linear, name, n, k, kind))
