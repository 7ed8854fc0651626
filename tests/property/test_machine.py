"""Any order of submissions, steps, aborts, ends and preemptions: the pages add up after each, and no answer changes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from winnow.engine.compression.plan import Plan
from winnow.engine.speculation.registry import METHODS
from winnow.engine.speculation.speculation import obstacle

from ..engine.bench import Bench, Choice, pages_beside, pages_for
from ..engine.seeing import TinyEyes
from .world import MOST_CHOICES, MOST_NEW, PICTURES, PLANS, PROMPTS, answers, document_of, draft, model, plan_of

SLOTS = 5


@dataclass
class Asked:
    """A request that nobody has aborted."""

    prompt: int
    plan: int
    temperature: float
    tokens: int
    n: int


class EngineMachine(RuleBasedStateMachine):
    """An engine whose arena holds one long sequence, or a few short ones."""

    bench: Bench
    asked: dict[str, Asked]
    ended: set[Choice]

    @initialize(
        tokens=st.sampled_from([192, 256]),
        draft_tokens=st.sampled_from([144, 1000]),
        max_step_tokens=st.sampled_from([16, 50, 256]),
        prefix_caching=st.booleans(),
    )
    def start(self, tokens: int, draft_tokens: int, max_step_tokens: int, prefix_caching: bool) -> None:
        self.bench = Bench(
            model(),
            pages_for(model(), tokens) + max(pages_beside(model(), {"kv": plan}, 1, tokens) for plan in PLANS),
            max_step_tokens=max_step_tokens,
            max_seqs=SLOTS,
            prefix_caching=prefix_caching,
            draft=draft(),
            draft_pages=pages_for(draft(), draft_tokens),
            eyes=TinyEyes(),
        )
        self.asked, self.ended = {}, set()
        self.count = 0

    @rule(
        prompt=st.integers(0, len(PROMPTS) - 1),
        plan=st.integers(0, len(PLANS) - 1),
        temperature=st.sampled_from([0.0, 1.0]),
        tokens=st.integers(1, MOST_NEW),
        n=st.integers(1, MOST_CHOICES),
        salt=st.sampled_from(["", "", "other"]),
        method=st.sampled_from([None, *METHODS]),
    )
    def submit(
        self, prompt: int, plan: int, temperature: float, tokens: int, n: int, salt: str, method: str | None
    ) -> None:
        name = str(self.count)
        self.count += 1
        chosen, pictures = Plan.parse(plan_of(prompt, plan)), PICTURES.get(prompt, [])
        can_guess = method is not None and obstacle(chosen) is None and not (pictures and method == "draft")
        speculative = {"method": method} if can_guess else {}
        more = {"n": n, "temperature": temperature, "document": document_of(prompt, plan), "pictures": pictures}
        self.bench.submit(name, PROMPTS[prompt], tokens, chosen.to_wire(), salt, speculative, **more)
        self.asked[name] = Asked(prompt, plan, temperature, tokens, n)

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.bench.step()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked)), "request")
        self.bench.engine.abort(name)
        del self.asked[name]

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        choice = data.draw(st.sampled_from(self.unfinished), "choice")
        (last,) = self.bench.finish(*choice)
        assert last.finish_reason == "stop"
        self.ended.add(choice)

    @precondition(lambda self: self.bench.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.bench.running) - 1), "running")
        self.bench.engine.scheduler.preempt(self.bench.running[at])

    @property
    def unfinished(self) -> list[Choice]:
        """Choices that have said something, and not all."""
        return [
            choice
            for choice, seen in sorted(self.bench.seen.items())
            if seen.tokens and not seen.is_over and choice[0] in self.asked
        ]

    @invariant()
    def pages_add_up(self) -> None:
        if not hasattr(self, "bench"):
            return
        engine = self.bench.engine
        engine.check_integrity()
        assert engine.arena.free_slots == SLOTS - len(self.bench.running)
        slots = {seq.slot for seq in self.bench.running}
        assert set(engine.arena.kv.mass) | set(engine.arena.kv.positions) <= slots
        stats = engine.stats
        assert stats.pages_free + stats.pages_cached <= stats.pages_total
        if not slots:
            assert self.bench.held_pages == 0

    @invariant()
    def lanes_hold_what_was_computed(self) -> None:
        if not hasattr(self, "bench"):
            return
        arena = self.bench.engine.arena
        for seq in self.bench.running:
            kept = arena.kept[seq.slot]
            assert kept.max() <= seq.computed < seq.length
            assert seq.plan.evict is not None or (kept == seq.computed).all()

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.run(self.bench.engine.check_integrity)
        assert self.bench.held_pages == 0
        assert self.bench.engine.arena.free_slots == SLOTS
        for name, asked in self.asked.items():
            wanted = answers(asked.prompt, asked.plan, asked.temperature)
            for index in range(asked.n):
                seen = self.bench.seen[name, index]
                assert seen.is_over
                assert seen.rejected is None
                assert tuple(seen.tokens) == wanted[index][: len(seen.tokens)], (name, index, asked)
                assert len(seen.tokens) == asked.tokens or (name, index) in self.ended
        assert self.bench.engine.draft is not None
        for engine in (self.bench.engine, self.bench.engine.draft.engine):
            if engine.cache is not None:
                engine.cache.reclaim(engine.arena.total)
            assert engine.arena.free_count == engine.arena.total
            assert not np.any(engine.arena.refs)


def test_any_order_of_events() -> None:
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=20,
            stateful_step_count=40,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
