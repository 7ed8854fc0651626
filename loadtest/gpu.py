"""`make bench-gpu`: the GPU backend's kernels and the engine on one GPU, beside torch and transformers, in one command.

    python loadtest/gpu.py                         everything: about eight minutes on an H100
    python loadtest/gpu.py --only kernels --only repack --out /tmp/kernels.json
    python loadtest/gpu.py --tiny                  a rehearsal where there is no GPU, in Triton's interpreter

Results are written after every measurement. A measurement that fails is named in them and costs no other.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console

if not torch.cuda.is_available():  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import triton

import gpu_baseline
import gpu_engine
import gpu_kernels
import gpu_tune
from gpu_clock import HAS_GPU, first, seconds_replayed
from gpu_section import TINY, Section, Sizes
from machine import ROOT
from report import Report
from winnow.kernels.dispatch import BackendName, backend

SECTIONS = {
    "kernels": (gpu_kernels.decode, 90),
    "prefill": (gpu_kernels.prefill, 60),
    "repack": (gpu_kernels.repack, 40),
    "rows": (gpu_kernels.rows, 60),
    "engine": (gpu_engine.engine, 150),
    "baseline": (gpu_baseline.baseline, 60),
    "tune": (gpu_tune.tune, 200),
}
"""What is measured, in this order, and the seconds after which the rest of a section is left out"""
ASKED_FOR = ("tune",)
"""Left out unless named"""


def facts() -> dict[str, Any]:
    known: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if HAS_GPU:
        card = torch.cuda.get_device_properties(0)
        known |= {"gpu": card.name, "memory_gib": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return known


def ceilings() -> dict[str, float]:
    """What this card reaches: bytes read and written by a copy, and a matrix product in bf16."""
    if not HAS_GPU:
        return {}
    source, target = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda")
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy, product = (lambda: target.copy_(source)), (lambda: a @ b)
    first([copy, product])
    return {
        "copy_gb_s": round(2 * source.nbytes / seconds_replayed([copy]) / 1e9),
        "bf16_tflop_s": round(2 * 8192**3 / seconds_replayed([product]) / 1e12),
    }


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SECTIONS)}; repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file of the results.")] = ROOT / "loadtest" / "results" / "gpu.json",
    ops: Annotated[str, typer.Option("--backend", hidden=True)] = "triton",
    tiny: Annotated[bool, typer.Option("--tiny", hidden=True)] = False,
) -> None:
    """Measures the GPU backend; prints tables and writes JSON."""
    if unknown := set(only or ()) - set(SECTIONS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not among {', '.join(SECTIONS)}", param_hint="--only")
    if not (HAS_GPU or tiny):
        raise typer.BadParameter("there is no GPU; --tiny rehearses without one")
    console, began = Console(width=None if sys.stdout.isatty() else 150), time.monotonic()
    sizes = TINY if tiny else Sizes()
    report = Report(out.stem, facts() | {"ceilings": ceilings()})
    console.print(report.facts, highlight=False)
    told: dict[str, Any] = {}
    report.facts["sections"] = told

    def write() -> None:
        told[section.name] = section.as_dict()
        report.write(out.parent)

    wanted = list(only or [name for name in SECTIONS if name not in ASKED_FOR])
    try:
        with torch.inference_mode():
            while wanted:
                name = wanted.pop(0)
                measure, limit_s = SECTIONS[name]
                section = Section(name, report, sizes, math.inf if tiny else limit_s, write)
                console.print(f"{time.monotonic() - began:6.0f} s  {name}", highlight=False)
                measure(section, backend(cast(BackendName, ops)))
                write()
                if section.is_broken:
                    break
                gc.collect()
                if HAS_GPU:
                    torch.cuda.empty_cache()
    finally:
        report.show(console)
        for name, one in told.items():
            console.print(f"{name}: {one['seconds']} s, of which first runs {one['first_runs_s']} s", highlight=False)
            for what in ("left_out", "failed", "uncaptured"):
                if one[what]:
                    console.print(f"  {what}: {', '.join(one[what])}", highlight=False, markup=False)
        console.print(f"written to {report.write(out.parent)}", highlight=False)
    if wanted:  # the device was lost: a process of its own has it again
        more = out.with_stem(f"{out.stem}-{wanted[0]}")
        names = [part for name in wanted for part in ("--only", name)]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, __file__, *names, "--out", str(more), *(["--tiny"] if tiny else [])])


if __name__ == "__main__":
    typer.run(main)
