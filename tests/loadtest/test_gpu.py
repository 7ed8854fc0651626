"""The GPU benchmark's states and its bookkeeping. What it measures is not tested."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import gpu
import pytest
import torch
import typer
from gpu_lanes import BF16, LLAMA, SMOL, lanes
from gpu_model import TINY as TINY_MODEL
from gpu_model import random_model
from gpu_section import TINY, Section
from report import Report

from winnow.kernels.dispatch import backend
from winnow.kernels.layout import PageFormat

CPU = torch.device("cpu")


@pytest.mark.parametrize("fmt", [fmt for fmt in PageFormat if fmt is not PageFormat.F32 and not fmt.is_opened])
@pytest.mark.parametrize(("context", "rows"), [(700, 1), (700, 130), (5, 5)])
def test_lanes_hold_numbers(fmt: PageFormat, context: int, rows: int) -> None:
    """Attention over them is finite, as it would not be over pages taken for another format's."""
    shape = replace(SMOL, kv_heads=1, heads=2)
    state = lanes(shape, CPU, 2, context, fmt, rows=rows, layers=2, votes=1)
    assert bool((state.kv.kept == context).all())
    assert state.kv.table.unique().numel() == state.kv.table.numel() <= len(state.kv.data)
    q = torch.randn(2 * rows, 2, shape.dim)
    reference = backend("reference")
    for layer in range(2):
        out = reference.attention(q, state.batch, state.kv, layer, shape.scale, 0)
        assert bool(out.isfinite().all()) and float(out.abs().max()) < 10
        for slot in range(2):  # the one row that voted, for each of its queries
            torch.testing.assert_close(state.kv.mass[slot][layer].sum(), torch.tensor(2.0))


def test_bytes_to_be_read() -> None:
    held = lanes(LLAMA, CPU, 3, 64, BF16)
    assert held.bytes == 3 * 8 * 64 * 2 * 128 * 2
    packed = lanes(LLAMA, CPU, 1, 640, PageFormat.INT4)
    assert 0.2 < packed.bytes / (8 * 640 * 2 * 128 * 2) < 0.4


def test_a_model_of_random_weights_is_a_model() -> None:
    model = random_model(TINY_MODEL, backend("reference"), "f32")
    state = lanes(replace(LLAMA, kv_heads=2, heads=4, dim=16), CPU, 1, 6, rows=6, layers=2)
    logits = model.forward(torch.arange(6, dtype=torch.int32), state.batch, state.kv, torch.arange(6))
    assert logits.shape == (6, 128)
    assert bool(logits.isfinite().all()) and float(logits.std()) > 0.1


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "HAS_GPU", False)
    with pytest.raises(typer.BadParameter, match="no GPU"):
        gpu.main(out=tmp_path / "gpu.json")
    assert not list(tmp_path.iterdir())


def test_what_fails_costs_nothing_else() -> None:
    written = []
    section = Section("unit", Report("unit", {}), TINY, 60.0, lambda: written.append(True))
    done = []

    def fails() -> None:
        raise ValueError("no such kernel")

    section.run("first", lambda: done.append("first"))
    section.run("second", fails)
    section.run("third", lambda: done.append("third"))
    assert done == ["first", "third"] and len(written) == 3
    assert "no such kernel" in section.failed["second"]
    section.began = time.monotonic() - 61
    section.run("late", lambda: done.append("late"))
    assert section.as_dict()["left_out"] == ["late"] and len(done) == 2
