"""Any composition of eviction, budgets of heads and layers, merging, a format or a mix, and reading a part.

It is carried out, to the same bits whatever happens around it, or the field that cannot be honoured is named.
"""

from __future__ import annotations

from functools import cache
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from winnow.engine.compression.part import FORMATS
from winnow.engine.compression.plan import Plan
from winnow.engine.compression.registry import EVICTION, MERGE, MIX, READ
from winnow.engine.errors import RequestError
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import backend

from ..engine.bench import Bench, assert_same
from ..engine.drafts import first_layers
from ..models.checkpoints import prompt_of, random_model

BEGINNING = prompt_of(48, 1)
"""Of the request and of its company: they meet in the prefix cache"""
NEW = 16
TIMES: list[dict[str, Any]] = [{}, {"during": "decode", "interval": 7}, {"during": "both", "interval": 5}]
SEEDS = st.integers(0, 2**32)
"""Of a composition: drawn part by part, most of those that hypothesis finds are alike"""


def composition(dice: Random) -> dict[str, Any]:
    """`kv` of a plan, whether or not its parts go together."""
    evict = {"policy": dice.choice([*EVICTION]), "budget": dice.choice([0.2, 0.5, 0.8, dice.randint(8, 60)])}
    knobs = {
        "sinks": dice.randint(0, 9),
        "recent": dice.randint(0, 12),
        "head_budget": "adaptive",
        "layer_budget": "pyramid",
        "merge": {"policy": dice.choice([*MERGE])},
    }
    evict |= dice.choice(TIMES) | {name: knob for name, knob in knobs.items() if dice.random() < 0.3}
    stored = dice.choice([{}, {"format": dice.choice([*FORMATS])}, {"mix": {"policy": dice.choice([*MIX])}}])
    budget = dice.choice([0.2, 0.6, dice.randint(6, 40)])
    read = {"policy": dice.choice([*READ]), "tokens": budget, "dense_layers": 0, "recent": 5}
    kv: dict[str, Any] = {"evict": evict} if dice.random() < 0.8 else {}
    kv |= stored | ({"residual": dice.choice([0, 8])} if stored else {})
    return kv | ({"read": read} if dice.random() < 0.4 else {})


def plan(dice: Random) -> dict[str, Any]:
    """One that is none of those that are refused."""
    while refusal(kv := composition(dice)) is not None or not kv:
        pass
    return {"kv": kv}


def refusal(kv: dict[str, Any]) -> RequestError | None:
    try:
        Plan.parse({"kv": kv})
    except RequestError as error:
        return error
    return None


@cache
def model() -> Decoder:
    with TemporaryDirectory() as path:
        random_model("llama", max_position_embeddings=512).save_pretrained(path)
        return load_model(path, backend("cpu"), "f32")


def drawn(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def bench(**settings: Any) -> Bench:
    return Bench(model(), 4096, draft=first_layers(model(), 1), **settings)


@drawn(400)
@given(SEEDS)
def test_what_is_refused_is_named(seed: int) -> None:
    kv = composition(Random(seed))
    if (error := refusal(kv)) is not None:
        top, part, named, *_ = (error.param or "").split(".")
        assert (top, part) == ("compression", "kv")
        assert named in kv, "what is named was asked for"


@drawn(30)
@given(SEEDS)
def test_what_is_not_is_carried_out(seed: int) -> None:
    """With company, in chunks, preempted and begun with a prefix hit, as with nobody else there."""
    dice = Random(seed)
    asked, prompt = plan(dice), [*BEGINNING, *prompt_of(dice.randint(1, 90), 2)]
    alone = bench(max_step_tokens=512, prefix_caching=False).alone(prompt, NEW, asked)
    assert len(alone.tokens) == NEW
    together = bench(max_step_tokens=dice.choice([16, 33, 100]))
    together.submit("other", [*BEGINNING, *prompt_of(30, 3)], NEW)
    together.submit("asked", prompt, NEW, asked)
    steps, preempted = 0, dice.randint(1, 20)

    def disturb() -> None:
        nonlocal steps
        steps += 1
        together.engine.check_integrity()
        if steps == preempted and together.running:
            together.engine.scheduler.preempt(together.running[-1])

    together.run(disturb)
    assert_same(together.seen["asked", 0], alone)
    assert together.held_pages == 0
