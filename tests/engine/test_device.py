"""Everything that compresses runs where the pages are: on a device whose memory is not the host's, to the same bits. As
on a GPU, tokens are read one step late there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from winnow.engine.messages import Output, SamplingParams, Submit
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import backend

from ..models.checkpoints import prompt_of, random_model
from ..prompt.messages import TEXT, message
from .bench import Bench, Choice, Seen, assert_same, pages_for
from .device import OpsThere, waiting
from .drafts import first_layers
from .plans import KV, LEAD_INS, evict
from .profiles import profiles_of

THERE = OpsThere(backend("cpu"))


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """The tiny model, on the device."""
    path: Path = tmp_path_factory.mktemp("there")
    random_model("llama", max_position_embeddings=1024).save_pretrained(path)
    return load_model(str(path), THERE, "f32")


def benches(tiny: Decoder, there: Decoder, **settings: Any) -> tuple[Bench, Bench]:
    settings = {"max_step_tokens": 64} | settings
    return (
        Bench(tiny, draft=first_layers(tiny), **settings),
        Bench(
            there,
            ops=THERE,
            profiles=profiles_of(tiny),
            draft=first_layers(there),
            async_scheduling=True,
            **settings,
        ),
    )


@pytest.mark.parametrize("name", KV)
def test_plans(tiny: Decoder, there: Decoder, name: str) -> None:
    """With two choices, so that what is held is copied too."""
    wanted, seen = (
        answers(bench, {"kv": KV[name]}, n=2, temperature=1.0, lead_ins=LEAD_INS) for bench in benches(tiny, there)
    )
    assert seen.keys() == wanted.keys()
    for choice in wanted:
        assert_same(seen[choice], wanted[choice])
        assert seen[choice].last.compression == wanted[choice].last.compression


@pytest.mark.parametrize("name", KV)
def test_steps_between_events_ask_nothing_of_the_device(there: Decoder, tiny: Decoder, name: str) -> None:
    """Nor for the sampled tokens, whose copy is under way."""
    engine = benches(tiny, there)[1].engine
    del engine.runner.run  # which copies logits for the bench
    compress, events = engine.compressor.compress, []

    def watched(*args: Any) -> None:
        events.append(args)
        compress(*args)

    engine.compressor.compress = watched  # type: ignore[method-assign]
    sampling = SamplingParams(temperature=0.0, max_tokens=30)
    engine.submit(Submit("x", prompt_of(150, 3), sampling, {"kv": KV[name]}, lead_ins=LEAD_INS))
    calm = 0
    while engine.can_step:
        seqs, had = engine.scheduler.running, len(events)
        is_decoding = bool(seqs) and seqs[0].is_decoding
        with waiting() as names:
            outputs = engine.step()
            if is_decoding and len(events) == had and isinstance(outputs[0], Output) and not outputs[0].finish_reason:
                assert not names
                calm += 1
    assert calm > 10


@pytest.mark.parametrize("name", ["keyformer", "snapkv", "h2o", "streaming_llm"])
def test_windows_that_meet_evicted_lanes(windowed: Decoder, tmp_path: Path, name: str) -> None:
    random_model("mistral", num_hidden_layers=2, sliding_window=60, max_position_embeddings=256).save_pretrained(
        tmp_path
    )
    model = load_model(str(tmp_path), THERE, "f32")
    wanted, seen = (answers(bench, {"kv": KV[name]}) for bench in benches(windowed, model))
    assert_same(seen["x", 0], wanted["x", 0])


PRESSED: list[dict[str, Any]] = [
    {"on_pressure": {"format": "int4", "residual": 0, "evict": {"policy": "knorm", "budget": 0.5}}},
    {"kv": evict("h2o", during="decode", interval=40)},
]


@pytest.mark.parametrize("plan", PRESSED, ids=["squeezed", "preempted"])
def test_when_pages_run_out(tiny: Decoder, there: Decoder, plan: dict[str, Any]) -> None:
    seen = []
    for bench in benches(tiny, there, pages=pages_for(tiny, 420), prefix_caching=False):
        for i in range(6):
            bench.submit(str(i), prompt_of(100 + i, i), 60, plan)
        seen.append(bench.run())
        stats = bench.engine.stats
        assert stats.preemptions_total or bench.engine.pressure.squeezes
    for choice, wanted in seen[0].items():
        assert_same(seen[1][choice], wanted)


def test_prefixes_are_shared_and_copied(tiny: Decoder, there: Decoder) -> None:
    seen = []
    for bench in benches(tiny, there):
        for i, plan in enumerate([{}, {"kv": evict("h2o")}, {"kv": {"format": "int8"}}]):
            bench.submit(str(i), prompt_of(150, 3), 20, plan)
            bench.run()
        seen.append(dict(bench.seen))
        assert bench.engine.scheduler.counters.hit_tokens
    for choice, wanted in seen[0].items():
        assert_same(seen[1][choice], wanted)


@pytest.mark.parametrize(
    "kv", [{}, evict("snapkv", window=3), evict("tova"), {"read": {"policy": "quest", "tokens": 40}}]
)
def test_wrong_guesses_leave_nothing(tiny: Decoder, there: Decoder, kv: dict[str, Any]) -> None:
    """Guesses are taken out of lanes, mass and what is read by; doing so waits for nothing."""
    guessing = {"method": "prompt_lookup", "tokens": 4, "ngram_min": 1}
    seen = []
    for bench in benches(tiny, there):
        truncate, arena = bench.engine.arena.truncate, bench.engine.arena

        def watched(*args: Any, truncate: Callable[..., None] = truncate) -> None:
            with waiting() as names:
                truncate(*args)
                assert not names

        arena.truncate = watched  # type: ignore[method-assign]
        bench.submit("x", [*prompt_of(40, 3)] * 4, 40, {"kv": kv}, speculative=guessing)
        seen.append(bench.run()["x", 0])
        assert bench.engine.speculator.counters.draft_tokens > bench.engine.speculator.counters.accepted_tokens
    assert_same(*seen)


@pytest.mark.parametrize("plan", [{"policy": "selective", "keep": 0.5}, {"policy": "spec_pc", "keep": 0.3}])
def test_prompts_are_shortened(tiny: Decoder, there: Decoder, plan: dict[str, Any]) -> None:
    wanted, left = (bench.shorten(message(plan, [TEXT, TEXT[::-1]])) for bench in benches(tiny, there))
    assert left == wanted


def answers(bench: Bench, plan: dict[str, Any], **more: Any) -> dict[Choice, Seen]:
    bench.submit("x", prompt_of(150, 3), 30, plan, **more)
    return bench.run()
