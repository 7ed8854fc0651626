"""When a model misbehaves: who is lost, what they are told, and that everybody else goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from winnow.engine.compression.registry import eviction_policy
from winnow.engine.config import EngineSettings
from winnow.engine.engine import Engine
from winnow.engine.errors import ModelError
from winnow.engine.models.decoder import Decoder
from winnow.engine.pages import OutOfPages
from winnow.kernels.dispatch import backend
from winnow.kernels.kv import LaneBatch, PagedKV

from ..models.checkpoints import prompt_of
from .bench import Bench, assert_same, pages_for

POISON = 159
EVICTED: dict[str, Any] = {"kv": {"evict": {"policy": "snapkv", "budget": 0.4, "during": "both", "interval": 4}}}


class Stub:
    """The model, but for what a test does to its logits."""

    def __init__(self, model: Decoder, spoil: Callable[[Tensor, Tensor], Tensor]):
        self._model, self._spoil = model, spoil
        self.config = model.config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def embed(self, tokens: Tensor) -> Tensor:
        self._tokens = tokens
        return self._model.embed(tokens)

    def through(self, x: Tensor, layers: range, batch: LaneBatch, kv: PagedKV, rows: Tensor) -> Tensor:
        self._last = self._tokens[rows]
        return self._model.through(x, layers, batch, kv, rows)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._spoil(self._last, self._model.logits(hidden))


def stub(model: Decoder, spoil: Callable[[Tensor, Tensor], Tensor]) -> Decoder:
    return cast(Decoder, Stub(model, spoil))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("n", [1, 3])
def test_logits_that_are_no_numbers_fail_only_their_request(tiny: Decoder, value: float, n: int) -> None:
    def spoil(last: Tensor, logits: Tensor) -> Tensor:
        logits[last == POISON] = value
        return logits

    wanted = Bench(tiny).alone(prompt_of(50), 20, EVICTED)
    assert POISON not in wanted.tokens
    bench = Bench(stub(tiny, spoil), prefix_caching=False)
    bench.submit("good", prompt_of(50), 20, EVICTED)
    bench.submit("bad", [*prompt_of(60, 2), POISON], 20, n=n, temperature=1.0)
    bench.submit("later", prompt_of(40, 3), 20, n=n, logit_bias={POISON: 900.0})
    bench.run()
    assert_same(bench.seen["good", 0], wanted)
    for name, tokens in (("bad", []), ("later", [POISON])):
        rejected = bench.seen[name, 0].rejected
        assert rejected is not None
        assert (rejected.kind, rejected.message) == ("internal", "the model's output for this prompt is not a number")
        assert bench.seen[name, 0].tokens == tokens
    assert bench.held_pages == 0


def test_what_led_to_no_numbers_is_not_reused(tiny: Decoder) -> None:
    def spoil(last: Tensor, logits: Tensor) -> Tensor:
        logits[last == POISON] = torch.nan
        return logits

    wanted = Bench(tiny).alone(prompt_of(70), 5)
    bench = Bench(stub(tiny, spoil))
    bench.alone(prompt_of(50), 1)
    assert bench.alone([*prompt_of(70), POISON], 5).rejected is not None
    assert bench.engine.stats.pages_cached == 0
    again = bench.alone(prompt_of(70), 5)
    assert again.last.cached_tokens == 0
    assert_same(again, wanted)


def test_one_bad_logit_is_enough_to_know(tiny: Decoder) -> None:
    def spoil(last: Tensor, logits: Tensor) -> Tensor:
        logits[:, 77] = torch.nan
        return logits

    bench = Bench(stub(tiny, spoil))
    for i, temperature in enumerate((0.0, 1.0)):
        bench.submit(str(i), prompt_of(50), 20, temperature=temperature)
    bench.run()
    assert all(seen.rejected is not None for seen in bench.seen.values())


def test_a_step_that_raises_loses_only_its_batch(tiny: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    steps = 0

    def spoil(last: Tensor, logits: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise RuntimeError("a kernel has failed")
        return logits

    wanted = Bench(tiny).alone(prompt_of(50), 20, EVICTED)
    bench = Bench(stub(tiny, spoil), max_seqs=4)
    bench.submit("a", prompt_of(60, 2), 20, EVICTED)
    bench.submit("b", prompt_of(70, 3), 20, n=3)
    bench.submit("waits", prompt_of(50), 20, EVICTED)
    bench.submit("waits too", prompt_of(50), 20, EVICTED)
    bench.run(bench.engine.check_integrity)
    for name in ("a", "b"):
        rejected = bench.seen[name, 0].rejected
        assert rejected is not None
        assert (rejected.kind, rejected.message) == ("internal", "the engine failed on this batch")
    assert "a kernel has failed" in caplog.text
    for name in ("waits", "waits too"):
        assert_same(bench.seen[name, 0], wanted)
    assert bench.held_pages == 0
    assert bench.engine.arena.free_slots == 4


@pytest.mark.parametrize("where", ["repack", "read_lanes"])
def test_compression_that_raises_loses_no_page(
    tiny: Decoder, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Shared pages would have been copied: the copies are given back too."""
    plan = {"kv": {"evict": {"policy": "knorm", "budget": 0.5}}}
    bench = Bench(tiny)
    wanted = bench.alone(prompt_of(100), 5, plan)

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(bench.engine.compressor._ops, where, fail)
        assert bench.alone(prompt_of(100), 5, plan).rejected is not None
    assert bench.held_pages == 0
    assert_same(bench.alone(prompt_of(100), 5, plan), wanted)


def test_a_plan_that_raises_harms_only_its_request(
    tiny: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = Bench(tiny).alone(prompt_of(50), 20, EVICTED)
    bench = Bench(tiny)

    def fail(*_: Any) -> None:
        raise RuntimeError("this policy cannot count")

    monkeypatch.setattr(eviction_policy("knorm"), "score", fail, raising=False)
    bench.submit("good", prompt_of(50), 20, EVICTED)
    bench.submit("bad", prompt_of(60, 2), 20, {"kv": {"evict": {"policy": "knorm", "budget": 0.5}}}, n=2)
    bench.run(bench.engine.check_integrity)
    rejected = bench.seen["bad", 0].rejected
    assert rejected is not None
    assert (rejected.kind, rejected.message) == ("internal", "the engine failed to compress this request")
    assert "this policy cannot count" in caplog.text
    assert_same(bench.seen["good", 0], wanted)


def test_a_scheduler_that_raises_loses_only_who_runs(
    tiny: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The loop goes on, and whoever waits is served."""
    wanted = Bench(tiny).alone(prompt_of(50), 20)
    bench = Bench(tiny, max_seqs=1)
    bench.submit("running", prompt_of(50), 20)
    bench.submit("waiting", prompt_of(50), 20)
    bench.step()

    def fail(*_: Any) -> None:
        raise RuntimeError("it lost count")

    with monkeypatch.context() as patch:
        patch.setattr(bench.engine.arena, "extend", fail)
        bench.step()
    assert bench.seen["running", 0].rejected is not None
    assert "it lost count" in caplog.text
    bench.run(bench.engine.check_integrity)
    assert_same(bench.seen["waiting", 0], wanted)


def test_a_plan_without_pages_to_act_makes_the_newest_give_way(tiny: Decoder) -> None:
    """What many share is cut by one: the copies take the pages of others, and no answer changes."""
    plan = {"kv": {"evict": {"policy": "knorm", "budget": 0.9}}}
    prompt = prompt_of(230)
    wanted = Bench(tiny).alone(prompt, 8, plan)
    bench = Bench(tiny, pages_for(tiny, 260))
    ensure, refused = bench.engine.arena.ensure, 0

    def counted(count: int) -> None:
        nonlocal refused
        try:
            ensure(count)
        except OutOfPages:
            refused += 1
            raise

    bench.engine.arena.ensure = counted  # type: ignore[method-assign]
    for i in range(4):
        bench.submit(str(i), prompt, 8, plan)
    bench.run(bench.engine.check_integrity)
    assert refused
    for i in range(4):
        assert_same(bench.seen[str(i), 0], wanted)


def test_an_arena_that_holds_no_sequence_is_an_error(tiny: Decoder) -> None:
    with pytest.raises(ModelError, match="hold no sequence"):
        Bench(tiny, pages_for(tiny, 16))
    assert Bench(tiny, pages_for(tiny, 32)).engine.max_model_len == 32
    settings = EngineSettings(kv_memory_gib=1e-9, weights="f32")
    with pytest.raises(ModelError):
        Engine(settings, tiny, backend("cpu"))
