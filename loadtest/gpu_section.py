"""A section of `make bench-gpu`: it has a limit of time, and what fails or is left out does not cost the rest."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from gpu_clock import HAS_GPU
from gpu_model import LLAMA_8B
from gpu_model import TINY as TINY_MODEL
from report import Report, Table
from winnow.kernels.dispatch import WeightKind


@dataclass(frozen=True)
class Sizes:
    """How large everything is; as they stand, for one H100."""

    decode: tuple[tuple[int, int], ...] = ((32, 8192), (1, 32768), (8, 8192), (64, 2048))
    """(sequences, tokens of each)"""
    prefill: tuple[int, ...] = (2048, 8192)
    chunk: int = 2048
    layers: int = 32
    repacked: int = 8192
    hidden: int = 4096
    wide: int = 14336
    rows: tuple[int, ...] = (1, 8, 64, 2048)
    model: dict[str, Any] = field(default_factory=lambda: LLAMA_8B)
    weights: WeightKind = "bf16"
    arena_gib: float = 48
    max_seqs: int = 256
    engine_decode: tuple[tuple[int, int], ...] = ((1, 8192), (32, 8192), (8, 8192), (64, 2048), (64, 8192), (8, 2048))
    engine_prefill: tuple[tuple[int, int], ...] = ((1, 8192), (8, 2048))
    capacity_context: int = 8192
    capacity_gib: float = 12
    baseline: tuple[tuple[int, int], ...] = ((1, 8192), (8, 8192), (1, 2048), (8, 2048))
    warm_steps: int = 5
    """Before steps are timed: the engine records them meanwhile"""
    steps: int = 16


TINY = Sizes(
    decode=((2, 70), (1, 40)),
    prefill=(32, 64),
    chunk=32,
    layers=2,
    repacked=256,
    hidden=64,
    wide=128,
    rows=(1, 3),
    model=TINY_MODEL,
    weights="f32",
    arena_gib=0.004,
    max_seqs=6,
    engine_decode=((2, 96),),
    engine_prefill=((1, 96),),
    capacity_context=96,
    capacity_gib=0.0003,
    baseline=((2, 96),),
    warm_steps=1,
    steps=1,
)
"""For a rehearsal where there is no GPU"""


def cache_bytes() -> int:
    """Of the device's last cache: what is read again and again must be several times as large."""
    return torch.cuda.get_device_properties(0).L2_cache_size if HAS_GPU else 1 << 10


@dataclass
class Section:
    name: str
    report: Report
    sizes: Sizes
    limit_s: float
    write: Callable[[], None]
    began: float = field(default_factory=time.monotonic)
    first_runs_s: float = 0.0
    """Compilation, for the most part"""
    left_out: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    uncaptured: dict[str, str] = field(default_factory=dict)
    """Measured without a graph, and why"""
    _current: str = ""
    is_broken: bool = False
    """The process has lost its device"""

    @property
    def seconds_left(self) -> float:
        return self.limit_s - (time.monotonic() - self.began)

    def table(self, key: str, title: str = "", base_row: str | None = None, base_column: str | None = None) -> Table:
        return self.report.table(key, title, base_row, base_column)

    def first_run(self, seconds: float) -> None:
        self.first_runs_s += seconds

    def not_captured(self, error: Exception) -> None:
        self.uncaptured[self._current] = str(error).splitlines()[0]

    def run(self, name: str, measure: Callable[[], object]) -> None:
        """One measurement; the time limit and what it raises end it alone."""
        if self.seconds_left < 0 or self.is_broken:
            self.left_out.append(name)
            return
        self._current = name
        try:
            measure()
        except Exception as error:
            self.failed[name] = "".join(traceback.format_exception(error)[-3:])
            print(f"{name} failed: {error}", flush=True)
            self.is_broken = _device_is_lost()
        self.write()

    def as_dict(self) -> dict[str, object]:
        return {
            "seconds": round(time.monotonic() - self.began, 1),
            "first_runs_s": round(self.first_runs_s, 1),
            "left_out": self.left_out,
            "failed": self.failed,
            "uncaptured": self.uncaptured,
        }


def _device_is_lost() -> bool:
    """An access out of bounds leaves a process without its device."""
    try:
        if HAS_GPU:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False
