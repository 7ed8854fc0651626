"""A thousand random requests, many of them aborted: in the end nothing is held."""

from __future__ import annotations

import random

import numpy as np

from ..engine.bench import Bench, pages_for
from ..engine.seeing import TinyEyes
from .world import MOST_CHOICES, PICTURES, PLANS, PROMPTS, answers, document_of, draft, model, plan_of

REQUESTS = 1000
MOST_TOKENS = 12


def test_nothing_leaks() -> None:
    dice = random.Random(0)
    bench = Bench(model(), pages_for(model(), 500), max_seqs=16, max_step_tokens=100, draft=draft(), eyes=TinyEyes())
    engine = bench.engine
    live: dict[str, tuple[int, int, float]] = {}
    aborted = checked = 0
    for i in range(REQUESTS):
        asked = dice.randrange(len(PROMPTS)), dice.randrange(len(PLANS)), 1.0
        prompt, plan, temperature = asked
        bench.submit(
            str(i),
            PROMPTS[prompt],
            dice.randint(1, MOST_TOKENS),
            plan_of(prompt, plan),
            salt=dice.choice(["", "", "a"]),
            n=dice.choice([1, 1, 1, 2, MOST_CHOICES]),
            temperature=temperature,
            document=document_of(prompt, plan),
            pictures=PICTURES.get(prompt, ()),
        )
        live[str(i)] = asked
        while len(engine.scheduler.waiting) > 8:
            bench.step()
            if dice.random() < 0.3:
                name = dice.choice(sorted({seq.request_id for seq in engine.scheduler.sequences()}))
                engine.abort(name)
                del live[name]
                aborted += 1
            if dice.random() < 0.05 and bench.running:
                engine.scheduler.preempt(dice.choice(bench.running))
            engine.check_integrity()
    bench.run(engine.check_integrity)

    for (name, index), seen in bench.seen.items():
        assert seen.rejected is None
        if name in live:
            assert seen.is_over
            assert tuple(seen.tokens) == answers(*live[name], MOST_TOKENS)[index][: len(seen.tokens)]
            checked += 1
    assert aborted > 200
    assert checked > 500
    assert engine.stats.preemptions_total > 20
    assert engine.stats.document_hit_tokens_total > 0
    assert engine.is_idle
    assert bench.held_pages == 0
    assert engine.arena.free_slots == 16
    assert not engine.arena.kv.mass
    assert not engine.arena.kv.positions
    assert not engine.table._extra
    assert engine.cache is not None
    engine.cache.reclaim(engine.arena.total)
    assert len(engine.cache) == 0
    assert engine.arena.free_count == engine.arena.total
    assert not np.any(engine.arena.refs)
    assert (engine.arena.kv.table == -1).all()
