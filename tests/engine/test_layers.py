"""Image tokens that are dropped between layers, against a dense transformer that forgets them (layer_oracles.py)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import Tensor
from transformers import PreTrainedModel

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.vision.policy import LayerPolicy
from winnow.engine.compression.vision.registry import VISION, vision_policy
from winnow.engine.errors import RequestError
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.engine.tower_protocol import inputs_of
from winnow.kernels.dispatch import Backend

from ..models.checkpoints import prompt_of, random_model
from .bench import Bench, Seen, assert_same, pages_for
from .imagery import Part, alone, submit
from .layer_oracles import ORACLES, choices_at, run
from .seeing import TinyEyes, mrope, picture, pictured

NAMES = [name for name in VISION if isinstance(vision_policy(name), LayerPolicy)]
DEPTH = 8

PROMPT = prompt_of(150)
PARTS = (
    Part(5, 75, 90, marks=8, keys=(3, 4, 40)),  # two images of one turn, with text between them
    Part(80, 84, 90),  # too small to lose anything where 20 tokens stay
    Part(95, 131, 140, keys=(0, 1, 2)),  # and one of a later turn, behind which the next begins
)


def prune(name: str, keep: float = 0.3, **knobs: Any) -> dict[str, Any]:
    return {"vision": {"policy": name, "keep": keep, **knobs}}


LATE = prune("must_drop", layers=[3, 4, 5, 7])
"""Layers 0 and 1 forget nothing of the prompt"""


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return random_model("llama", num_hidden_layers=DEPTH, max_position_embeddings=512)


@pytest.fixture(scope="module")
def deep(ops: Backend, reference: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path: Path = tmp_path_factory.mktemp("deep")
    reference.save_pretrained(path)
    return load_model(str(path), ops, "f32")


def test_every_policy_has_an_oracle() -> None:
    assert set(NAMES) == set(ORACLES)


@torch.no_grad()
def check(
    model: Any,
    plan: dict[str, Any],
    seen: Seen,
    prompt: Sequence[int] = PROMPT,
    parts: Sequence[Part] = PARTS,
    shown: dict[int, Tensor] | None = None,
    positions: Sequence[int] | Tensor | None = None,
    atol: float = 5e-4,
) -> list[int]:
    """That what was said is what a model says that forgets as much; returns how many tokens its layers hold."""
    assert seen.rejected is None
    name, layers = plan["vision"]["policy"], plan["vision"].get("layers")
    choices = choices_at(name, model.config.num_hidden_layers)
    if layers is not None:
        choices = {layer: choice for choice, layer in enumerate(layers)}
    vision = Plan.parse(plan).vision
    assert vision is not None
    keeps = [vision.tokens(part.patches) for part in parts]
    args = (model, [*prompt, *seen.tokens[:-1]], len(prompt), parts, keeps, choices, ORACLES[name], vision)
    dense = run(*args, shown=shown, positions=positions)
    held = [len(rows) for rows in dense.held]
    if name == "must_drop":  # tokens that are generated see only what is left in the end
        first, left = min(choices) - 1, set(dense.left)

        def hides(layer: int, row: int, key: int) -> bool:
            return layer >= first and row >= len(prompt) > key and key not in left

        dense = run(*args, hides, shown, positions)
        held[first:] = [held[-1]] * len(held[first:])
    for at, logits in seen.logits.items():
        torch.testing.assert_close(logits, dense.logits[at - 1], atol=atol, rtol=5e-4)
        assert int(dense.logits[at - 1].argmax()) == seen.tokens[at - len(prompt)]
    return held


@pytest.mark.parametrize("plan", [*(prune(name, keep) for name in NAMES for keep in (0.3, 20)), LATE], ids=str)
def test_decoding_equals_a_full_recompute(plan: dict[str, Any], deep: Decoder, reference: PreTrainedModel) -> None:
    seen = alone(deep, PROMPT, PARTS, 8, plan)
    held, report = check(reference, plan, seen), seen.last.compression
    assert report is not None
    assert (report.tokens_kept_min, report.tokens_kept_max) == (min(held), max(held))
    assert report.tokens_kept_min < len(PROMPT)
    assert report.tokens_kept_mean == pytest.approx(sum(held) / DEPTH, abs=0.01)
    pages = sum(-(-count // 16) for count in held) * deep.config.kv_heads  # these and no more
    assert report.bytes_held == pages * deep.config.head_dim * 2 * 4 * 16


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families(family: str, ops: Backend, tmp_path: Path) -> None:
    model = random_model(family, num_hidden_layers=4, max_position_embeddings=512)
    model.save_pretrained(tmp_path)
    plan = prune("sparse_vlm")
    check(model, plan, alone(load_model(str(tmp_path), ops, "f32"), PROMPT, PARTS, 6, plan))


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_changes_nothing(name: str, deep: Decoder) -> None:
    wanted = Bench(deep).alone(PROMPT, 12)
    assert_same(alone(deep, PROMPT, PARTS, 12, prune(name, 1.0)), wanted)
    assert_same(alone(deep, PROMPT, PARTS, 12, prune(name, 200)), wanted)


KV: dict[str, dict[str, Any]] = {
    "alone": {},
    "snapkv": {"evict": {"policy": "snapkv", "budget": 0.5, "window": 8, "during": "both", "interval": 7}},
    "h2o": {"evict": {"policy": "h2o", "budget": 60, "head_budget": "adaptive", "during": "both", "interval": 7}},
    "int4": {"format": "int4", "residual": 4},
    "knorm, int8": {"evict": {"policy": "knorm", "budget": 0.5}, "format": "int8", "residual": 4},
    "zipvl": {"mix": {"policy": "zipvl", "every": 9}},
    "cskv": {"format": "cskv", "residual": 4},
    "quest": {"read": {"policy": "quest", "tokens": 30, "sinks": 2, "recent": 8, "dense_layers": 0}},
}


def test_all_in_one_batch_equal_each_alone(deep: Decoder) -> None:
    """In chunks, beside one another and preempted anywhere, under every kind of compression of what is left."""
    plans = {
        (name, how): prune(name) | ({"kv": kv} if kv else {})
        for name in NAMES
        for how, kv in KV.items()
        if how == "alone" or name == "must_drop" or (name, how) in (("zipvl", "zipvl"), ("sparse_vlm", "snapkv"))
    }
    wanted = {key: alone(deep, PROMPT, PARTS, 15, plan) for key, plan in plans.items()}
    plain = Bench(deep).alone(PROMPT, 15)
    bench, dice = Bench(deep, pages_for(deep, 1700), max_step_tokens=97), random.Random(3)
    for i, (key, plan) in enumerate(plans.items()):
        submit(bench, deep, str(key), PROMPT, PARTS, 15, plan, n=1 + i % 2)
    bench.submit("plain", PROMPT, 15)

    def preempt() -> None:
        if bench.running and dice.random() < 0.05:
            bench.engine.scheduler.preempt(dice.choice(bench.running))
        bench.engine.check_integrity()

    bench.run(preempt)
    assert bench.engine.stats.preemptions_total > 5
    for key, seen in wanted.items():
        for index in range(2):
            if (str(key), index) in bench.seen:
                assert_same(bench.seen[str(key), index], seen)
    assert_same(bench.seen["plain", 0], plain)
    assert bench.held_pages == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "must_drop"])  # which forgets where a prompt ends
def test_a_later_turn_finds_the_same_tokens(name: str, deep: Decoder) -> None:
    """What is left goes by the image's own turn: a conversation goes on as if it had never been interrupted."""
    turn, bench = PROMPT[:92], Bench(deep)
    more = [*alone(deep, turn, PARTS[:2], 10, prune(name)).tokens, *prompt_of(20, 4)]
    submit(bench, deep, "forced", turn, PARTS[:2], 40, prune(name), forced=more)
    bench.run()
    wanted, again = bench.seen["forced", 0], alone(deep, [*turn, *more], PARTS[:2], 10, prune(name))
    assert again.tokens == wanted.tokens[-10:]
    assert again.logits.keys() <= wanted.logits.keys()
    assert_same(replace(again, tokens=wanted.tokens), wanted)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_pictures(name: str, deep: Decoder, reference: PreTrainedModel) -> None:
    """What towers see, some of it dropped before the model reads it; the rest is thinned out between layers."""
    prompt, pictures = pictured([12, picture(0, 0), 5, picture(1, 0, 4, 9), 20])
    pictures = [structs.replace(shown, turn_end=len(prompt) - 4) for shown in pictures]
    plan, eyes = prune(name, 12), TinyEyes()
    bench, vision = Bench(deep, eyes=eyes, max_step_tokens=37), Plan.parse(plan).vision
    seen = bench.alone(prompt, 6, plan, pictures=pictures)
    assert_same(bench.alone(prompt, 6, plan, pictures=pictures), seen)
    assert vision is not None and eyes.encoded == 2, "the second time it is remembered"
    views = [
        vision.view(eyes.encode(inputs_of(one)), torch.zeros(0, 64), int.from_bytes(one.key[:8], "little"))
        for one in pictures
    ]
    stay = [[one.first + i for i in view.tokens.tolist()] for one, view in zip(pictures, views, strict=True)]
    images = {one.first + i for one in pictures for i in range(36)}
    read = [row for row in range(len(prompt)) if row not in images or row in {*stay[0], *stay[1]}]
    parts = [
        Part(
            first=read.index(rows[0]),
            last=read.index(rows[-1]) + 1,
            turn_end=read.index(len(prompt) - 4),
            keys=() if view.is_key is None else tuple(view.is_key.nonzero().flatten().tolist()),
            had=36,
        )
        for rows, view in zip(stay, views, strict=True)
    ]
    shown = {part.first + i: x for part, view in zip(parts, views, strict=True) for i, x in enumerate(view.embeddings)}
    positions = [*read, *range(len(prompt), len(prompt) + 5)]
    check(reference, plan, seen, [prompt[row] for row in read], parts, shown, positions)
    report = seen.last.compression
    assert report is not None
    assert (report.image_tokens, report.image_tokens_kept) == (72, len(shown))


@torch.no_grad()
def test_three_axes(turning: tuple[Decoder, Any]) -> None:
    """Rows keep their angles wherever they are dropped."""
    model, theirs = turning
    prompt, pictures = pictured([12, picture(0, 0), 20])
    pictures = [structs.replace(pictures[0], turn_end=len(prompt) - 4)]
    plan, eyes = prune("pyramid_drop"), TinyEyes(has_axes=True)
    seen = Bench(model, eyes=eyes, max_step_tokens=19).alone(prompt, 6, plan, pictures=pictures)
    axes = torch.from_numpy(mrope(np.array(prompt, np.int32), pictures))
    more = (axes.max() + 1 + torch.arange(5)).expand(3, 5)
    shown = {12 + i: x for i, x in enumerate(eyes.encode(inputs_of(pictures[0])).embeddings)}
    parts = [Part(12, 48, len(prompt) - 4)]
    check(theirs, plan, seen, prompt, parts, shown, torch.cat([axes, more], 1), atol=1e-2)


def test_an_image_that_nothing_follows(deep: Decoder) -> None:
    prompt, pictures = pictured([12, picture(0, 0), 1])
    pictures = [structs.replace(shown, turn_end=len(prompt) - 1) for shown in pictures]
    seen = Bench(deep, eyes=TinyEyes()).alone(prompt, 6, prune("fast_v"), pictures=pictures)
    assert seen.rejected is not None and seen.rejected.param == "compression.vision.policy"


@pytest.mark.parametrize("kv", [{"format": "cskv", "residual": 0}, KV["zipvl"], KV["snapkv"]], ids=str)
def test_lanes_know_where_their_tokens_stand(kv: dict[str, Any], deep: Decoder) -> None:
    """When first compressed: of formats that hold keys before RoPE, and policies that go by positions."""
    bench, held = Bench(deep, max_step_tokens=50), []
    settle = bench.engine.side.settle

    def look(seq: Any) -> None:
        if seq.staging is not None:
            held.append((seq.staging.stages.bounds[seq.staging.stage], seq.staging.rows))
        elif not seen:
            lanes, kept = bench.engine.arena.kv.positions[seq.slot], bench.engine.arena.kept[seq.slot]
            for layer in range(DEPTH):
                rows = [rows for first, rows in [(0, range(len(PROMPT))), *held] if first <= layer][-1]
                at = [sorted(lane[:count].tolist()) for lane, count in zip(lanes[layer], kept[layer], strict=True)]
                assert all(set(one) <= set(map(int, rows)) and len(set(one)) == len(one) for one in at)
                assert "evict" in kv or at == [sorted(map(int, rows))] * len(at)
            seen.append(seq)
        settle(seq)

    seen: list[Any] = []
    bench.engine.side.settle = look  # type: ignore[method-assign]
    submit(bench, deep, "a", PROMPT, PARTS, 10, prune("pyramid_drop") | {"kv": kv})
    bench.run()
    assert seen and len(held) == 3 and bench.seen["a", 0].rejected is None


def test_guesses_change_nothing(deep: Decoder) -> None:
    plan, prompt = prune("must_drop"), [*PROMPT[:140], *PROMPT[95:105]]
    wanted = alone(deep, prompt, PARTS, 20, plan)
    bench = Bench(deep)
    guess = {"method": "prompt_lookup", "tokens": 4, "ngram_min": 1, "ngram_max": 1}
    submit(bench, deep, "a", prompt, PARTS, 20, plan, speculative=guess)
    bench.run()
    assert_same(bench.seen["a", 0], wanted)


def test_under_pressure_lanes_are_compressed_further(deep: Decoder) -> None:
    plan = prune("pyramid_drop") | {"on_pressure": {"evict": {"policy": "knorm", "budget": 30}}}
    bench = Bench(deep, pages_for(deep, 260), max_step_tokens=64)
    for i in range(3):
        submit(bench, deep, f"{i}", PROMPT, PARTS, 60, plan)
    bench.run()
    reports = [bench.seen[f"{i}", 0].last.compression for i in range(3)]
    assert any(report is not None and report.squeezed_at is not None for report in reports)


@pytest.mark.parametrize(
    ("plan", "path"),
    [
        (prune("fast_v", layers=[0]), "vision.layers"),
        (prune("fast_v", layers=[1, 2]), "vision.layers"),
        (prune("pyramid_drop", layers=[2, 2]), "vision.layers"),
        (prune("pyramid_drop", layers=[]), "vision.layers"),
        (prune("pyramid_drop", layers=[2, DEPTH]), "vision.layers"),
        (prune("fast_v", positions="contiguous"), "vision.positions"),
        (prune("fast_v") | {"kv": {"evict": {"policy": "prompt_distill", "budget": 0.5}}}, "vision"),
        (prune("fast_v") | {"kv": {"mix": {"policy": "mini_cache"}}}, "vision"),
        (prune("fast_v") | {"kv": {"read": {"policy": "tidal_decode", "tokens": 40}}}, "vision"),
        (prune("fast_v") | {"kv": {"evict": {"policy": "knorm", "budget": 0.5}, "scope": "document"}}, "vision"),
        (
            prune("fast_v")
            | {"kv": {"evict": {"policy": "streaming_llm", "budget": 40, "positions": "compact", "during": "both"}}},
            "vision",
        ),
    ],
)
def test_what_cannot_be(plan: dict[str, Any], path: str, deep: Decoder) -> None:
    with pytest.raises(RequestError) as error:
        submit(Bench(deep), deep, "a", PROMPT, PARTS, 5, plan)
    assert error.value.param == f"compression.{path}"
