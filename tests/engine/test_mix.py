"""Two formats in a lane: who goes where, what is stored, and what the answer says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from winnow.engine.compression.plan import Plan
from winnow.engine.errors import PlanNotSupported
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reference.codec import decode_pages, encode_pages

from ..models.checkpoints import prompt_of, random_model
from .bench import Bench, assert_same
from .lanes import TOKENS, lanes_after

H2O = {"policy": "h2o", "budget": 0.4, "sinks": 2}


def stored(layout: PageLayout, parts: list[Tensor], fmt: PageFormat) -> list[Tensor]:
    """Keys and values [n, D] after whole pages of a format."""
    raw = encode_pages(parts[0], parts[1], layout, fmt)
    return list(decode_pages(torch.nn.functional.pad(raw, (0, layout.page_bytes - raw.shape[1])), layout, fmt))


@pytest.mark.parametrize(
    ("high", "rest"), [(None, "int2"), ("bf16", "int4"), ("int8", "int4"), ("int8", "int2"), ("int4", "int2")]
)
def test_mikv_stores_what_the_eviction_would_drop_at_fewer_bits(tiny: Decoder, high: str | None, rest: str) -> None:
    bench = Bench(tiny)
    layout = bench.engine.arena.layout
    exact, _ = lanes_after(bench, {})
    evicted = bench.alone(prompt_of(TOKENS, 5), 1, {"kv": {"evict": H2O}})
    wanted = evicted.kept[TOKENS]
    mix = {"policy": "mikv", "rest": rest} | ({} if high is None else {"format": high})
    read, tables = lanes_after(bench, {"kv": {"evict": H2O, "mix": mix, "residual": 20}})
    assert (tables["kept"] == TOKENS).all(), "nothing is evicted"
    assert (tables["rest"] > 0).all()
    assert (tables["sealed"] > 0).all() or high is None
    fmt = PageFormat.parse(high or "f32")
    for layer, (keys, values) in enumerate(read):
        for head in range(keys.shape[0]):
            order = tables["positions"][layer, head, :TOKENS]
            assert torch.equal(order.sort().values, torch.arange(TOKENS))
            first = int(tables["sealed"][layer, head]) * layout.capacity(fmt)
            second = first + int(tables["rest"][layer, head]) * layout.capacity(PageFormat.parse(rest))
            important = set(wanted[layer, head].tolist())
            assert not important & set(order[first:second].tolist()), "an important token lost its bits"
            assert order[second:].tolist() == sorted(order[second:].tolist())
            assert set(range(TOKENS - 20, TOKENS)) <= set(order[second:].tolist())
            made = [side[head, order] for side in exact[layer]]
            for at, until, form in ((0, first, fmt), (first, second, PageFormat.parse(rest)), (second, TOKENS, None)):
                parts = [part[at:until] for part in made]
                parts = parts if form in (None, layout.compute) else stored(layout, parts, form)
                for side, part in zip((keys, values), parts, strict=True):
                    assert torch.equal(side[head, at:until], part)


def test_a_token_moves_down_and_never_up(tiny: Decoder) -> None:
    bench = Bench(tiny)
    plan = {"kv": {"evict": {**H2O, "during": "both", "interval": 20}, "mix": {"policy": "mikv", "format": "int8"}}}
    capacity = bench.engine.arena.layout.capacity
    low: list[set[tuple[int, int, int]]] = []
    for new in (1, 41, 101):
        _, tables = lanes_after(bench, plan, new)
        first = tables["sealed"] * capacity(PageFormat.INT8)
        second = first + tables["rest"] * capacity(PageFormat.INT2)
        place = torch.arange(tables["positions"].shape[-1])
        in_rest = (place >= first[..., None]) & (place < second[..., None])
        low.append(
            {(layer, head, int(tables["positions"][layer, head, i])) for layer, head, i in in_rest.nonzero().tolist()}
        )
    assert low[0] <= low[1] <= low[2]
    assert len(low[0]) < len(low[2])


def test_the_answer_says_how_many_tokens_are_held_how(tiny: Decoder) -> None:
    plan = {"kv": {"evict": H2O, "mix": {"policy": "mikv", "format": "int8", "rest": "int4"}}}
    bench = Bench(tiny)
    report = bench.alone(prompt_of(TOKENS, 5), 4, plan).last.compression
    plain = bench.alone(prompt_of(TOKENS, 5), 4).last.compression
    assert report is not None
    assert plain is not None
    assert set(report.tokens_by_format) == {"f32", "int8", "int4"}
    assert sum(report.tokens_by_format.values()) == pytest.approx(report.tokens_kept_mean)
    assert report.tokens_kept_min == report.tokens_seen
    assert report.bytes_held < 0.45 * report.bytes_uncompressed
    assert plain.tokens_by_format == {"f32": plain.tokens_kept_mean}


def test_a_mix_that_keeps_everything_at_the_compute_format_is_no_plan(tiny: Decoder) -> None:
    bench = Bench(tiny)
    prompt = prompt_of(90, 1)
    plan = {"kv": {"evict": {"policy": "h2o", "budget": 1.0}, "mix": {"policy": "mikv"}}}
    seen, plain = bench.alone(prompt, 30, plan), bench.alone(prompt, 30)
    assert seen.tokens == plain.tokens
    assert all(torch.equal(seen.logits[at], plain.logits[at]) for at in plain.logits)


def test_models_with_windows_take_no_mix(ops: Backend, tmp_path: Path) -> None:
    random_model("mistral", sliding_window=30, max_position_embeddings=256).save_pretrained(tmp_path)
    bench = Bench(load_model(str(tmp_path), ops, "f32"))
    with pytest.raises(PlanNotSupported, match="sliding windows") as refused:
        bench.submit("x", prompt_of(50, 1), 2, {"kv": {"evict": H2O, "mix": {"policy": "mikv"}}})
    assert refused.value.param == "compression.kv.mix"


@pytest.mark.parametrize("factor", [0.5, 4.0, 2.0**7])
@pytest.mark.parametrize("fmt", [PageFormat.INT8, PageFormat.INT4, PageFormat.INT2])
def test_a_channel_balancer_would_change_nothing(fmt: PageFormat, factor: float) -> None:
    """Scales of keys are per channel: a factor of the channel, as MiKV balances it, leaves its codes alone."""
    layout = PageLayout(64)
    keys, values = torch.randn(2, layout.capacity(fmt), 64, generator=torch.Generator().manual_seed(3))
    balanced = keys.clone()
    balanced[:, ::3] *= factor
    plain, other = (stored(layout, [side, values], fmt)[0] for side in (keys, balanced))
    other[:, ::3] /= factor
    assert torch.equal(plain, other)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"mix": {"policy": "mikv"}}, "compression.kv.mix", "kv.evict"),
    ({"mix": {"policy": "mikv"}, "evict": H2O, "format": "int4"}, "compression.kv.format", "mix.format"),
    (
        {"mix": {"policy": "mikv"}, "evict": {**H2O, "merge": {"policy": "kv_merging"}}},
        "compression.kv.mix",
        "merge",
    ),
    (
        {"mix": {"policy": "mikv"}, "evict": H2O, "read": {"policy": "quest", "tokens": 64}},
        "compression.kv.mix",
        "read",
    ),
    (
        {
            "mix": {"policy": "mikv"},
            "evict": {"policy": "streaming_llm", "budget": 64, "during": "both", "positions": "compact"},
        },
        "compression.kv.mix",
        "compact",
    ),
]


@pytest.mark.parametrize(("kv", "path", "why"), REFUSED)
def test_what_cannot_be_mixed_is_refused(kv: dict[str, Any], path: str, why: str) -> None:
    with pytest.raises(PlanNotSupported, match=why) as refused:
        Plan.parse({"kv": kv})
    assert refused.value.param == path


def test_a_mix_gives_nothing_further_up_under_pressure() -> None:
    plan = {"kv": {"mix": {"policy": "zipcache"}}, "on_pressure": {"format": "int2"}}
    with pytest.raises(PlanNotSupported, match="two formats") as refused:
        Plan.parse(plan)
    assert refused.value.param == "compression.on_pressure"


def test_mikv_goes_by_what_a_recital_takes(tiny: Decoder) -> None:
    """kvzip repeats the prompt behind itself before lanes are arranged: nothing is lost, whatever the schedule."""
    plan = {
        "kv": {"evict": {"policy": "kvzip", "budget": 0.4}, "mix": {"policy": "mikv", "rest": "int4"}, "residual": 0}
    }
    wanted = Bench(tiny).alone(prompt_of(300), 20, plan)
    report = wanted.last.compression
    assert report is not None
    assert (report.tokens_kept_min, report.tokens_kept_max) == (319, 319)
    assert report.bytes_held < 0.8 * report.bytes_uncompressed
    assert_same(Bench(tiny, max_step_tokens=37).alone(prompt_of(300), 20, plan), wanted)
    bench = Bench(tiny, max_step_tokens=64)
    for i in range(3):
        bench.submit(str(i), prompt_of(300), 20, plan)
    for _ in range(12):
        bench.step()
    bench.engine.scheduler.preempt(bench.running[-1])
    bench.run(bench.engine.check_integrity)
    for i in range(3):
        assert_same(bench.seen[str(i), 0], wanted)
