"""The report on the kernels: what it says of a variant that is wrong, and the bound on decode."""

from pathlib import Path

import pytest

from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.triton import report
from winnow.kernels.triton.aot import SHARED_LIMITS, Machine
from winnow.kernels.triton.report import BATCH, CONTEXT, Variant, roofline, summary, table
from winnow.kernels.triton.roofline import GPUS, Decode

CODE = {"LDG.E.128": 3, "LDGSTS.E.BYPASS.128": 2, "LDG.E.U16": 4, "HMMA.16816.F32.BF16": 5, "LDL": 1, "STL.64": 2}


def variant(name: str, instructions: dict[str, int], shared: int = 1024) -> Variant:
    machine = Machine(name, 80, 4, 3, 64, stack=0, local=0, shared=shared, instructions=instructions)
    return Variant("decode", {"FORMAT": str(len(instructions))}, machine)


def test_instructions_are_counted_by_what_they_do() -> None:
    machine = variant("attend", CODE).machine
    assert (machine.loads, machine.wide_loads, machine.tensor_core, machine.spills) == (9, 5, 5, 3)
    assert "| 5 of 9 | 5 |" in table(80, [variant("attend", CODE)])


def test_variants_of_a_kernel_are_told_apart() -> None:
    said = table(80, [variant("attend", CODE), variant("attend", {}), variant("merge", {})])
    assert "| `attend` | FORMAT 6 |" in said and "| `attend` | FORMAT 0 |" in said and "| `merge` |  |" in said


def test_what_is_wrong_is_named() -> None:
    large = variant("large", {}, shared=SHARED_LIMITS[80] + 1)
    said = summary({80: [variant("spilling", CODE), large], 90: [variant("fine", {})]}).splitlines()
    assert "spills in `spilling`" in said[0] and "too much shared memory in `large`" in said[0]
    assert "no spills" in said[1] and "`" not in said[1]


@pytest.mark.parametrize("arch", SHARED_LIMITS)
def test_no_variant_that_was_reported_is_wrong(arch: int) -> None:
    """To compile every variant takes too long for a test; `python -m winnow.kernels.triton.report` does."""
    said = Path(report.__file__).with_name("REPORT.md").read_text()
    (line,) = (line for line in said.splitlines() if line.startswith(f"- sm_{arch}:"))
    assert line.endswith("; no spills.")
    rows = [row for row in said.split(f"### sm_{arch} (")[1].split("\n#")[0].splitlines() if row.startswith("| `")]
    assert line.startswith(f"- sm_{arch}: {len(rows)} variants")
    for row in rows:
        kernel, _, workload, _, _, registers, stack, spills, kib, loads, products = row.strip("| ").split(" | ")
        assert (stack, spills) == ("0", "0") and int(registers) <= 255, row
        assert int(kib) * 1024 <= SHARED_LIMITS[arch], row
        if kernel == "`attend`":
            assert int(loads.split(" of ")[0]) > 0, row
            assert (int(products) > 0) == (" f32," not in workload), row


@pytest.mark.parametrize("fmt", [PageFormat.BF16, PageFormat.INT4])
def test_the_bound_on_decode_is_that_of_bytes(fmt: PageFormat) -> None:
    layout = PageLayout(128, PageFormat.BF16, 32)
    capacity = layout.capacity(fmt)
    decode = Decode(layout, q_heads=32, kv_heads=8, fmt=fmt, batch=2, context=10 * capacity + 5)
    lane = 10 * layout.offsets(fmt).end + 5 * layout.token_bytes(PageFormat.BF16)
    rows = 2 * 32 * 128 * 2 * 2  # queries and results of two sequences
    assert decode.bytes == 2 * 8 * lane + rows
    assert decode.flops == 2 * 32 * (10 * capacity + 5) * 2 * (2 * 128)  # q·k and p·v of each head and token
    assert decode.seconds(GPUS[1]) == pytest.approx(decode.bytes / 3.35e12)


def test_the_bound_that_was_committed_is_the_one_that_is_computed() -> None:
    assert roofline(BATCH, CONTEXT) in Path(report.__file__).with_name("REPORT.md").read_text()
