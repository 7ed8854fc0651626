"""Who runs, with how many tokens, and who gives way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from winnow.engine.models.decoder import Decoder

from ..models.checkpoints import prompt_of
from .bench import Bench, assert_same, pages_beside, pages_for

QUANTIZED = {"kv": {"format": "int4", "residual": 0}}
EVICTED = {"kv": {"evict": {"policy": "h2o", "budget": 0.4, "during": "both", "interval": 6}}}


def test_a_step_mixes_prompts_and_decode_within_its_limit(tiny: Decoder) -> None:
    bench = Bench(tiny, max_step_tokens=48)
    for i in range(6):
        bench.submit(str(i), prompt_of(70 + i, i), 12, (None, EVICTED)[i % 2])
    bench.run()
    sizes = [sum(count for _, count in batch) for batch in bench.batches]
    assert max(sizes) == 48
    assert sum(sizes) == sum(70 + i + 11 for i in range(6))
    assert any({1} < {count for _, count in batch} for batch in bench.batches), "no step mixes"
    for batch in bench.batches:
        assert [count == 1 for _, count in batch] == sorted((count == 1 for _, count in batch), reverse=True)


def test_first_come_first_served(tiny: Decoder) -> None:
    bench = Bench(tiny, max_step_tokens=32, max_seqs=2)
    for i in range(5):
        bench.submit(str(i), prompt_of(40, i), 6)
    order: list[str] = []
    bench.run(lambda: order.extend(i for i in "01234" if bench.seen[i, 0].tokens and i not in order))
    assert order == list("01234")
    assert max(len(batch) for batch in bench.batches) == 2


def test_more_sequences_than_a_step_has_tokens(tiny: Decoder) -> None:
    bench = Bench(tiny, max_step_tokens=16, max_seqs=40)
    wanted = bench.alone(prompt_of(5), 30)
    for i in range(40):
        bench.submit(str(i), prompt_of(5), 30)
    bench.run()
    for i in range(40):
        assert_same(bench.seen[str(i), 0], wanted)


def test_chunks_end_at_events(tiny: Decoder) -> None:
    """Also when a sequence reads its own answer again."""
    bench = Bench(tiny, max_step_tokens=512)
    bench.submit("a", prompt_of(100), 40, EVICTED)
    for _ in range(25):
        bench.step()
    bench.engine.scheduler.preempt(bench.sequence("a"))
    del bench.batches[:]
    bench.run()
    assert [batch[0][1] for batch in bench.batches][:6] == [100, 6, 6, 6, 6, 1]


@pytest.mark.parametrize("plan", [{}, QUANTIZED, EVICTED], ids=["no plan", "quantized", "evicted"])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_page_pressure_changes_no_answer(tiny: Decoder, plan: dict[str, Any], prefix_caching: bool) -> None:
    """Answers so long that what was admitted together does not fit in the end."""
    prompts = [prompt_of(40 + 5 * i, i) for i in range(6)]
    undisturbed = Bench(tiny)
    wanted = [undisturbed.alone(prompt, 90, plan) for prompt in prompts]
    bench = Bench(tiny, pages_for(tiny, 160) + pages_beside(tiny, plan, 65, 160), prefix_caching=prefix_caching)
    for i, prompt in enumerate(prompts):
        bench.submit(str(i), prompt, 90, plan)
    bench.run(bench.engine.check_integrity)
    assert bench.engine.stats.preemptions_total > 0 or plan == EVICTED
    for i, seen in enumerate(wanted):
        assert_same(bench.seen[str(i), 0], seen)
    assert bench.held_pages == 0


def test_the_newest_gives_way_and_is_next_in_line(tiny: Decoder) -> None:
    bench = Bench(tiny, pages_for(tiny, 200))
    for i in range(4):
        bench.submit(str(i), prompt_of(40, i), 120)
    gone: list[str] = []

    def watch() -> None:
        waiting = [seq.request_id for seq in bench.engine.scheduler.waiting]
        assert waiting == sorted(waiting)
        running = [seq.request_id for seq in bench.running]
        assert [*running, *waiting] == sorted([*running, *waiting])
        gone.extend(waiting)

    bench.run(watch)
    assert "0" not in gone
    assert "3" in gone


def test_preemption_emits_nothing_twice(tiny: Decoder) -> None:
    bench = Bench(tiny)
    bench.submit("a", prompt_of(50), 20, n=2, temperature=1.0)
    for i in range(200):
        if bench.engine.is_idle:
            break
        bench.step()
        if i % 3 == 2 and bench.running:
            bench.engine.scheduler.preempt(bench.running[-1])
    assert [len(bench.seen["a", index].tokens) for index in range(2)] == [20, 20]
    assert [len(bench.seen["a", index].outputs) for index in range(2)] == [20, 20]
    assert bench.engine.stats.generated_tokens_total == 40


@pytest.mark.parametrize("plan", [{}, QUANTIZED, EVICTED], ids=["no plan", "quantized", "evicted"])
@pytest.mark.parametrize("n", [1, 2])
def test_what_fits_exactly_is_served(tiny: Decoder, plan: dict[str, Any], n: int) -> None:
    """Prompt and answer fill the smallest arena to the last page; nothing else fits beside it."""
    wanted = Bench(tiny).alone(prompt_of(150), 10, plan)
    bench = Bench(tiny, pages_for(tiny, 160) + pages_beside(tiny, plan, 150, 160))
    assert bench.engine.max_model_len == 160
    for name in "ab":
        bench.submit(name, prompt_of(150), 10, plan, n=n)
    bench.run(bench.engine.check_integrity)
    for name in "ab":
        for index in range(n):
            assert_same(bench.seen[name, index], wanted)


def test_slots_promised_to_choices_are_kept(tiny: Decoder) -> None:
    bench = Bench(tiny, max_seqs=4, max_step_tokens=16)
    bench.submit("three", prompt_of(60), 5, n=3)
    for i in range(3):
        bench.submit(str(i), prompt_of(3, i), 5)
    bench.run(bench.engine.check_integrity)
    assert all(seen.rejected is None for seen in bench.seen.values())
    assert bench.seen["three", 0].tokens == bench.seen["three", 2].tokens
    assert len(bench.seen) == 6


def test_as_many_choices_as_slots(tiny: Decoder) -> None:
    bench = Bench(tiny, max_seqs=4)
    bench.submit("before", prompt_of(20), 9)
    bench.submit("four", prompt_of(60), 5, n=4)
    bench.submit("behind", prompt_of(20), 5)
    bench.run(bench.engine.check_integrity)
    assert len(bench.seen) == 6
    assert max(len(batch) for batch in bench.batches) == 4


def test_an_idle_engine_does_nothing(tiny: Decoder) -> None:
    bench = Bench(tiny)
    assert bench.engine.is_idle
    assert bench.step() == []
    assert bench.engine.stats.steps_total == 0


def test_stats_count(tiny: Decoder) -> None:
    bench = Bench(tiny, max_step_tokens=32)
    for i in range(3):
        bench.submit(str(i), prompt_of(40, i), 5)
    assert (bench.engine.stats.waiting, bench.engine.stats.waiting_tokens) == (3, 120)
    bench.step()
    assert (bench.engine.stats.running, bench.engine.stats.waiting) == (1, 2)
    bench.run()
    stats = bench.engine.stats
    assert (stats.prompt_tokens_total, stats.generated_tokens_total) == (120, 15)
    assert stats.steps_total == len(bench.batches)
    assert stats.pages_free + stats.pages_cached == stats.pages_total
    assert np.isfinite(stats.step_seconds_total)
