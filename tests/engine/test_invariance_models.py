"""The same as `test_invariance`, with fewer plans: on the default model, and where attention has windows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import Backend, WeightKind

from ..compression.knobs import taken
from ..compression.oracles import ORACLES
from ..models.checkpoints import prompt_of, random_model
from .bench import Bench, Seen, assert_same
from .texts import tokens_of_text

Requests = list[tuple[list[int], dict[str, Any]]]

PLANS: list[dict[str, Any]] = [
    {},
    {"kv": {"format": "int4", "residual": 0}},
    {"kv": {"evict": {"policy": "snapkv", "budget": 0.5, "head_budget": "adaptive"}, "format": "int8"}},
    {"kv": {"evict": {"policy": "h2o", "budget": 64, "during": "both", "interval": 5, "layer_budget": "pyramid"}}},
    {"kv": {"evict": {"policy": "keydiff", "budget": 0.9, "during": "decode", "interval": 4}, "format": "int4"}},
    {"kv": {"evict": {"policy": "tova", "budget": 0.25, "during": "both", "interval": 3}}},
]


def check_everywhere(model: Decoder, requests: Requests, new: int, **settings: Any) -> dict[int, Seen]:
    """Runs requests alone, in company, after preemption and after prefix hits."""
    bench = Bench(model, max_step_tokens=512, prefix_caching=False, **settings)
    alone = {i: bench.alone(prompt, new, plan) for i, (prompt, plan) in enumerate(requests)}
    for max_step_tokens, chance in ((48, 0.0), (512, 0.1)):
        bench = Bench(model, max_step_tokens=max_step_tokens, **settings)
        dice = random.Random(1)

        def preempt(bench: Bench = bench, dice: random.Random = dice, chance: float = chance) -> None:
            if bench.running and dice.random() < chance:
                bench.engine.scheduler.preempt(dice.choice(bench.running))

        for i, (prompt, plan) in enumerate(requests):
            bench.submit(str(i), prompt, new, plan, n=1 + i % 2)
        bench.run(preempt)
        assert (bench.engine.stats.preemptions_total > 0) is (chance > 0)
        for (request_id, _), seen in bench.seen.items():
            assert_same(seen, alone[int(request_id)])
    return alone


def test_default_model(default_model: Decoder) -> None:
    requests = [(tokens_of_text(150 + 20 * i, start=50 * i), plan) for i, plan in enumerate(PLANS)]
    check_everywhere(default_model, requests, new=8)


@pytest.mark.parametrize(
    ("family", "changes", "weights", "page_tokens"),
    [
        ("mistral", {"sliding_window": 50}, "f32", 16),
        ("qwen3", {"head_dim": 32}, "int8", 16),
        ("qwen2", {"num_key_value_heads": 1}, "f32", 48),
    ],
    ids=["mistral, window shorter than the prompt", "qwen3, int8 weights", "qwen2, one KV head, large pages"],
)
def test_families(
    family: str, changes: dict[str, Any], weights: WeightKind, page_tokens: int, ops: Backend, tmp_path: Path
) -> None:
    random_model(family, max_position_embeddings=1024, **changes).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), ops, weights)
    evicting = [
        {"kv": {"evict": taken({"policy": policy, "budget": 0.5, "during": during, **every, "head_budget": heads})}}
        for policy in ORACLES
        for during, every, heads in (("prefill", {}, "adaptive"), ("both", {"interval": 7}, "uniform"))
    ]
    plans = [*PLANS, *evicting]
    check_everywhere(
        model, [(prompt_of(90 + 7 * i, i % 5), plan) for i, plan in enumerate(plans)], 24, page_tokens=page_tokens
    )
