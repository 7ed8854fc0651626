"""What is left of a prompt is a function of the request: not of who else is there, nor of what happened meanwhile."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from winnow.engine.messages import Shorten
from winnow.engine.models.decoder import Decoder
from winnow.engine.probe import AttentionProbe, SurprisalProbe
from winnow.kernels import cpu

from ..engine.bench import Bench, assert_same, pages_for
from ..models.checkpoints import prompt_of
from .messages import QUESTION, TEXT, message
from .test_oracles import SHORT

PLANS: list[dict[str, Any]] = [
    {"policy": "selective", "keep": 0.5, "unit": "token"},
    {"policy": "selective", "keep": 0.4, "unit": "phrase"},
    {"policy": "spec_pc", "keep": 0.3, "pool": 5},
    {"policy": "spec_pc", "keep": 0.6, "window": 30},
    {"policy": "extractive", "keep": 0.5},
    {"policy": "llmlingua2", "keep": 0.5},
]


@pytest.fixture(scope="module")
def encoders(sentence_encoder: Path, classifier: Path) -> dict[str, str]:
    return {"embedding_model": str(sentence_encoder), "llmlingua2_model": str(classifier)}


@pytest.fixture(scope="module")
def requests() -> list[Shorten]:
    return [message(plan, [TEXT, SHORT], str(i), lead=37) for i, plan in enumerate(PLANS)]


@pytest.fixture(scope="module")
def alone(requests: list[Shorten], tiny: Decoder, encoders: dict[str, str]) -> Iterator[dict[str, list[int]]]:
    """What is left of each, read in one step with nobody else there."""
    bench = Bench(tiny, max_step_tokens=1024, prefix_caching=False, **encoders)
    left = {request.request_id: bench.shorten(request).prompt for request in requests}
    assert len({tuple(prompt) for prompt in left.values()}) == len(left)
    yield left
    bench.engine.shortener.stop()


def check(bench: Bench, alone: dict[str, list[int]]) -> None:
    assert {name: shortened.prompt for name, shortened in bench.shortened.items()} == alone
    bench.engine.shortener.stop()


@pytest.mark.parametrize("max_step_tokens", [16, 100])
def test_in_company(
    requests: list[Shorten], alone: dict[str, list[int]], tiny: Decoder, encoders: dict[str, str], max_step_tokens: int
) -> None:
    """Among each other and among requests that generate, which answer as they would by themselves."""
    plan = {"kv": {"evict": {"policy": "snapkv", "budget": 0.5}, "format": "int8"}}
    wanted = Bench(tiny).alone(prompt_of(150, 3), 40, plan)
    bench = Bench(tiny, max_step_tokens=max_step_tokens, prefix_caching=False, **encoders)
    bench.submit("answer", prompt_of(150, 3), 40, plan)
    for request in requests:
        bench.engine.shorten(request)
    bench.run()
    check(bench, alone)
    assert_same(bench.seen["answer", 0], wanted)
    mixed = [batch for batch in bench.batches if len({choice for choice, _ in batch}) > 1]
    assert any(("answer", 0) in dict(batch) for batch in mixed)  # decoding goes on while prompts are read


def test_with_prefix_hits(
    requests: list[Shorten], alone: dict[str, list[int]], tiny: Decoder, encoders: dict[str, str]
) -> None:
    bench = Bench(tiny, **encoders)
    for _ in range(2):
        for request in requests:
            bench.engine.shorten(request)
        bench.run()
    hits = bench.engine.scheduler.counters.hit_tokens
    check(bench, alone)
    probed = [request for request in requests if request.plan["policy"] in ("selective", "spec_pc")]
    assert hits > 200 * len(probed) / 2  # spec_pc looks at the end of the prompt only
    # What is read after is the shortened prompt, and its beginning is there already.
    bench.submit("answer", alone["0"], 4)
    bench.run()
    assert bench.seen["answer", 0].last.cached_tokens == 32
    assert_same(bench.seen["answer", 0], Bench(tiny).alone(alone["0"], 4))


def test_after_preemption(
    requests: list[Shorten], alone: dict[str, list[int]], tiny: Decoder, encoders: dict[str, str]
) -> None:
    bench = Bench(tiny, pages_for(tiny, 400), max_step_tokens=24, **encoders)
    dice = random.Random(3)
    for request in requests:
        bench.engine.shorten(request)

    def preempt() -> None:
        if bench.running and dice.random() < 0.2:
            bench.engine.scheduler.preempt(dice.choice(bench.running))

    bench.run(preempt)
    assert bench.engine.stats.preemptions_total > 5
    check(bench, alone)
    assert bench.held_pages == 0


def test_bits_do_not_depend_on_threads(requests: list[Shorten], tiny: Decoder) -> None:
    """Not only what is kept: the numbers that decide it."""

    def values(threads: int) -> list[bytes]:
        before = cpu.set_threads(0), torch.get_num_threads()
        cpu.set_threads(threads)
        torch.set_num_threads(threads)
        try:
            bench, found = Bench(tiny, prefix_caching=False), []
            close = bench.engine.shortener.close

            def watched(request_id: str, probe: SurprisalProbe | AttentionProbe) -> Any:
                found.append(np.asarray(probe.values).tobytes())
                return close(request_id, probe)

            bench.engine.shortener.close = watched  # type: ignore[method-assign, assignment]
            for request in requests[:4]:
                bench.shorten(request)
            return found
        finally:
            cpu.set_threads(before[0])
            torch.set_num_threads(before[1])

    assert values(1) == values(2)


def test_texts_read_by_one_thread_or_two(
    requests: list[Shorten], alone: dict[str, list[int]], tiny: Decoder, encoders: dict[str, str]
) -> None:
    threads = torch.get_num_threads()
    for workers in (1, 2):
        bench = Bench(tiny, threads=workers, **encoders)
        for request in requests[4:]:
            assert bench.shorten(request).prompt == alone[request.request_id]
        bench.engine.shortener.stop()
    assert torch.get_num_threads() == threads  # those that read texts keep to their own core


def test_an_aborted_one_leaves_nothing(requests: list[Shorten], tiny: Decoder, encoders: dict[str, str]) -> None:
    bench = Bench(tiny, max_step_tokens=16, **encoders)
    for request in requests:
        bench.engine.shorten(request)
    bench.step()
    bench.step()
    told = set(bench.shortened)  # texts are read in threads of their own, and some are soon done
    for request in requests:
        bench.engine.abort(request.request_id)
    assert bench.engine.is_idle
    bench.run()
    assert set(bench.shortened) == told
    assert bench.held_pages == 0
    bench.engine.shortener.stop()


def test_equal_sentences_stay_or_go_by_their_place(tiny: Decoder, encoders: dict[str, str]) -> None:
    text = "Nobody knows. " * 6
    request = message({"policy": "extractive", "keep": 3 * 14}, [text.strip()], question=QUESTION)
    bench = Bench(tiny, **encoders)
    left = bench.shorten(request).prompt
    assert left == request.prompt[: 5 + 41] + request.prompt[-7:]
    assert bench.shorten(msgspec.structs.replace(request, request_id="again")).prompt == left
    bench.engine.shortener.stop()
