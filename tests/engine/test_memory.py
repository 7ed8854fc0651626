"""What plans hold and give back, counted in the arena's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from winnow.engine.messages import CompressionReport
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageFormat

from ..compression.knobs import BUDGETED
from ..models.checkpoints import prompt_of, random_model
from .bench import Bench, pages_beside, pages_for
from .drafts import first_layers
from .texts import tokens_of_text


def snapkv(budget: float | int, **more: Any) -> dict[str, Any]:
    return {"evict": {"policy": "snapkv", "budget": budget, **more}}


REPORTED = {
    "no plan": {},
    "format": {"format": "int8", "residual": 0},
    "bf16": {"format": "bf16"},
    "evict": snapkv(0.3),
    "evict to one token": snapkv(1),
    "ragged": snapkv(0.5, head_budget="adaptive", layer_budget="pyramid"),
    "in decode, quantized": {**snapkv(100, during="both", interval=8), "format": "int4", "residual": 0},
}


@pytest.mark.parametrize("kv", REPORTED.values(), ids=REPORTED)
def test_reported_bytes_are_those_of_the_tables(tiny: Decoder, kv: dict[str, Any]) -> None:
    bench = Bench(tiny, max_step_tokens=100)
    arena, layout = bench.engine.arena, bench.engine.arena.layout
    report, held = arena.report, []

    def watched(slot: int, seen: int) -> CompressionReport:
        table = arena.kv.table[slot]
        kept = arena.kv.kept[slot].long()
        packed = arena.kv.sealed[slot].long() * layout.capacity(PageFormat(int(arena.kv.formats[slot])))
        columns = arena.kv.sealed[slot] + -(-(kept - packed) // layout.page_tokens)
        named = [table[layer, head, : columns[layer, head]] for layer in range(3) for head in range(2)]
        assert bool((table >= 0).sum() == columns.sum())
        beside = sum(side[slot].nbytes for side in arena.kv.sides if slot in side)
        held.append((len(torch.cat(named).unique()) + -(-beside // layout.page_bytes), kept))
        return report(slot, seen)

    arena.report = watched  # type: ignore[method-assign]
    for length in (1, 16, 300):
        seen = bench.alone(prompt_of(length), 40, {"kv": kv})
        said = seen.last.compression
        assert said is not None
        count, kept = held.pop()
        assert said.bytes_held == count * layout.page_bytes
        assert (said.tokens_kept_min, said.tokens_kept_max) == (kept.min(), kept.max())
        assert said.tokens_kept_mean == pytest.approx(float(kept.float().mean()), abs=0.005)
        assert said.tokens_seen == length + 39  # the last token is never read
        assert said.bytes_uncompressed == 6 * layout.pages(length + 39) * layout.page_bytes
        assert not kv or length < 300 or said.bytes_held < said.bytes_uncompressed


@pytest.fixture(scope="module")
def wide(ops: Backend, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """Two layers with heads as wide as the default model's."""
    path: Path = tmp_path_factory.mktemp("wide")
    random_model("llama", num_hidden_layers=2, head_dim=64, max_position_embeddings=8192).save_pretrained(path)
    return load_model(str(path), ops, "f32")


@pytest.mark.parametrize("heads", ["uniform", "adaptive"])
@pytest.mark.parametrize("policy", BUDGETED)
def test_a_quarter_in_int4_is_a_tenth(wide: Decoder, policy: str, heads: str) -> None:
    """Of the bytes that the whole prompt of 4k tokens takes in bf16, open pages aside."""
    bench = Bench(wide, draft=first_layers(wide, 1), max_step_tokens=4096)
    evict = {"policy": policy, "budget": 0.25, "head_budget": heads}
    bench.submit("a", prompt_of(4096), 8, {"kv": {"evict": evict, "format": "int4"}})
    while not any(seq.generated for seq in bench.engine.scheduler.sequences()):
        bench.step()
    arena = bench.engine.arena
    slot = bench.sequence("a").slot
    assert arena.kept[slot].sum() == 4 * 1024
    open_tokens = arena.kept[slot] - arena.sealed[slot] * arena.layout.capacity(PageFormat.INT4)
    assert ((open_tokens >= 32) & (open_tokens < 32 + 112)).all()
    open_pages = int((arena.columns[slot] - arena.sealed[slot]).sum())
    sealed_bytes = int(arena.sealed[slot].sum()) * arena.layout.page_bytes
    in_bf16 = 4 * 4096 * arena.layout.token_bytes(PageFormat.BF16)
    assert sealed_bytes <= in_bf16 / 10
    assert open_pages <= 4 * (32 + 112 + 15) // 16  # the residual, and what does not fill a page
    assert bench.held_pages == open_pages + int(arena.sealed[slot].sum()) + arena.ballast(slot)
    bench.run()


def test_freed_pages_are_usable_at_once(tiny: Decoder) -> None:
    """An arena that holds one prompt: the step that cuts it makes room for the next, and nobody is preempted."""
    beside = pages_beside(tiny, {"kv": snapkv(0.1)}, 330, 360)
    bench = Bench(tiny, pages_for(tiny, 530) + beside, max_step_tokens=512, prefix_caching=False)
    total, layout = bench.engine.arena.total, bench.engine.arena.layout
    assert total < 2 * 6 * layout.pages(330)
    for name in "abcd":
        bench.submit(name, prompt_of(330, ord(name)), 30, {"kv": snapkv(0.1)})
    for running in range(1, 5):
        before = bench.engine.arena.free_count
        bench.step()
        assert [len(bench.seen[name, 0].tokens) > 0 for name in "abcd"] == [i < running for i in range(4)]
        assert before - bench.engine.arena.free_count <= 6 * 3 * running  # 33 tokens a lane, and one more a step
    bench.run()
    assert bench.engine.stats.preemptions_total == 0
    assert bench.engine.arena.free_count == total


@pytest.mark.parametrize("policy", [name for name in BUDGETED if name != "spec_kv"])  # which is for prompts
@pytest.mark.parametrize("fmt", [{}, {"format": "int8", "residual": 0}], ids=["f32", "int8"])
def test_decode_holds_lanes_at_the_budget(tiny: Decoder, policy: str, fmt: dict[str, Any]) -> None:
    bench = Bench(tiny, max_step_tokens=64)
    evict = {"policy": policy, "budget": 50, "during": "both", "interval": 6}
    bench.submit("a", prompt_of(200), 60, {"kv": {"evict": evict, **fmt}})
    arena, layout = bench.engine.arena, bench.engine.arena.layout
    pages = set()
    while not bench.engine.is_idle:
        bench.step()
        if not bench.engine.is_idle and (seq := bench.sequence("a")).generated:
            since = (seq.computed - 200) % 6
            assert (arena.kept[seq.slot] == 50 + since).all()
            pages.add(bench.held_pages - arena.ballast(seq.slot))
    assert max(pages) <= 6 * layout.pages(50 + 6)


def test_a_fraction_follows_what_was_seen(tiny: Decoder) -> None:
    bench = Bench(tiny)
    evict = {"policy": "tova", "budget": 0.5, "during": "decode", "interval": 10}
    seen = bench.alone(prompt_of(80), 45, {"kv": {"evict": evict}})
    assert {event: held.shape[-1] for event, held in seen.kept.items()} == {90: 45, 100: 50, 110: 55, 120: 60}
    assert bench.engine.stats.evicted_tokens_total == 6 * (45 + 5 + 5 + 5)


@pytest.mark.parametrize("evict", [{}, snapkv(0.7, during="both", interval=9)], ids=["all kept", "evicted"])
@pytest.mark.parametrize("residual", [0, 20, 1000])
def test_the_newest_tokens_stay_unquantized(tiny: Decoder, evict: dict[str, Any], residual: int) -> None:
    """As many as the plan says, and what does not fill a page."""
    bench = Bench(tiny)
    arena, packed = bench.engine.arena, bench.engine.arena.layout.capacity(PageFormat.INT8)
    bench.submit("a", prompt_of(150), 110, {"kv": {**evict, "format": "int8", "residual": residual}})
    most_sealed = 0
    while not bench.engine.is_idle:
        bench.step()
        if not bench.engine.is_idle and (seq := bench.sequence("a")).generated:
            sealed = arena.sealed[seq.slot]
            open_tokens = arena.kept[seq.slot] - sealed * packed
            assert (open_tokens < residual + 2 * packed).all()  # a page is sealed when there are tokens for one more
            if not evict:  # what is left of sealed pages, where they are cut, is never made exact again
                assert (open_tokens >= np.minimum(residual, arena.kept[seq.slot])).all()
            most_sealed = max(most_sealed, int(sealed.max()))
    assert most_sealed == {0: 5 if not evict else 3, 20: 4 if not evict else 3, 1000: 0}[residual]


@pytest.mark.parametrize(("fmt", "bound"), [("bf16", 0.2), ("int8", 0.2), ("int4", 3.0)])
def test_quantized_lanes_are_close(default_model: Decoder, fmt: str, bound: float) -> None:
    """The likeliest logit is 35 here, and the logits of lanes in disorder would be off by as much."""
    bench = Bench(default_model)
    prompt = tokens_of_text(330, start=1200)
    exact = bench.alone(prompt, 1)
    bench.submit("a", prompt, 2, {"kv": {"format": fmt, "residual": 0}}, logit_bias={exact.tokens[0]: 100.0})
    bench.run()
    packed = bench.seen["a", 0]
    assert torch.equal(packed.logits[330], exact.logits[330]), "a prompt is read before it is quantized"
    wanted = bench.alone([*prompt, exact.tokens[0]], 1).logits[331]
    error = (packed.logits[331] - wanted).abs()
    assert 0 < error.max() < bound
    assert np.corrcoef(packed.logits[331], wanted)[0, 1] > 0.99
