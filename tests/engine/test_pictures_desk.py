"""The desk at which pictures wait: what is seen, remembered and shared, who goes on meanwhile, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from winnow.engine.compression.policy import LaneView
from winnow.engine.compression.registry import eviction_policy
from winnow.engine.errors import PlanNotSupported, RequestError
from winnow.engine.messages import Array
from winnow.engine.models.decoder import Decoder

from ..models.checkpoints import prompt_of
from .bench import Bench, assert_same, pages_for, same_bits
from .seeing import CHANNELS, IMAGE, VIDEO, TinyEyes, picture, pictured

NEW = 12
UNIFORM = {"policy": "uniform"}
PRUNED: dict[str, Any] = {"vision": UNIFORM | {"keep": 11}}

TWO = pictured([20, picture(0, 0), 9, picture(1, 0, 4, 9), 15])
"""A prompt with two pictures of as many tokens"""

replaced = msgspec.structs.replace


# What is remembered ---------------------------------------------------------------------------------------------------


def evicted(**knobs: Any) -> dict[str, Any]:
    return {"kv": {"evict": {"policy": "snapkv", "budget": 0.4} | knobs}}


@pytest.mark.parametrize("keep", [1.0, 36, 99])
@pytest.mark.parametrize("kv", [{}, evicted(), {"kv": {"format": "int4", "residual": 0}}])
def test_keeping_all_is_keeping_all_to_the_bit(tiny: Decoder, keep: float, kv: dict[str, Any]) -> None:
    prompt, pictures = TWO
    wanted = Bench(tiny, eyes=TinyEyes()).alone(prompt, NEW, kv, pictures=pictures)
    plan = kv | {"vision": UNIFORM | {"keep": keep, "positions": "contiguous"}}
    assert_same(Bench(tiny, eyes=TinyEyes()).alone(prompt, NEW, plan, pictures=pictures), wanted)


def test_a_picture_is_encoded_once_and_pruned_once_by_each_policy(tiny: Decoder) -> None:
    eyes = TinyEyes()
    bench = Bench(tiny, eyes=eyes)
    asked = [{}, PRUNED, PRUNED, {"vision": UNIFORM | {"keep": 36}}, {"vision": {"policy": "random", "keep": 11}}]
    for i, plan in enumerate(asked):
        prompt, pictures = pictured([5 + i, picture(0, 0), 9, picture(1, 0, 4, 9), 8])
        bench.alone(prompt, 2, plan, pictures=pictures)
    stats = bench.engine.stats
    assert eyes.encoded == 2
    assert (stats.images_total, stats.image_hits_total) == (10, 4)
    assert stats.image_cache_bytes > 2 * 36 * tiny.config.hidden_size * 4


def test_what_is_left_by_the_text_is_known_by_the_salt(tiny: Decoder) -> None:
    """What was made of pictures alone is found under any."""
    eyes, (prompt, pictures) = TinyEyes(), TWO
    bench = Bench(tiny, eyes=eyes)
    for policy, hits in (("uniform", [0, 2, 2, 2]), ("flash_vlm", [0, 2, 0, 2])):
        plan, found = {"vision": {"policy": policy, "keep": 11}}, []
        for salt in ("", "", "mine", "mine"):
            before = bench.engine.stats.image_hits_total
            seen = bench.alone(prompt, 2, plan, salt=salt, pictures=pictures)
            found.append(bench.engine.stats.image_hits_total - before)
            assert_same(seen, Bench(tiny, eyes=TinyEyes()).alone(prompt, 2, plan, pictures=pictures))
        assert found == hits
    assert eyes.encoded == 2


def test_what_has_no_room_is_seen_again(tiny: Decoder) -> None:
    """Room for what was made of one picture, and of none."""
    prompt, pictures = TWO
    room = 1.5 * 36 * (tiny.config.hidden_size * 4 + 3 * 8 + 1) / 2**30
    for gib, encoded, held in ((room, 4, True), (0.0, 4, False)):
        eyes = TinyEyes()
        bench = Bench(tiny, eyes=eyes, image_cache_gib=gib, prefix_caching=False)
        wanted = bench.alone(prompt, 4, pictures=pictures)
        assert_same(bench.alone(prompt, 4, pictures=pictures), wanted)
        assert (eyes.encoded, bench.engine.stats.image_cache_bytes > 0) == (encoded, held)
        assert bench.engine.stats.image_cache_bytes <= gib * 2**30


def test_where_a_tower_s_layers_have_no_room_what_is_read_of_a_picture_is_remembered(
    tiny: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turns, so that each finds its own; another policy needs the layers, and all of them are made again."""
    monkeypatch.setattr("tests.compression.images.FakeSignals.nbytes", 1 << 30)
    eyes, plans = TinyEyes(), [{}, PRUNED, {"vision": UNIFORM | {"keep": 99}}]
    bench = Bench(tiny, eyes=eyes, image_cache_gib=0.001, prefix_caching=False)
    wanted = [bench.alone(TWO[0], 4, plan, pictures=TWO[1]) for plan in plans]
    assert eyes.encoded == 6
    for plan, seen in zip(plans, wanted, strict=True):
        assert_same(bench.alone(TWO[0], 4, plan, pictures=TWO[1]), seen)
    assert eyes.encoded == 6
    assert 0 < bench.engine.stats.image_cache_bytes < 1 << 20


def test_a_picture_from_which_a_policy_in_the_tower_takes_nothing_is_remembered(tiny: Decoder) -> None:
    eyes, plan = TinyEyes(), {"vision": {"policy": "to_me", "keep": 99}}
    bench = Bench(tiny, eyes=eyes)
    wanted = bench.alone(TWO[0], 4, plan, pictures=TWO[1])
    assert_same(bench.alone(TWO[0], 4, plan, pictures=TWO[1]), wanted)
    assert eyes.encoded == 2


@pytest.mark.parametrize("plan", [{}, PRUNED, {"vision": UNIFORM | {"keep": 11, "positions": "contiguous"}}])
@pytest.mark.parametrize("axes", [False, True])
def test_a_second_turn_begins_with_what_the_first_has_read(
    tiny: Decoder, turning: tuple[Decoder, Any], plan: dict[str, Any], axes: bool
) -> None:
    model, (prompt, pictures) = turning[0] if axes else tiny, TWO
    bench = Bench(model, eyes=TinyEyes(has_axes=axes))
    first = bench.alone(prompt, 30, plan, pictures=pictures, logit_bias={IMAGE: -100.0, VIDEO: -100.0})
    later = [*prompt, *first.tokens, *range(3, 15)]
    second = bench.alone(later, NEW, plan, pictures=pictures)
    read = len(prompt) + 29 - (50 if plan else 0)
    assert second.last.cached_tokens == read // 16 * 16
    fresh = Bench(model, eyes=TinyEyes(has_axes=axes), prefix_caching=False)
    assert_same(second, fresh.alone(later, NEW, plan, pictures=pictures))


def test_other_pictures_and_other_views_are_not_taken_for_these(tiny: Decoder) -> None:
    """The prompts' tokens are the same; what stands before the first picture is shared."""
    prompt, pictures = pictured([33, picture(0, 0), 40])
    others = pictured([33, picture(5, 0), 40])
    assert others[0] == prompt
    bench = Bench(tiny, eyes=TinyEyes())
    bench.alone(prompt, 2, PRUNED, pictures=pictures)
    plans = {"random": {"policy": "random", "keep": 11}, "gaps": UNIFORM | {"keep": 11, "positions": "contiguous"}}
    for shown, plan, hit in (
        (pictures, PRUNED, 80),
        (others[1], PRUNED, 32),
        (pictures, {"vision": plans["random"]}, 32),
        (pictures, {"vision": plans["gaps"]}, 32),
        (pictures, {}, 32),
    ):
        seen = bench.alone(prompt, 2, plan, pictures=shown)
        assert seen.last.cached_tokens == hit
        alone = Bench(tiny, eyes=TinyEyes(), prefix_caching=False).alone(prompt, 2, plan, pictures=shown)
        assert_same(seen, alone)
    assert bench.alone(prompt[:33], 2).last.cached_tokens == 32


# Steps ----------------------------------------------------------------------------------------------------------------


def test_others_go_on_while_pictures_are_looked_at(tiny: Decoder) -> None:
    eyes = TinyEyes()
    bench = Bench(tiny, eyes=eyes)
    bench.submit("text", prompt_of(20), 30)
    bench.step()
    for i in range(3):
        prompt, pictures = pictured([5, picture(2 * i, 0), 9, picture(2 * i + 1, 0), 8])
        bench.submit(str(i), prompt, 4, PRUNED, pictures=pictures)
    assert (bench.engine.stats.waiting, eyes.encoded) == (3, 0)
    for step in range(1, 7):
        said = len(bench.seen["text", 0].tokens)
        bench.step()
        assert eyes.encoded == step, "a picture a step"
        assert len(bench.seen["text", 0].tokens) == said + 1
    assert bench.engine.stats.waiting == 0
    bench.run()
    assert all(len(bench.seen[str(i), 0].tokens) == 4 for i in range(3))


def test_one_that_waits_can_be_given_up(tiny: Decoder) -> None:
    bench = Bench(tiny, eyes=TinyEyes())
    for name in "ab":
        bench.submit(name, TWO[0], 4, pictures=TWO[1])
    bench.step()
    bench.engine.abort("a")
    assert bench.run().keys() == {("b", 0)}
    assert bench.engine.is_idle


def test_a_picture_that_cannot_be_seen_ends_its_request_alone(tiny: Decoder) -> None:
    bench = Bench(tiny, eyes=TinyEyes())
    prompt, pictures = TWO
    blank = np.full((6, 6, CHANNELS), np.nan, np.float32)
    bad = {"nan": blank, "other": np.zeros((6, 6, CHANNELS + 1), np.float32)}
    for name, array in bad.items():
        spoilt = picture(
            0, 20, key=name.encode().ljust(16), inputs={"pixels": Array("float32", [*array.shape], array.tobytes())}
        )
        bench.submit(name, prompt, 4, pictures=[spoilt, pictures[1]])
    bench.submit("good", prompt, 4, pictures=pictures)
    bench.run()
    assert len(bench.seen["good", 0].tokens) == 4
    nan, other = (bench.seen[name, 0].rejected for name in bad)
    assert nan is not None and nan.kind == "internal" and "failed to see a picture" in nan.message
    assert other is not None and (other.kind, other.message) == ("request", "pictures: not what this tower reads")
    assert bench.held_pages == 0


def test_pages_of_dropped_tokens_are_never_taken(tiny: Decoder) -> None:
    prompt, pictures = pictured([16, picture(0, 0, 16, 16), 16])
    held = []
    for plan in ({}, {"vision": UNIFORM | {"keep": 16}}):
        bench = Bench(tiny, eyes=TinyEyes(), prefix_caching=False)
        bench.submit("a", prompt, 8, plan, pictures=pictures)
        for _ in range(3):
            bench.step()
        held.append(bench.held_pages)
        bench.engine.check_integrity()
        bench.run()
    lanes = tiny.config.layers * tiny.config.kv_heads
    assert held == [lanes * (18 + 1), lanes * (3 + 1)]


def test_compression_on_pressure(tiny: Decoder) -> None:
    prompt, pictures = TWO
    plan = PRUNED | {"on_pressure": {"evict": {"policy": "knorm", "budget": 0.4}, "format": "int4", "residual": 0}}
    bench = Bench(tiny, pages_for(tiny, 160), eyes=TinyEyes(), max_step_tokens=64, prefix_caching=False)
    for i in range(4):
        bench.submit(str(i), prompt, 60, plan, pictures=pictures)
    bench.run(bench.engine.check_integrity)
    assert bench.engine.stats.squeezes_total
    assert all(len(bench.seen[str(i), 0].tokens) == 60 for i in range(4))
    assert bench.held_pages == 0


# What cannot be -------------------------------------------------------------------------------------------------------


LOOK_AHEAD = {"policy": "spec_kv", "budget": 0.5}
WITHOUT = {
    "kvzip": (evicted(policy="kvzip"), {}, "compression.kv.evict.policy"),
    "spec_kv": ({"kv": {"evict": LOOK_AHEAD}}, {}, "compression.kv.evict.policy"),
    "document": (
        evicted(policy="knorm") | {"kv": {"scope": "document", "format": "int4"}},
        {"document": 20},
        "compression.kv.scope",
    ),
    "draft": ({}, {"speculative": {"method": "draft"}}, "speculative.method"),
    "video policy": ({"vision": {"policy": "evs", "keep": 0.5}}, {}, "compression.vision.policy"),
    "prompt": ({"prompt": {"policy": "selective", "keep": 0.5}}, {}, "compression.prompt"),
}


@pytest.mark.parametrize(("plan", "more", "param"), WITHOUT.values(), ids=WITHOUT.keys())
def test_what_does_not_go_with_pictures(tiny: Decoder, plan: dict[str, Any], more: dict[str, Any], param: str) -> None:
    bench = Bench(tiny, eyes=TinyEyes(), draft=tiny)
    with pytest.raises(PlanNotSupported) as refused:
        bench.submit("a", TWO[0], 4, plan, pictures=TWO[1], **more)
    assert refused.value.param == param
    assert bench.engine.is_idle


def test_what_turns_keys_needs_positions_without_gaps(tiny: Decoder, turning: tuple[Decoder, Any]) -> None:
    prompt, pictures = TWO
    compact = {"policy": "streaming_llm", "positions": "compact", "budget": 40, "block": 16, "interval": 8}
    for kv, param in (
        ({"format": "cskv"}, "compression.kv.format"),
        ({"evict": compact}, "compression.kv.evict.positions"),
    ):
        for model, plan in ((tiny, PRUNED), (turning[0], {})):
            bench = Bench(model, eyes=TinyEyes(has_axes=model is not tiny))
            rejected = bench.alone(prompt, 4, plan | {"kv": kv}, pictures=pictures).rejected
            assert rejected is not None and (rejected.kind, rejected.param) == ("request", param)
        contiguous = {"vision": UNIFORM | {"keep": 11, "positions": "contiguous"}, "kv": kv}
        assert len(Bench(tiny, eyes=TinyEyes()).alone(prompt, 4, contiguous, pictures=pictures).tokens) == 4


def test_the_context_holds_what_is_left(tiny: Decoder) -> None:
    """Of 1,024 positions that the model has, and 300 rows that there is room for."""
    prompt, pictures = pictured([20, picture(0, 0, 31, 31), 30])
    for keep, positions, new, why in (
        (100, "original", 13, None),
        (100, "original", 14, "comes to position 1025, and the model has 1024"),
        (100, "contiguous", 150, None),
        (100, "contiguous", 151, "exceed the model's 300"),
        (961, "original", 4, "1011 prompt tokens"),
    ):
        bench = Bench(tiny, eyes=TinyEyes(), max_model_len=300)
        plan = {"vision": UNIFORM | {"keep": keep, "positions": positions}}
        seen = bench.alone(prompt, new, plan, pictures=pictures)
        if why is None:
            assert len(seen.tokens) == new
        else:
            assert seen.rejected is not None and why in seen.rejected.message
            assert seen.rejected.code == "context_length_exceeded"


def test_pictures_must_be_where_the_prompt_has_placeholders(tiny: Decoder) -> None:
    prompt, (one, two) = TWO
    bench = Bench(tiny, eyes=TinyEyes())
    for changed, pictures in (
        (prompt, [one]),
        (prompt, [two, one]),
        (prompt, [replaced(one, span=35), two]),
        (prompt, [replaced(one, first=-1), two]),
        (prompt, [replaced(one, turn_end=10), two]),
        (prompt, [one, replaced(two, span=99, turn_end=200)]),
        (prompt, [replaced(one, kind="video"), two]),
        (prompt, [replaced(one, key=b"short"), two]),
        ([*prompt, IMAGE], [one, two]),
        ([token if token != IMAGE else 3 for token in prompt], [one, two]),
    ):
        with pytest.raises(RequestError, match="pictures"):
            bench.submit("a", changed, 4, pictures=pictures)
    with pytest.raises(RequestError, match="below"):
        bench.submit("a", prompt, 4, pictures=[replaced(one, text=[10_000]), two])
    with pytest.raises(RequestError, match="reads text only"):
        Bench(tiny).submit("a", prompt, 4, pictures=[one, two])
    wrong = replaced(
        one, inputs={"pixels": Array("float32", [5, 7, CHANNELS], one.inputs["pixels"].data[: 35 * 4 * CHANNELS])}
    )
    seen = bench.alone(prompt, 4, pictures=[replaced(wrong, key=b"x" * 16), two])
    assert seen.rejected is not None and "36 placeholders for one that is 35 tokens" in seen.rejected.message


@pytest.mark.parametrize(
    "array", [Array("float64", [1], b"\0" * 8), Array("float32", [2], b"\0" * 4), Array("float32", [-1, -1], b"\0" * 4)]
)
def test_arrays_must_be_what_they_say(tiny: Decoder, array: Array) -> None:
    prompt, (one, two) = TWO
    seen = Bench(tiny, eyes=TinyEyes()).alone(prompt, 4, pictures=[replaced(one, inputs={"pixels": array}), two])
    assert seen.rejected is not None and seen.rejected.kind == "request"


def test_what_the_engine_says_of_itself(tiny: Decoder) -> None:
    assert Bench(tiny, eyes=TinyEyes()).engine.info.sees == {"image": 150, "video": 151}
    assert Bench(tiny).engine.info.sees == {}


@pytest.mark.parametrize("axes", [False, True])
def test_policies_that_look_ahead_are_told_where_rope_has_the_text(
    tiny: Decoder, turning: tuple[Decoder, Any], axes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 44 rows of text pictures of 6 x 6 and 4 x 9 tokens count as 6 and 9 positions on the longest axis."""
    views: list[LaneView] = []
    policy = eviction_policy("expected_attention")
    score = policy.score

    def watched(view: LaneView, params: Any) -> Any:
        views.append(view)
        there = replace(view, seen=view.seen + view.ahead, ahead=0)
        assert same_bits(score(view, params), score(there, params))
        assert not same_bits(score(view, params), score(replace(view, ahead=0), params))
        return score(view, params)

    monkeypatch.setattr(policy, "score", watched)
    bench = Bench(turning[0] if axes else tiny, eyes=TinyEyes(has_axes=axes))
    bench.alone(TWO[0], 2, PRUNED | evicted(policy="expected_attention"), pictures=TWO[1])
    assert views
    positions = 44 + (6 + 9 if axes else 72)
    assert {view.seen + view.ahead for view in views} == {positions}
