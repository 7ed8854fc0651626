"""Elastic plans: who opted in is compressed further when pages run out, before anybody is preempted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from winnow.engine.compression.plan import Plan
from winnow.engine.errors import PlanNotSupported, RequestError
from winnow.engine.models.decoder import Decoder
from winnow.engine.sequence import Sequence as EngineSequence
from winnow.kernels.layout import PageFormat

from ..models.checkpoints import prompt_of, random_model
from .bench import Bench, Seen, assert_same, pages_for
from .masked import causal, hide_evicted, run_masked

TO_INT4 = {"on_pressure": {"format": "int4", "residual": 0}}
TO_WINDOW = {"on_pressure": {"evict": {"policy": "streaming_llm", "budget": 30}}}
TO_BOTH = {
    "kv": {"format": "int8", "residual": 0},
    "on_pressure": {
        "format": "int4",
        "residual": 8,
        "evict": {"policy": "knorm", "budget": 0.5, "during": "both", "interval": 6},
    },
}
KEEPS_EVICTING = {
    "kv": {"evict": {"policy": "snapkv", "budget": 0.6, "during": "both", "interval": 9}},
    "on_pressure": {"format": "int8", "residual": 0},
}
PLANS = [TO_INT4, TO_WINDOW, TO_BOTH, KEEPS_EVICTING]
IDS = ["int4", "window", "int8 to half in int4", "eviction goes on in int8"]


def crowd(model: Decoder, plan: dict[str, Any], tokens: int = 1000) -> tuple[Bench, int]:
    """Six answers that together outgrow the arena; the bench, and how many ran at once at most."""
    bench = Bench(model, pages_for(model, tokens), prefix_caching=False)
    for i in range(6):
        bench.submit(str(i), prompt_of(200 + 5 * i, i), 90, plan)
    at_once = 0

    def watch() -> None:
        nonlocal at_once
        bench.engine.check_integrity()
        at_once = max(at_once, len(bench.running))

    bench.run(watch)
    return bench, at_once


def test_more_finish_together_and_nobody_is_preempted(tiny: Decoder) -> None:
    stiff, few = crowd(tiny, {})
    elastic, many = crowd(tiny, TO_INT4)
    assert stiff.engine.stats.preemptions_total > 0
    assert elastic.engine.stats.preemptions_total == 0
    assert many == 6 > few
    assert len(elastic.batches) < len(stiff.batches)  # of steps, for the same answers
    reports = [elastic.seen[str(i), 0].last.compression for i in range(6)]
    squeezed = [report for report in reports if report is not None and report.squeezed_at is not None]
    assert len(squeezed) == elastic.engine.stats.squeezes_total >= 3
    assert all(report.bytes_held < report.bytes_uncompressed * 0.6 for report in squeezed)
    assert all(len(elastic.seen[str(i), 0].tokens) == 90 for i in range(6))
    assert elastic.held_pages == 0


@pytest.mark.parametrize(("plan", "tokens"), [(TO_WINDOW, 1000), (TO_BOTH, 500)], ids=IDS[1:3])
def test_others_give_way_too(tiny: Decoder, plan: dict[str, Any], tokens: int) -> None:
    bench, _ = crowd(tiny, plan, tokens)
    assert bench.engine.stats.squeezes_total > 0
    assert all(bench.seen[str(i), 0].rejected is None for i in range(6))


def test_only_who_opted_in_gives_way(tiny: Decoder) -> None:
    """Beside plain requests, whose answers stay what they are alone."""
    prompts = [prompt_of(40 + 5 * i, i) for i in range(6)]
    alone = Bench(tiny)
    wanted = [alone.alone(prompt, 90) for prompt in prompts]
    bench = Bench(tiny, pages_for(tiny, 160))
    for i, prompt in enumerate(prompts):
        bench.submit(str(i), prompt, 90, TO_INT4 if i % 2 else {})
    bench.run(bench.engine.check_integrity)
    for i, seen in enumerate(wanted):
        report = bench.seen[str(i), 0].last.compression
        assert report is not None
        if i % 2 == 0:
            assert_same(bench.seen[str(i), 0], seen)
        if report.squeezed_at is None:
            assert bench.seen[str(i), 0].tokens == seen.tokens
        else:
            same = report.squeezed_at - len(prompts[i])
            assert i % 2 == 1
            assert bench.seen[str(i), 0].tokens[: same + 1] == seen.tokens[: same + 1]
    assert bench.engine.stats.squeezes_total > 0


def squeezed(model: Decoder, plan: dict[str, Any], preempt_after: set[int], n: int = 1) -> dict[int, Seen]:
    """What the choices of a request say that is squeezed after 21 steps, and may then be preempted after some more."""
    bench = Bench(model, max_step_tokens=50)
    bench.submit("a", prompt_of(250), 60, plan, n=n)
    step = 0

    def disturb() -> None:
        nonlocal step
        step += 1
        bench.engine.check_integrity()
        if step == 21:
            for seq in bench.running:
                assert bench.engine.pressure.relieve([seq])
                assert not bench.engine.pressure.relieve([seq])  # once is all there is to give
        if step in preempt_after and bench.running:
            bench.engine.scheduler.preempt(bench.running[-1])

    bench.run(disturb)
    assert bench.engine.stats.squeezes_total == n
    return {index: bench.seen["a", index] for index in range(n)}


@pytest.mark.parametrize("plan", PLANS, ids=IDS)
def test_preempted_they_come_to_the_same_state(tiny: Decoder, plan: dict[str, Any]) -> None:
    """Before the squeeze, right after it, and later; the bench compares the bits of every logit that comes twice."""
    (wanted,) = squeezed(tiny, plan, set()).values()
    (seen,) = squeezed(tiny, plan, {22, 30, 45}).values()
    assert_same(seen, wanted)
    assert wanted.last.compression is not None
    assert wanted.last.compression.squeezed_at == 266  # 250 of the prompt, read in 5 steps, and 16 of the answer
    assert seen.last.compression == wanted.last.compression
    calm = Bench(tiny).alone(prompt_of(250), 60, plan | {"on_pressure": None})
    assert wanted.tokens[:17] == calm.tokens[:17]


def test_choices_are_squeezed_one_by_one(tiny: Decoder) -> None:
    wanted = squeezed(tiny, TO_BOTH, set())[0]
    for seen in squeezed(tiny, TO_BOTH, {25, 40}, n=3).values():
        assert_same(seen, wanted)


def test_a_squeeze_that_evicts_is_a_mask(tiny: Decoder) -> None:
    """Logits after it are those of a dense run that sees what the squeeze kept."""
    reference = random_model("llama", max_position_embeddings=1024)
    bench, prompt = Bench(tiny), prompt_of(90, 3)
    bench.submit("a", prompt, 30, {"on_pressure": {"evict": {"policy": "keydiff", "budget": 0.4}}})
    while bench.sequence("a").computed < 101:
        bench.step()
    seq, arena, side = bench.sequence("a"), bench.engine.arena, bench.engine.side
    held, settle = {}, side.settle

    def watched(squeezed: EngineSequence) -> None:
        held[squeezed.computed] = arena.kv.positions[squeezed.slot][..., :40].long()
        settle(squeezed)  # nobody looks them up later

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side, "settle", watched)
        assert bench.engine.pressure.relieve(bench.running)
    assert (arena.kept[seq.slot] == 40).all()
    assert held.keys() == {101}
    bench.run()
    tokens = [*prompt, *bench.seen["a", 0].tokens[:-1]]
    run = run_masked(reference, tokens, hide_evicted(causal(3, 2, len(tokens)), held))
    for at, logits in bench.seen["a", 0].logits.items():
        torch.testing.assert_close(logits, run.logits[at - 1], atol=1e-3, rtol=0)


def test_pages_of_one_format_become_pages_of_another(tiny: Decoder) -> None:
    bench = Bench(tiny)
    bench.submit("a", prompt_of(300), 30, {"kv": {"format": "int8", "residual": 0}, **TO_INT4})
    for _ in range(10):
        bench.step()
    arena, seq = bench.engine.arena, bench.sequence("a")
    assert (arena.sealed[seq.slot] * arena.layout.capacity(PageFormat.INT8) >= 270).all()
    read = bench.engine.compressor._ops.read_lanes
    before = [read(arena.kv, seq.slot, layer) for layer in range(3)]
    pages = int(arena.columns[seq.slot].sum())
    assert bench.engine.pressure.relieve([seq])
    bench.engine.check_integrity()
    assert arena.formats[seq.slot] == PageFormat.INT4
    assert int(arena.columns[seq.slot].sum()) < pages
    for layer in range(3):
        for old, new in zip(before[layer], read(arena.kv, seq.slot, layer), strict=True):
            assert 0 < (old - new).abs().max() <= (old.max() - old.min()) / 15
    bench.run()


def test_without_pressure_nothing_happens(tiny: Decoder) -> None:
    bench, prompt = Bench(tiny), prompt_of(100)
    wanted = bench.alone(prompt, 30)
    for plan in (TO_INT4, TO_WINDOW):
        seen = bench.alone(prompt, 30, plan)
        assert_same(seen, wanted)
        assert seen.last.compression == wanted.last.compression
        assert seen.last.cached_tokens > 0
    assert bench.engine.stats.squeezes_total == 0


def test_a_squeeze_that_frees_nothing_is_not_done(tiny: Decoder) -> None:
    bench = Bench(tiny)
    bench.submit("a", prompt_of(20), 20, {"on_pressure": {"evict": {"policy": "knorm", "budget": 1000}}})
    bench.submit("b", prompt_of(20), 20, {"on_pressure": {"format": "int4"}})  # all of it is residual
    for _ in range(5):
        bench.step()
    assert not bench.engine.pressure.relieve(bench.running)
    bench.run()
    assert all(seen.last.compression.squeezed_at is None for seen in bench.seen.values() if seen.last.compression)


def test_who_gives_back_most_gives_way_first(tiny: Decoder) -> None:
    """Of equals the last; who has nothing to give is left alone."""
    bench = Bench(tiny, prefix_caching=False)
    lengths = {"a": 60, "b": 200, "c": 120, "d": 200, "e": 20}
    for name, length in lengths.items():
        bench.submit(name, prompt_of(length), 40, TO_WINDOW)
    for _ in range(5):
        bench.step()
    assert all(bench.sequence(name).is_decoding for name in lengths)
    order, left = [], set(lengths)
    while bench.engine.pressure.relieve(bench.running):
        (squeezed,) = (name for name in left if not bench.sequence(name).can_be_squeezed)
        order.append(squeezed)
        left.remove(squeezed)
    assert order == ["d", "b", "c", "a"]
    bench.run(bench.engine.check_integrity)


@pytest.mark.parametrize(
    ("plan", "param", "message"),
    [
        ({"on_pressure": {}}, "on_pressure.evict", "must be given where `format` is not"),
        ({"on_pressure": {"evict": {"policy": "knorm", "budget": 1.0}}}, "on_pressure.evict", "keep less than all"),
        ({"on_pressure": {"evict": {"policy": "h2o", "budget": 0.5}}}, "on_pressure.evict", "'h2o' goes by"),
        ({"on_pressure": {"evict": {"policy": "h3o", "budget": 1}}}, "on_pressure.evict.policy", "must be one of"),
        ({"on_pressure": {"evict": {"policy": "knorm"}}}, "on_pressure.evict.budget", "is required"),
        (
            {"on_pressure": {"evict": {"policy": "knorm", "budget": 1, "x": 1}}},
            "on_pressure.evict.x",
            "no.* a knob|not",
        ),
        ({"on_pressure": {"residual": 3}}, "on_pressure.residual", "has no effect without `format`"),
        ({"on_pressure": {"read": {}}}, "on_pressure.read", "known here: evict, format, residual"),
        ({"kv": {"read": {"policy": "quest", "tokens": 64}}, **TO_INT4}, "on_pressure", "what `kv.read` chooses by"),
        ({"kv": {"format": "int4"}, **TO_INT4}, "on_pressure", "'int4' is no smaller than `kv.format`, 'int4'"),
        ({"kv": {"format": "int4"}, "on_pressure": {"format": "int8"}}, "on_pressure", "'int8' is no smaller"),
    ],
)
def test_what_cannot_be_honoured_is_refused(plan: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        Plan.parse(plan)
    assert error.value.param == f"compression.{param}"
    assert isinstance(error.value, PlanNotSupported) is (
        "no smaller" in message or "goes by" in message or "kv.read" in message
    )


def test_the_plan_under_pressure() -> None:
    plan = Plan.parse(TO_BOTH)
    assert not plan.is_off
    under = plan.under_pressure
    assert under is not None
    assert (under.format, under.residual, under.on_pressure) == (PageFormat.INT4, 8, None)
    assert under.evict is not None
    assert under.evict.policy == "knorm"
    assert plan.evict is None
    evicts = Plan.parse(KEEPS_EVICTING).under_pressure
    assert evicts is not None
    assert evicts.evict == Plan.parse(KEEPS_EVICTING).evict
    assert Plan.parse({}).under_pressure is None
