"""Documents that are compressed before the rest of the prompt is read, and shared by requests on them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.registry import EVICTION, MIX, eviction_policy
from winnow.engine.document import document_seed
from winnow.engine.errors import RequestError
from winnow.engine.models.decoder import Decoder
from winnow.engine.prefix_cache import PrefixCache
from winnow.kernels.layout import PageFormat

from ..models.checkpoints import prompt_of
from .bench import Bench, Seen, assert_same, pages_beside, pages_for
from .plans import KV, LEAD_INS, evict
from .test_faults import stub

DOCUMENT = prompt_of(150, 5)
QUESTIONS = [prompt_of(length, 20 + length) for length in (1, 7, 70)]
NEW = 24


def is_agnostic(kv: dict[str, Any]) -> bool:
    chooser = kv.get("evict") or kv.get("mix")
    if "format" in kv and PageFormat.parse(kv["format"]).drops_channels:
        return False
    return chooser is None or eviction_policy(chooser["policy"]).query_agnostic


PLANS: dict[str, dict[str, Any]] = {
    name: {"kv": kv | {"scope": "document"}}
    for name, kv in KV.items()
    if name != "f32" and "read" not in kv and is_agnostic(kv)
}
PLANS |= {
    "once": {"kv": {"evict": {"policy": "knorm", "budget": 0.4}, "scope": "document"}},
    "once, int8": {"kv": {"evict": {"policy": "knorm", "budget": 40}, "format": "int8", "scope": "document"}},
    "mikv": {"kv": {"mix": {"policy": "mikv"}, **evict("keydiff"), "scope": "document"}},
    "mikv, int8": {
        "kv": {"mix": {"policy": "mikv", "format": "int8"}, "evict": {"policy": "kvzip", "budget": 0.4}, "residual": 0}
        | {"scope": "document"}
    },
    "merged": {"kv": {**evict("knorm", merge={"policy": "kv_merging", "proportional": True}), "scope": "document"}},
    "kvzip, read, int4": {
        "kv": {
            "evict": {"policy": "kvzip", "budget": 0.5, "chunk": 64},
            "read": {"policy": "quest", "tokens": 16, "dense_layers": 0},
            "format": "int4",
            "residual": 0,
            "scope": "document",
        }
    },
    "under pressure": {
        "kv": {"evict": {"policy": "kvzip", "budget": 0.7}, "scope": "document"},
        "on_pressure": {"format": "int4", "residual": 0, "evict": {"policy": "knorm", "budget": 0.3}},
    },
}


def cache_of(bench: Bench) -> PrefixCache:
    assert bench.engine.cache is not None
    return bench.engine.cache


def asked(bench: Bench, question: list[int], plan: dict[str, Any], **more: Any) -> Seen:
    more = {"lead_ins": LEAD_INS, "document": len(DOCUMENT)} | more
    return bench.alone([*DOCUMENT, *question], NEW, plan, **more)


def of_its_own(bench: Bench, question: list[int], plan: dict[str, Any]) -> Seen:
    """The document as a whole prompt, after which the question is read."""
    whole = {**plan, "kv": {name: part for name, part in plan["kv"].items() if name != "scope"}}
    seed = document_seed(np.array(DOCUMENT, np.int32))
    more: dict[str, Any] = {"forced": question, "lead_ins": LEAD_INS, "seed": seed - (seed >> 63 << 64)}
    seen = bench.alone(DOCUMENT, NEW + len(question), whole, **more)
    seen.tokens = seen.tokens[len(question) :]
    return seen


@pytest.mark.parametrize("name", [name for name in PLANS if "read" not in PLANS[name]["kv"]])
def test_as_if_the_document_were_a_request_of_its_own(tiny: Decoder, name: str) -> None:
    """Found or not: the same tokens, logits and keep sets, of the same memory, whatever is asked. (Tokens that a caller
    forces read by `kv.read`, those of a question read all.)"""
    plan = PLANS[name]
    bench, other = Bench(tiny), Bench(tiny, prefix_caching=False)
    for i, question in enumerate(QUESTIONS):
        wanted = of_its_own(other, question, plan)
        for again in range(2):
            seen = asked(bench, question, plan)
            assert_same(seen, wanted)
            report, own = seen.last.compression, wanted.last.compression
            assert report is not None and own is not None
            assert report.found_document is bool(i or again)
            assert report.document_tokens == len(DOCUMENT) and own.document_tokens == 0
            assert (report.bytes_held, report.tokens_kept_mean) == (own.bytes_held, own.tokens_kept_mean)
            if report.found_document:
                assert seen.last.cached_tokens == len(DOCUMENT)
                assert sum(count for batch in bench.batches for _, count in batch) < len(question) + NEW
            bench.batches.clear()
    assert bench.engine.stats.documents == 1
    assert bench.engine.stats.document_query_tokens_total == 6 * len(DOCUMENT)
    assert bench.engine.stats.document_hit_tokens_total == 5 * len(DOCUMENT)
    assert bench.held_pages == 0


@pytest.fixture(scope="module")
def wanted(tiny: Decoder) -> list[tuple[str, list[int], Seen]]:
    """What each plan does with a question when there is nobody else, and no cache."""
    bench = Bench(tiny, max_step_tokens=1024, prefix_caching=False)
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(len(PLANS))]
    return [
        (name, question, asked(bench, question, PLANS[name])) for name, question in zip(PLANS, questions, strict=True)
    ]


@pytest.mark.parametrize("kind", ["chunks", "preempted", "short of pages", "choices"])
def test_in_company(tiny: Decoder, wanted: list[tuple[str, list[int], Seen]], kind: str) -> None:
    """All plans at once, and again: among others, cut into chunks, put back, as one of several, with documents that
    come and go."""
    pages = 1 << 15
    if kind == "short of pages":
        longest = len(DOCUMENT) + len(QUESTIONS[-1]) + NEW
        pages = pages_for(tiny, 400) + max(pages_beside(tiny, PLANS[name], longest, 400) for name in PLANS)
    bench = Bench(tiny, pages, max_step_tokens=37 if kind == "chunks" else 200)
    dice = random.Random(3)

    def disturb() -> None:
        bench.engine.check_integrity()
        if kind == "preempted" and bench.running and dice.random() < 0.3:
            bench.engine.scheduler.preempt(dice.choice(bench.running))

    n = 3 if kind == "choices" else 1
    for _ in range(2):
        bench.seen.clear()
        for i, (name, question, _) in enumerate(wanted):
            more = {"lead_ins": LEAD_INS, "document": len(DOCUMENT), "n": n}
            bench.submit(name, [*DOCUMENT, *question], NEW, PLANS[name], **more)
            bench.submit(f"company {i}", prompt_of(20 + i, i), 3)
        bench.run(disturb)
        for name, _, alone in wanted:
            for index in range(n):
                assert_same(bench.seen[name, index], alone)
    assert kind != "preempted" or bench.engine.stats.preemptions_total > len(wanted)
    found = [name for name, _, _ in wanted if bench.seen[name, 0].last.compression.found_document]  # type: ignore[union-attr]
    assert found == list(PLANS) if kind != "short of pages" else bench.engine.stats.documents < len(PLANS)
    assert bench.held_pages == 0


# Who shares what ---------------------------------------------------------------------------------------------------

KNORM = {"kv": {"evict": {"policy": "knorm", "budget": 0.4}, "format": "int8", "scope": "document"}}
ZIP = PLANS["kvzip"]


def is_found(bench: Bench, prompt: list[int], plan: dict[str, Any] = KNORM, **more: Any) -> bool:
    more = {"lead_ins": LEAD_INS, "document": len(DOCUMENT)} | more
    report = bench.alone(prompt, 2, plan, **more).last.compression
    assert report is not None
    return report.found_document


def test_who_shares_a_document(tiny: Decoder) -> None:
    """Whoever has the same tokens, plan and salt, and for kvzip the same words to repeat it after."""
    bench, prompt = Bench(tiny), [*DOCUMENT, *QUESTIONS[1]]
    spelled = {"kv": KNORM["kv"] | {"residual": 32, "read": None}}
    other = {"kv": KNORM["kv"] | {"residual": 31}}
    assert not is_found(bench, prompt)
    assert is_found(bench, prompt)
    assert is_found(bench, prompt, spelled)
    assert not is_found(bench, prompt, other)
    assert not is_found(bench, prompt, salt="mine")
    assert is_found(bench, prompt, salt="mine")
    assert not is_found(bench, prompt, document=len(DOCUMENT) - 1)
    assert not is_found(bench, [5, *prompt[1:]])
    assert not is_found(bench, prompt, document=0)
    assert not is_found(bench, prompt, ZIP)
    assert is_found(bench, prompt, ZIP)
    assert not is_found(bench, prompt, ZIP, lead_ins=[[1], [2], [3]])
    assert bench.engine.stats.documents == 7
    assert bench.engine.stats.prefix_hit_tokens_total > bench.engine.stats.document_hit_tokens_total


def test_those_who_compress_it_at_the_same_time_keep_one(tiny: Decoder) -> None:
    bench = Bench(tiny)
    for i in range(3):
        bench.submit(str(i), [*DOCUMENT, i], 4, KNORM, document=len(DOCUMENT))
    bench.run(bench.engine.check_integrity)
    assert bench.engine.stats.documents == 1


def test_random_draws_are_the_documents(tiny: Decoder) -> None:
    """A request's own seed would keep the document to itself; it is still that of its answer."""
    plan = PLANS["random"]
    wanted = [
        asked(Bench(tiny, prefix_caching=False), QUESTIONS[1], plan, seed=seed, temperature=1.0) for seed in (1, 2)
    ]
    bench = Bench(tiny)
    for seed in (1, 2):
        assert_same(asked(bench, QUESTIONS[1], plan, seed=seed, temperature=1.0), wanted[seed - 1])
    assert wanted[0].tokens != wanted[1].tokens
    assert bench.engine.stats.document_hit_tokens_total == len(DOCUMENT)


def test_a_model_with_windows(windowed: Decoder) -> None:
    document, question = prompt_of(100, 5), prompt_of(9, 6)
    plans = [KNORM, ZIP, PLANS["expected_attention"], PLANS["int4"]]
    bench, other = Bench(windowed), Bench(windowed, prefix_caching=False)
    for plan in plans:
        more: dict[str, Any] = {"document": len(document), "lead_ins": LEAD_INS}
        wanted = other.alone([*document, *question], NEW, plan, **more)
        for _ in range(2):
            assert_same(bench.alone([*document, *question], NEW, plan, **more), wanted)
    assert bench.engine.stats.document_hit_tokens_total == len(plans) * len(document)


# Memory ------------------------------------------------------------------------------------------------------------


def test_it_is_held_once_and_given_back(tiny: Decoder) -> None:
    """Sequences on a document share its pages; unused, the cache gives it back like any block."""
    bench = Bench(tiny)
    arena, cache = bench.engine.arena, cache_of(bench)
    is_found(bench, [*DOCUMENT, *QUESTIONS[1]])
    (document,) = cache.documents
    pages = len(document.pages)
    assert pages == int(document.lanes.columns.sum()) < len(DOCUMENT) // 16 * arena.lanes / 2
    for i in range(5):
        bench.submit(str(i), [*DOCUMENT, i], 5, KNORM, document=len(DOCUMENT))
    bench.step()
    # Each has copied the open page of each lane, whose original is the cache's alone now.
    assert bench.held_pages == pages - arena.lanes + 5 * arena.lanes
    assert cache.reclaimable() >= arena.lanes
    bench.run(bench.engine.check_integrity)
    assert bench.engine.stats.documents == 1
    cache.reclaim(arena.total)
    assert len(cache) == 0 and arena.free_count == arena.total


def test_the_least_recently_used_goes_first_document_or_not(tiny: Decoder) -> None:
    bench = Bench(tiny, pages_for(tiny, 600))
    often = [*DOCUMENT, *QUESTIONS[1]]
    is_found(bench, often)
    for seed in range(20, 32):
        assert not is_found(bench, [*prompt_of(150, seed), 1])
        assert is_found(bench, often)
    assert is_found(bench, [*prompt_of(150, 31), 1])
    assert not is_found(bench, [*prompt_of(150, 20), 1])
    bench.engine.check_integrity()


def test_side_state_that_a_document_keeps_is_paid_for(tiny: Decoder) -> None:
    """Expected attention goes on to count queries where it evicts all along."""
    bench = Bench(tiny)
    asked(bench, QUESTIONS[1], PLANS["expected_attention"])
    (document,) = cache_of(bench).documents
    assert document.lanes.side_bytes > 0
    assert len(document.lanes.ballast) * bench.engine.arena.layout.page_bytes >= document.lanes.side_bytes
    bench.engine.check_integrity()


@pytest.mark.parametrize("name", ["knorm", "expected_attention", "kvzip, read, int4", "mikv"])
def test_an_arena_in_which_the_prompt_just_fits(tiny: Decoder, name: str) -> None:
    """There is no room for two copies of anything: what is found may have to be given up again."""
    document, question, plan = prompt_of(250, 5), prompt_of(50, 6), PLANS[name]
    more: dict[str, Any] = {"lead_ins": LEAD_INS, "document": len(document)}
    wanted = Bench(tiny).alone([*document, *question], 20, plan, **more)
    bench = Bench(tiny, pages_for(tiny, 336) + pages_beside(tiny, plan, 250, 336))
    for seed in range(2, 5):
        bench.alone(prompt_of(150, seed), 1)
        for _ in range(2):
            assert_same(bench.alone([*document, *question], 20, plan, **more), wanted)
    bench.engine.check_integrity()


def test_a_question_counts_before_it_is_read(tiny: Decoder) -> None:
    """Requests whose documents fit together, and whose questions do not, come one after the other."""
    bench = Bench(tiny, pages_for(tiny, 500))
    for i in range(3):
        bench.submit(str(i), prompt_of(330, i), 4, PLANS["once"], document=30)
    bench.run()
    assert bench.engine.stats.preemptions_total == 0
    assert max(len(batch) for batch in bench.batches) == 1


def test_a_document_of_no_numbers_is_not_kept(tiny: Decoder) -> None:
    def spoil(last: Tensor, logits: Tensor) -> Tensor:
        logits[last == QUESTIONS[1][-1]] = torch.nan
        return logits

    bench = Bench(stub(tiny, spoil))
    bench.submit("bad", [*DOCUMENT, *QUESTIONS[1]], 4, KNORM, document=len(DOCUMENT))
    bench.run()
    assert bench.seen["bad", 0].rejected is not None
    assert bench.engine.stats.documents == 0


def test_an_abort_leaves_the_document(tiny: Decoder) -> None:
    bench, prompt = Bench(tiny), [*DOCUMENT, *QUESTIONS[1]]
    bench.submit("a", prompt, 30, ZIP, lead_ins=LEAD_INS, document=len(DOCUMENT), n=2)
    while not bench.engine.stats.documents:
        bench.step()
    bench.engine.abort("a")
    bench.engine.check_integrity()
    assert bench.held_pages == 0
    assert is_found(bench, prompt, ZIP)


def test_without_a_cache_nothing_is_kept(tiny: Decoder) -> None:
    bench = Bench(tiny, prefix_caching=False)
    assert not any(is_found(bench, [*DOCUMENT, 1]) for _ in range(2))
    assert bench.engine.arena.free_count == bench.engine.arena.total


def squeezed(bench: Bench, preempts: bool = False) -> Seen:
    """A request that is squeezed amid its answer, and may then lose everything."""
    prompt, at = [*DOCUMENT, *QUESTIONS[1]], len(DOCUMENT) + len(QUESTIONS[1]) + 9
    bench.submit("a", prompt, NEW, PLANS["under pressure"], lead_ins=LEAD_INS, document=len(DOCUMENT))
    while not bench.running or bench.sequence("a").computed < at:
        bench.step()
    assert bench.engine.pressure.relieve(bench.running)
    if preempts:
        bench.engine.scheduler.preempt(bench.sequence("a"))
    bench.run(bench.engine.check_integrity)
    return bench.seen.pop(("a", 0))


def test_a_squeeze_leaves_the_document_to_others(tiny: Decoder) -> None:
    """What runs out of pages takes nothing from it, found or not, and read again from it comes to the same state."""
    wanted = squeezed(Bench(tiny, prefix_caching=False))
    assert wanted.last.compression is not None and wanted.last.compression.squeezed_at is not None
    bench = Bench(tiny)
    for preempts in (False, True, False):
        assert_same(squeezed(bench, preempts), wanted)
    assert bench.engine.stats.squeezes_total == 3
    assert bench.engine.stats.document_hit_tokens_total >= 2 * len(DOCUMENT)
    calm = asked(bench, QUESTIONS[1], PLANS["under pressure"])
    assert_same(calm, asked(Bench(tiny, prefix_caching=False), QUESTIONS[1], PLANS["under pressure"]))
    assert calm.tokens != wanted.tokens


# Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [-1, 11, 12])
def test_documents_end_before_their_prompts(tiny: Decoder, document: int) -> None:
    with pytest.raises(RequestError) as error:
        Bench(tiny).submit("a", prompt_of(11), 2, KNORM, document=document)
    assert error.value.param == "document"


def test_a_document_needs_its_scope(tiny: Decoder) -> None:
    with pytest.raises(RequestError, match="scope") as error:
        Bench(tiny).submit("a", prompt_of(11), 2, {"kv": {"format": "int8"}}, document=5)
    assert error.value.param == "document"


@pytest.mark.parametrize("name", [*EVICTION, *(name for name in MIX if name != "mikv")])
def test_policies_that_ask_for_a_question_are_refused(name: str) -> None:
    kv = {"evict": {"policy": name, "budget": 0.5}} if name in EVICTION else {"mix": {"policy": name}}
    if eviction_policy(name).query_agnostic:
        assert Plan.parse({"kv": kv | {"scope": "document"}}).kv.scope == "document"
        return
    with pytest.raises(RequestError, match=f"'{name}' goes by .* knorm, keydiff, .*kvzip, random") as error:
        Plan.parse({"kv": kv | {"scope": "document"}})
    assert error.value.param == "compression.kv.scope"


@pytest.mark.parametrize(
    "kv",
    [
        {"format": "think"},
        {"mix": {"policy": "mikv", "format": "think"}, "evict": {"policy": "knorm", "budget": 0.5}},
    ],
)
def test_a_format_that_asks_for_a_question_is_refused(kv: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="drops channels by the newest queries") as error:
        Plan.parse({"kv": kv | {"scope": "document"}})
    assert error.value.param == "compression.kv.scope"


@pytest.mark.parametrize(
    "kv", [{}, {"evict": {"policy": "knorm", "budget": 0.5, "during": "decode"}}, {"read": {"policy": "quest"}}]
)
def test_a_scope_without_anything_to_do_is_refused(kv: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="has no effect without") as error:
        Plan.parse({"kv": kv | {"scope": "document"}})
    assert error.value.param == "compression.kv.scope"
