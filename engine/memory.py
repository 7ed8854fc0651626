"""How many pages the arena has: as many as the settings say or, on a GPU, as its memory holds beside the rest.

    pages = utilization * memory - what is in use when the model is loaded - what a step takes at its peak

What a step takes is measured: one of `max_step_tokens` rows is run, and one as recorded steps are, through lanes that
share a single page.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from winnow.engine.config import EngineSettings
from winnow.engine.errors import ModelError
from winnow.engine.messages import SamplingParams
from winnow.engine.models.decoder import Decoder
from winnow.engine.sampler import Drawn, Sampler
from winnow.engine.sampling import SamplingTable
from winnow.kernels.dispatch import Backend
from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageLayout

log = logging.getLogger(__name__)


def arena_pages(settings: EngineSettings, model: Decoder, layout: PageLayout, ops: Backend) -> int:
    """Pages of the arena. ModelError where a GPU's memory is spent before there are any."""
    if settings.kv_memory_gib is not None:
        return int(settings.kv_memory_gib * 2**30) // layout.page_bytes
    device = ops.device()
    if device.type != "cuda":
        raise ModelError("kv_memory_gib must be given where there is no GPU's memory to divide")
    longest = min(settings.max_model_len or model.config.max_position, model.config.max_position)
    steps = 1 + settings.async_scheduling
    peak = _peak_bytes(model, layout, device, settings.max_step_tokens, settings.max_seqs, longest, steps)
    if settings.cuda_graphs:  # what their steps take is kept for them
        peak += _peak_bytes(model, layout, device, settings.max_seqs, settings.max_seqs, 1, steps)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    room = model.ranks.least(int(settings.memory_utilization * total) - (total - free) - peak)
    gib = [size / 2**30 for size in (total, model.nbytes, peak, room)]
    log.info("%.1f GiB of memory: %.2f GiB of weights, %.2f GiB for a step, %.2f GiB for pages", *gib)
    if room <= 0:
        raise ModelError(
            f"memory_utilization {settings.memory_utilization}: of {gib[0]:.1f} GiB, nothing is left for pages beside "
            f"{gib[1]:.1f} GiB of weights and {gib[2]:.1f} GiB for a step of {settings.max_step_tokens} tokens"
        )
    return room // layout.page_bytes


@torch.inference_mode()
def _peak_bytes(
    model: Decoder, layout: PageLayout, device: torch.device, rows: int, most: int, longest: int, steps: int
) -> int:
    """Bytes that a step of `rows` tokens takes at its peak, beside what is there, with its sampling; `most`
    sequences, of up to `longest` tokens. What is drawn in one of `steps` is there until the next one has drawn."""
    config = model.config
    count = max(min(rows, most), -(-rows // longest))
    counts = np.full(count, rows // count, np.int32)
    counts[: rows % count] += 1
    width = layout.pages(int(counts.max()))
    kv = PagedKV.allocate(layout, 1, count, config.layers, config.kv_heads, width, device)
    kv.data.zero_()
    kv.table.zero_()
    kv.kept[:] = torch.from_numpy(counts)[:, None, None]
    bounds = np.concatenate(([0], counts.cumsum(dtype=np.int32))).astype(np.int32)
    positions = np.arange(rows, dtype=np.int32) - np.repeat(bounds[:-1], counts)
    lanes = LaneBatch(
        slots=torch.arange(count, dtype=torch.int32),
        cu_rows=torch.from_numpy(bounds),
        positions=torch.from_numpy(positions),
        first_vote=torch.from_numpy(counts),
    )
    sampled = min(count, most)
    table = SamplingTable(sampled, config.vocab_size)
    for slot in range(sampled):
        table.admit(slot, SamplingParams(top_p=0.5), slot, ())
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    wanted = torch.from_numpy(bounds[1:].astype(np.int64) - 1)[:sampled].to(device)
    drawn: Drawn | None = None
    for _ in range(steps):
        logits = model.forward(torch.zeros(rows, dtype=torch.int32, device=device), lanes, kv, wanted)
        drawn = Sampler().launch(logits, table.batch(np.arange(sampled)), np.arange(sampled) % 2 == 0)
    assert drawn is not None
    drawn.read()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
