"""What the host asks of the device while it launches a step, printed for `test_aot.py`.

In a process without the interpreter: launches are recorded, and tensors are those of a device whose memory is not the
host's (tests/engine/device.py), which tells when the host waits for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from winnow.kernels.dispatch import backend
from winnow.kernels.layout import PageFormat
from winnow.kernels.reading import ReadMode, ReadRule
from winnow.kernels.triton.aot import StandIn, recording
from winnow.kernels.triton.workloads import LAYERS, SMOLLM2, Step
from winnow.kernels.vote import Vote

from ...engine.device import DEVICE, waiting
from ..on_device import kv_to

MODES = torch.full((LAYERS,), int(ReadMode.CHOSEN), dtype=torch.uint8)
CHANNELS = torch.arange(16, dtype=torch.int32).expand(LAYERS, SMOLLM2.kv_heads, 16).contiguous()


def steps() -> Iterator[tuple[str, Step]]:
    """Of all kinds: rows that vote, read by a rule, or do neither, over lanes of one format, of two, and of none."""
    for what, rows in (("decode", 1), ("a chunk", 200)):
        plain = Step(SMOLLM2, rows=rows, fmt=PageFormat.INT4, rest=PageFormat.INT2)
        yield f"{what}, open pages", replace(plain, fmt=None, rest=None)
        yield f"{what}, two formats", plain
        yield f"{what}, weighted tokens", replace(plain, has_positions=True, has_log_weights=True)
        yield f"{what}, votes", replace(plain, vote=Vote())
        yield f"{what}, noisy votes", replace(plain, vote=Vote("max", temperature=2.0, is_noisy=True))
    one = Step(SMOLLM2, fmt=PageFormat.INT8)
    yield "pages by their bounds", replace(one, rule=ReadRule(MODES, tokens=64))
    pooled = ReadRule(MODES, tokens=64, channels=CHANNELS, votes_by_layer=True, pool=5, similarity=0.9)
    yield "tokens by channels, pooled", replace(one, rule=pooled)


def asked_by(step: Step) -> list[str]:
    """The operations that the host waits for in one layer, all that the decoder does in it."""
    ops, model = backend("triton"), step.model
    kv, batch, q = step.build()
    kv, count = kv_to(kv, DEVICE), len(q)
    batch = replace(batch, choices={}, native=None)
    heads, width = model.q_heads + 2 * model.kv_heads, model.q_heads * model.head_dim
    weights = [ops.pack(torch.zeros(size), "bf16") for size in ((99, model.hidden), (heads * model.head_dim, width))]
    embedding, qkv_weight = weights
    norm, head_norm = torch.ones(model.hidden, device=DEVICE), torch.ones(model.head_dim, device=DEVICE)
    cos, sin = torch.zeros(2, 4096, model.head_dim // 2).to(DEVICE)
    tokens = torch.zeros(count, dtype=torch.int32).to(DEVICE)
    with waiting() as names:
        batch.make_room_for_choices(kv)
        x = ops.embed(tokens, embedding)
        qkv = ops.linear(ops.rms_norm(x, norm, 1e-5), qkv_weight)
        ops.query_moments(qkv, batch, kv, 0, head_norm, 1e-5)
        q = ops.rope_write(qkv, cos, sin, batch, kv, 0, head_norm, head_norm, 1e-5)
        if kv.reading:
            ops.choose_reads(q, batch, kv, 0, 0.125, 0)
        mixed = ops.attention(q, batch, kv, 0, 0.125, 70)
        ops.linear(
            ops.silu_mul(torch.cat([mixed, mixed], dim=1)), embedding, out=x[:, :99].contiguous(), accumulate=True
        )
        return list(names)


def asked_by_repack() -> list[str]:
    """Between steps the host may ask: what this finds, the others would have too."""
    kv, _, _ = Step(SMOLLM2, tokens=300).build()
    lanes = (LAYERS, SMOLLM2.kv_heads)
    keep = torch.arange(90, dtype=torch.int32).expand(*lanes, 90).to(DEVICE)
    none, table = torch.zeros(lanes, dtype=torch.int32), kv.table[1].clone()
    with waiting() as names:
        backend("triton").repack(kv_to(kv, DEVICE), 0, keep, none + 90, none, table, none, PageFormat.BF16)
        return list(names)


def main() -> None:
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(), recording(90) as taken:
        patch.setattr(StandIn, "get_active_torch_device", lambda driver: DEVICE)
        patch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # for which there must be a GPU
        for name, step in steps():
            print(json.dumps([name, asked_by(step), sorted({launch.name for launch in taken()})]))
        print(json.dumps(["repack", asked_by_repack(), sorted({launch.name for launch in taken()})]))


if __name__ == "__main__":
    main()
