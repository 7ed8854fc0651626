"""Tiles of attention, tried one after the other: what kernels/triton/config.py should say of a card.

Many are compiled, each in one of several processes that fill Triton's cache, then measured by this one.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import product

import torch

from gpu_clock import HAS_GPU
from gpu_kernels import Kernels
from gpu_lanes import BF16, LLAMA, Lanes, lanes, layers_beyond_cache
from gpu_section import Section, cache_bytes
from winnow.kernels.dispatch import Backend, backend
from winnow.kernels.layout import PageFormat

PROCESSES = 12


@dataclass(frozen=True)
class Case:
    """A batch, and how its attention is cut: see `Tile` there."""

    sequences: int
    context: int
    rows: int
    fmt: PageFormat
    m: int
    """0: as the table has it"""
    n: int
    num_warps: int
    num_stages: int

    @property
    def row(self) -> str:
        return f"M {self.m or 'least'}, N {self.n}, {self.num_warps} warps, {self.num_stages} stages"

    @property
    def column(self) -> str:
        return f"{self.sequences} x {self.context} {self.fmt.label}"


@contextmanager
def _tile(case: Case) -> Iterator[None]:
    attention = import_module("winnow.kernels.triton.attention")
    table = attention.attend_tile

    def tile(is_decode: bool, *more: object) -> object:
        known = table(is_decode, *more)
        if is_decode is (case.rows > 1):
            return known
        return replace(known, M=case.m or known.M, N=case.n, num_warps=case.num_warps, num_stages=case.num_stages)

    attention.attend_tile = tile
    try:
        yield
    finally:
        attention.attend_tile = table


def _state(case: Case, ops: Backend) -> Lanes:
    size = (case.sequences, case.context, case.fmt)
    layers = 1 if case.rows > 1 else layers_beyond_cache(LLAMA, *size, cache_bytes())
    return lanes(LLAMA, ops.device(), *size, rows=case.rows, layers=layers)


def _compile(case: Case) -> None:
    """In a process of its own."""
    ops = backend("triton")
    with suppress(Exception), torch.inference_mode(), _tile(case):  # what cannot be compiled is found out again
        state = _state(case, ops)
        q = torch.zeros(len(state.batch.positions), LLAMA.heads, LLAMA.dim, dtype=torch.bfloat16, device=ops.device())
        for layer in range(state.kv.table.shape[1]):
            ops.attention(q, state.batch, state.kv, layer, LLAMA.scale, 0)


def tune(section: Section, ops: Backend) -> None:
    sizes, kernels = section.sizes, Kernels(section, ops)
    decode = [(*size, 1) for size in sizes.decode[:2]]
    cases = [
        Case(*size, fmt, 0, n, warps, stages)
        for n, warps, stages in product((32, 64, 128), (4, 8), (2, 3, 4))
        for size in decode
        for fmt in (BF16, PageFormat.INT4, PageFormat.INT8)
    ]
    cases += [
        Case(1, sizes.prefill[-1], sizes.chunk, fmt, m, n, warps, stages)
        for m, n, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3))
        for fmt in (BF16, PageFormat.INT4)
    ]
    if HAS_GPU:
        with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
            pool.map(_compile, cases, chunksize=1)
    else:
        cases = cases[:: len(cases) // 4]  # the interpreter is slow

    def measure(case: Case) -> None:
        with _tile(case):
            taken = kernels.attention(LLAMA, _state(case, ops))
        title = f"Tiles for {'chunks' if case.rows > 1 else 'decode'}, {LLAMA.name}"
        section.table(f"tune {title}", title).add(case.row, case.column, "µs", 1e6 * taken)

    for case in cases:
        section.run(f"{case.column}: {case.row}", partial(measure, case))
