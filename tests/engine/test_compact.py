"""Compact positions: texts beyond the model's context, in a window of constant size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from winnow.engine.compression.change import Change, Turn
from winnow.engine.errors import PlanNotSupported, PromptTooLong
from winnow.engine.models.decoder import Decoder
from winnow.kernels.kv import LaneBatch, PagedKV

from ..models.checkpoints import prompt_of, random_model
from .bench import Bench, Seen, pages_for
from .masked import dense_attention
from .texts import tokens_of_text


def compact(budget: int, **knobs: Any) -> dict[str, Any]:
    return {"kv": {"evict": {"policy": "streaming_llm", "budget": budget, "positions": "compact"} | knobs}}


# Against dense attention --------------------------------------------------------------------------------------------


class PlacedAttention:
    """Every query, and every key that it sees, turned to its place in the cache: kept tokens, then what came since."""

    def __init__(self, seen: Seen, tokens: int, inv_freq: Sequence[float]):
        self.inv_freq = torch.tensor(inv_freq, dtype=torch.float64)
        events = sorted(seen.kept)
        held: dict[int, list[int]] = {0: []} | {event: seen.kept[event][0, 0].tolist() for event in events}
        self.segments = [
            (held[first], list(range(first, last))) for first, last in zip([0, *events], [*events, tokens], strict=True)
        ]

    def turned(self, x: Tensor, by: Sequence[int]) -> Tensor:
        angles = torch.tensor(by, dtype=torch.float64)[:, None] * self.inv_freq
        a, b = x.double().chunk(2, dim=-1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        group = query.shape[0] // key.shape[0]
        out = torch.empty(query.shape, dtype=torch.float64)
        for kept, new in self.segments:
            sees = [*kept, *new]
            shift = [place - position for place, position in enumerate(sees)]
            for head in range(query.shape[0]):
                keys = self.turned(key[head // group, sees], shift)
                queries = self.turned(query[head, new], shift[len(kept) :])
                scores = queries @ keys.T * scaling
                future = torch.ones(scores.shape).triu(len(kept) + 1) > 0
                weights = scores.masked_fill(future, -torch.inf).softmax(-1)
                out[head, new] = weights @ value[head // group, sees].double()
        return out


@pytest.mark.parametrize("knobs", [{}, {"sinks": 0, "interval": 5}, {"sinks": 9, "block": 48, "interval": 7}])
def test_is_attention_in_the_cache(tiny: Decoder, knobs: dict[str, Any]) -> None:
    prompt, new = prompt_of(150, 3), 40
    plan = compact(40, **({"block": 16, "interval": 16} | knobs))
    seen = Bench(tiny, max_step_tokens=64).alone(prompt, new, plan)
    block = plan["kv"]["evict"]["block"]
    assert sorted(seen.kept)[:2] == [40 + block, 40 + 2 * block]
    reference = random_model("llama", max_position_embeddings=1024)
    tokens = [*prompt, *seen.tokens[:-1]]
    logits = dense_attention(reference, tokens, PlacedAttention(seen, len(tokens), tiny.config.inv_freq))
    wanted = logits[[at - 1 for at in sorted(seen.logits)]]
    torch.testing.assert_close(torch.stack([seen.logits[at] for at in sorted(seen.logits)]), wanted, atol=2e-3, rtol=0)


def test_a_window_that_holds_the_text_is_no_plan(tiny: Decoder) -> None:
    bench, prompt = Bench(tiny), prompt_of(200)
    wanted, seen = bench.alone(prompt, 20), bench.alone(prompt, 20, compact(300))
    assert seen.tokens == wanted.tokens
    assert all(torch.equal(seen.logits[at], wanted.logits[at]) for at in wanted.logits)


# Beyond the context -------------------------------------------------------------------------------------------------


def shortened(model: Decoder, positions: int) -> Decoder:
    """The model as if it had been made for so many positions: none beyond has a rotation."""
    short = object.__new__(Decoder)
    short.__dict__ |= model.__dict__
    short.config = replace(model.config, max_position=positions)
    short._cos, short._sin = model._cos[:positions].clone(), model._sin[:positions].clone()
    return short


def losses(bench: Bench, model: Decoder, text: list[int], plan: dict[str, Any]) -> Tensor:
    """[tokens - 1] of a text that is read as a prompt: nats that the model gives each token but the first."""
    read: list[Tensor] = []

    class Listener:
        def embed(self, tokens: Tensor) -> Tensor:
            return model.embed(tokens)

        def through(self, x: Tensor, layers: range, batch: LaneBatch, kv: PagedKV, rows: Tensor) -> Tensor:
            every, first = torch.arange(len(x)), sum(map(len, read))
            hidden = model.through(x, layers, batch, kv, every)
            upcoming = torch.tensor([*text[first + 1 : first + 1 + len(x)], 0][: len(x)])
            read.append(-model.logits(hidden).log_softmax(-1)[every, upcoming])
            return hidden[rows]

        def logits(self, hidden: Tensor) -> Tensor:
            return model.logits(hidden)

    bench.engine.runner._model = Listener()
    seen = bench.alone(text, 1, plan)
    assert seen.rejected is None
    return torch.cat(read)[:-1]


def test_loss_stays_flat_at_four_times_the_context(default_model: Decoder) -> None:
    """A real text of 2,048 tokens on a model whose context ends at 512."""
    text, short = tokens_of_text(2048), shortened(default_model, 512)
    bench = Bench(short, pages_for(short, 512))
    with pytest.raises(PromptTooLong, match="exceed the model's 512"):
        bench.submit("without", text, 1)
    parts = losses(bench, short, text, compact(256, block=128)).split(512)
    means = [float(part.mean()) for part in parts]
    assert max(means[1:]) < means[0] + 0.2, means


def test_memory_is_that_of_the_window(tiny: Decoder) -> None:
    """A text of ten times the context, in an arena of little more than one context."""
    short = shortened(tiny, 128)
    bench = Bench(short, pages_for(short, 128), max_step_tokens=100)
    assert bench.engine.max_model_len == 128
    columns: list[int] = []
    bench.submit("long", prompt_of(1000, 5), 300, compact(64, block=32, interval=16))
    bench.run(lambda: columns.append(int(bench.engine.arena.columns.max())))
    seen = bench.seen["long", 0]
    assert len(seen.tokens) == 300
    assert max(columns) == (64 + 16) // 16
    report = seen.last.compression
    assert report is not None
    assert (report.tokens_seen, report.tokens_kept_max) == (1299, 64 + (299 % 16))


def test_two_long_texts_run_together(tiny: Decoder) -> None:
    """Admission counts what a text will hold, not how long it is."""
    short = shortened(tiny, 256)
    bench = Bench(short, pages_for(short, 256), max_step_tokens=64)
    for name in "ab":
        bench.submit(name, prompt_of(700, ord(name)), 20, compact(64, block=32))
    together = 0

    def count() -> None:
        nonlocal together
        together += len(bench.running) == 2

    bench.run(count)
    assert together > 10
    assert bench.engine.stats.preemptions_total == 0


# What is refused ----------------------------------------------------------------------------------------------------


def test_what_the_engine_refuses(tiny: Decoder) -> None:
    bench = Bench(shortened(tiny, 128), max_stream_len=1000)
    with pytest.raises(PlanNotSupported, match="come to 320 tokens with a block or an interval") as caught:
        bench.submit("a", prompt_of(10), 1, compact(64))
    assert caught.value.param == "compression.kv.evict.budget"
    with pytest.raises(PromptTooLong, match="exceed the model's 1000"):
        bench.submit("a", prompt_of(991), 10, compact(64, block=32))
    windowed = shortened(tiny, 128)
    windowed.config = replace(windowed.config, windows=(0, 16, 16))
    with pytest.raises(PlanNotSupported, match="attention windows") as caught:
        Bench(windowed).submit("a", prompt_of(10), 1, compact(64, block=32))
    assert caught.value.param == "compression.kv.evict.positions"


def test_where_survivors_stand() -> None:
    """In the text, or where they were turned to: what formats that go by position are told."""
    keep = torch.tensor([[[2, 5, 7, -1], [0, 1, 4, 6]]])
    held = torch.arange(10, 18, dtype=torch.int32).expand(2, -1)
    nothing = torch.zeros(1, 2, 8)
    stays = Change(None, None, torch.full((1, 2), 8), keep, torch.tensor([[3, 4]]), nothing, None, sinks=0, recent=0)
    first = torch.tensor([1, 2])
    assert stays.positions(0, held, first, 2).tolist() == [[15, 17], [14, 16]]
    turned = replace(stays, turn=Turn.to_places(keep[0, 1], torch.ones(4)))
    assert turned.positions(0, held, first, 2).tolist() == [[1, 2], [2, 3]]
