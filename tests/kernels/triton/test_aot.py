"""Kernels that serve real models, compiled for GPUs that are not there: nothing spills, pages are read in whole
vectors, products are those of tensor cores, the size of a step compiles nothing anew; and to launch them nothing is
asked of the device.

Compilation needs processes without the interpreter. Here a few variants are compiled, all of them by
`python -m winnow.kernels.triton.report`, whose committed result is of the variants that there are.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from winnow.kernels.layout import PageFormat
from winnow.kernels.triton import report
from winnow.kernels.triton.aot import SHARED_LIMITS
from winnow.kernels.triton.report import Variant, compiled

REGISTERS = {
    ("attend", "Llama 3.1 8B, decode"): 128,
    ("attend", "Llama 3.1 8B, decode, int4"): 224,
    ("attend", "Llama 3.1 8B, decode, f16"): 144,
    ("attend", "SmolLM2 135M, prefill, int8"): 248,
    ("merge", "Llama 3.1 8B, decode"): 64,
    ("_rope_write", "Llama 3.1 8B, decode, rope_write"): 64,
    ("_rms_norm", "Llama 3.1 8B, decode, rms_norm"): 40,
}
"""(kernel, workload) -> the most that a thread may have. A workload is the first that launches the variant."""
NARROW = r"(LDG|LDGSTS)\S*\.[US](8|16)"
"""Loads of less than four bytes"""
STEPS = """
from winnow.kernels.dispatch import backend
from winnow.kernels.triton.aot import recording
from winnow.kernels.triton.workloads import SMOLLM2, attention, rows

ops = backend("triton")
with recording(90) as taken:
    for batch in (5, 1, 16):
        for workload in (*attention(ops, SMOLLM2, batch, ()), *rows(ops, SMOLLM2, batch)):
            workload.run()
        print(sorted({launch.name for launch in taken()}))
"""

LAUNCHED = """
import json, sys
from winnow.kernels.triton.report import launches

for workload, launch in launches(int(sys.argv[1]), []):
    print(json.dumps([launch.name, workload, launch.options["num_warps"], launch.options["num_stages"]]))
"""
ROOT = Path(__file__).parents[3]


def lines_of(*arguments: str) -> list[list]:
    """What a process prints, line by line of JSON."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The environment of processes that compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def variants(outside: None) -> list[Variant]:
    """For all architectures, compiled beside each other."""
    wanted = list(dict.fromkeys(workload for _, workload in REGISTERS))
    with ThreadPoolExecutor() as pool:
        return [one for found in pool.map(lambda arch: compiled(arch, wanted), SHARED_LIMITS) for one in found]


def test_what_is_launched(variants: list[Variant]) -> None:
    found = {(one.machine.arch, one.machine.name, one.workload) for one in variants}
    assert found == {(arch, *launched) for arch in SHARED_LIMITS for launched in REGISTERS}


def test_nothing_spills(variants: list[Variant]) -> None:
    for one in variants:
        machine = one.machine
        assert (machine.stack, machine.local, machine.spills) == (0, 0, 0), one
        assert machine.registers <= REGISTERS[machine.name, one.workload], one


def test_a_block_fits_a_multiprocessor(variants: list[Variant]) -> None:
    for one in variants:
        assert one.machine.shared <= SHARED_LIMITS[one.machine.arch], one


def test_attention_multiplies_on_tensor_cores(variants: list[Variant]) -> None:
    for one in variants:
        assert (one.machine.tensor_core > 0) == (one.machine.name == "attend"), one


def test_pages_are_read_in_whole_vectors(variants: list[Variant]) -> None:
    """But for the scales of a page of codes, a number each for a channel or a token."""
    for one in variants:
        assert one.machine.wide_loads > 0, one
        if one.machine.name == "attend":
            is_quantized = PageFormat(int(one.constants["FORMAT"])).is_quantized
            assert one.machine.count(NARROW) <= (24 if is_quantized else 0), one


def test_the_size_of_a_step_compiles_nothing_anew(outside: None) -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], check=True, capture_output=True, text=True)
    first, *later = done.stdout.splitlines()
    assert "attend" in first
    assert later == ["[]", "[]"]


@pytest.mark.parametrize("arch", SHARED_LIMITS)
def test_what_was_reported_is_what_is_launched(outside: None, arch: int) -> None:
    said = Path(report.__file__).with_name("REPORT.md").read_text().split(f"### sm_{arch} (")[1].split("\n#")[0]
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| `")]
    reported = [[kernel.strip("`"), workload, *map(int, sizes[:2])] for kernel, _, workload, *sizes in rows]
    assert sorted(reported) == sorted(lines_of("-c", LAUNCHED, str(arch)))


def test_launching_a_step_asks_nothing_of_the_device(outside: None) -> None:
    """Nor waits for a copy to it. That something would be seen is seen where lanes are repacked, between steps."""
    *steps, (repack, asked, _) = lines_of("-m", "tests.kernels.triton.launching")
    assert repack == "repack" and asked
    launched = set()
    for name, asked, kernels in steps:
        assert not asked, name
        launched |= {*kernels}
    assert launched >= {
        "attend",
        "merge",
        "_rope_write",
        "_rms_norm",
        "_silu_mul",
        "_count",
        "_normalise",
        "_add_moments",
    }
    assert launched >= {"bound_pages", "score_pages", "score_tokens", "select", "take_over"}
