"""What can be said of the kernels without a GPU: `python -m winnow.kernels.triton.report` prints it in Markdown.

Every variant that the workloads launch, compiled for three architectures; and how fast decode could be at best.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton import knobs

from winnow.kernels.dispatch import backend
from winnow.kernels.layout import PageFormat
from winnow.kernels.triton.aot import SHARED_LIMITS, Launch, Machine, recording
from winnow.kernels.triton.device import page_formats
from winnow.kernels.triton.roofline import GPUS, Decode
from winnow.kernels.triton.workloads import MODELS, workloads

NAMES = {80: "A100", 90: "H100, H200", 100: "B200"}
BATCH, CONTEXT = 32, 8192
"""Of the bound on decode"""


@dataclass(frozen=True)
class Variant:
    workload: str
    """the first that launches it"""
    constants: dict[str, str]
    """compile-time parameters of the kernel"""
    machine: Machine


def launches(arch: int, wanted: list[str]) -> list[tuple[str, Launch]]:
    """What the workloads launch, or those that are wanted, names or models; each variant with the first that does. In a
    process of its own only."""
    launched = []
    with recording(arch) as taken:
        for workload in workloads(backend("triton")):
            if not wanted or workload.name in wanted or workload.name.split(",")[0] in wanted:
                workload.run()
                launched += [(workload.name, launch) for launch in taken()]
    return launched


def variants(arch: int, wanted: list[str]) -> Iterator[Variant]:
    """Compiles those."""
    for name, launch in launches(arch, wanted):
        constants = {key: str(value) for key, value in launch.constexprs.items() if value is not None}
        yield Variant(name, constants, launch.compile())


def compiled(arch: int, wanted: list[str]) -> list[Variant]:
    """`variants` in a process of its own."""
    command = [sys.executable, "-m", "winnow.kernels.triton.report", "--compile", str(arch), *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compilation for sm_{arch} failed:\n{done.stderr[-4000:]}")
    return [
        Variant(one["workload"], one["constants"], Machine(**one["machine"]))
        for one in map(json.loads, done.stdout.splitlines())
    ]


def table(arch: int, rows: list[Variant]) -> str:
    """One line for each variant."""
    lines = [
        f"### sm_{arch} ({NAMES[arch]})",
        "",
        "| kernel | variant | launched by | warps | stages | registers | stack | LDL, STL | KiB | wide loads | MMA |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: (row.machine.name, row.workload)):
        one = row.machine
        numbers = [one.warps, one.stages, one.registers, one.stack + one.local, one.spills, f"{one.shared / 1024:.0f}"]
        own = [f"{key} {value}" for key, value in row.constants.items() if _varies(key, one.name, rows)]
        cells = [
            f"`{one.name}`",
            ", ".join(own),
            row.workload,
            *numbers,
            f"{one.wide_loads} of {one.loads}",
            one.tensor_core,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _varies(constant: str, kernel: str, rows: list[Variant]) -> bool:
    return len({row.constants.get(constant) for row in rows if row.machine.name == kernel}) > 1


def summary(found: dict[int, list[Variant]]) -> str:
    """What is wrong with any of them."""
    lines = []
    for arch, rows in found.items():
        spilling = sorted({row.machine.name for row in rows if row.machine.spills or row.machine.stack})
        large = sorted({row.machine.name for row in rows if row.machine.shared > SHARED_LIMITS[arch]})
        said = [f"{len(rows)} variants, at most {max(row.machine.registers for row in rows)} registers a thread and "]
        said.append(f"{max(row.machine.shared for row in rows) / 1024:.0f} of {SHARED_LIMITS[arch] // 1024} KiB shared")
        said.append(f"; spills in {', '.join(f'`{name}`' for name in spilling)}" if spilling else "; no spills")
        said.append(f"; too much shared memory in {', '.join(f'`{name}`' for name in large)}" if large else "")
        lines.append(f"- sm_{arch}: {''.join(said)}.")
    return "\n".join(lines)


def roofline(batch: int, context: int) -> str:
    """A table for each model's decode, by format."""
    parts = []
    for model in MODELS[:2]:
        lines = [
            f"### {model.name}: {batch} sequences of {context} tokens, one layer",
            "",
            f"| format | MB | times less than bf16 | GFLOP | {' | '.join(f'{gpu.name}, µs' for gpu in GPUS)} |",
            f"| --- |{' ---: |' * (3 + len(GPUS))}",
        ]
        whole = Decode(model.layout, model.q_heads, model.kv_heads, PageFormat.BF16, batch, context)
        for fmt in page_formats():
            if fmt is PageFormat.F32:
                continue
            one = Decode(model.layout, model.q_heads, model.kv_heads, fmt, batch, context)
            times = [f"{1e6 * one.seconds(gpu):.0f}" for gpu in GPUS]
            cells = [fmt.label, f"{one.bytes / 1e6:.0f}", f"{whole.bytes / one.bytes:.2f}", f"{one.flops / 1e9:.1f}"]
            lines.append(f"| {' | '.join(cells + times)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def report(found: dict[int, list[Variant]], wanted: list[str], batch: int, context: int) -> str:
    versions = f"torch {torch.__version__}, triton {triton.__version__}, ptxas {knobs.nvidia.ptxas.version}"
    versions += f" ({knobs.nvidia.ptxas_blackwell.version} for sm_100)"
    only = f" for {', '.join(wanted)}" if wanted else ""
    return "\n\n".join(
        [
            "# The Triton kernels without a GPU",
            f"Written by `python -m winnow.kernels.triton.report` with {versions}. Nothing here was measured.",
            "## Machine code",
            f"Every variant that the workloads of `kernels/triton/workloads.py`{only} launch, compiled ahead of time"
            " and read from its machine code. Registers and stack are by thread. LDL and STL are loads and stores of"
            " local memory: registers that spilled. KiB is shared memory. Of the loads of global memory the wide ones"
            " are those of 16 bytes a thread, as wide as they get. MMA counts instructions of tensor cores."
            " Instructions are counted where they stand, not as often as they run.",
            summary(found),
            *(table(arch, rows) for arch, rows in found.items()),
            "## Decode at best",
            "Bytes that attention must read of pages in each format, with queries and results, over the published"
            " bandwidth of memory; or its multiplications over the published peak of bf16, where that takes longer,"
            " which is nowhere here. Computed, not measured: a bound from below.",
            roofline(batch, context),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=BATCH, help="sequences of the bound on decode")
    parser.add_argument("--context", type=int, default=CONTEXT, help="their tokens")
    parser.add_argument("--out", type=Path, help="where to write the report instead of printing it")
    parser.add_argument("--compile", type=int, choices=SHARED_LIMITS, help="one architecture only, as lines of JSON")
    parser.add_argument("workloads", nargs="*", help="their names, or models; all if there is none")
    args = parser.parse_args()
    if args.compile:
        for variant in variants(args.compile, args.workloads):
            print(json.dumps(asdict(variant)), flush=True)
        return
    with ThreadPoolExecutor() as pool:
        found = dict(
            zip(SHARED_LIMITS, pool.map(lambda arch: compiled(arch, args.workloads), SHARED_LIMITS), strict=True)
        )
    text = report(found, args.workloads, args.batch, args.context) + "\n"
    if args.out:
        args.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
