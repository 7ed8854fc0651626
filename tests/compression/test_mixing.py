"""The mix methods' choices against their papers' rules, written out over a dense attention matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnow.engine.compression.mix import mix_model, mix_schema
from winnow.engine.compression.plan import Evict, Plan
from winnow.engine.compression.policy import SetsBudgets
from winnow.engine.compression.registry import MIX, eviction_policy, mix_method
from winnow.engine.compression.select import keep_sets

from .dense import Dense, dense

TOKENS = 83


def choice_of(mix: dict[str, object]) -> Evict:
    plan = Plan.parse({"kv": {"mix": mix}})
    assert plan.evict is not None
    return plan.evict


def important(d: Dense, rule: Evict) -> list[list[set[int]]]:
    """Positions that a method holds at more bits, by layer and head."""
    policy = eviction_policy(rule.policy)
    view = d.view(policy, rule)
    scores = policy.score(view, rule)
    budgets = torch.full((len(view.layers),), rule.budget_tokens(d.tokens))
    lanes = policy.lane_budgets(view, rule) if isinstance(policy, SetsBudgets) else budgets
    index, _ = keep_sets(scores, view.kept, lanes, rule.sinks, rule.recent_tokens(10), rule.head_budget)
    return [[{int(i) for i in lane if i >= 0} for lane in layer] for layer in index]


def columns(d: Dense, layer: int, heads: range) -> tuple[list[float], list[float]]:
    """What each key received in all from the queries of some heads, and the mean over those that could see it."""
    mass, mean = [], []
    for key in range(d.tokens):
        received = [float(d.attention[layer, head, query, key]) for head in heads for query in range(key, d.tokens)]
        mass.append(sum(received))
        mean.append(sum(received) / len(received))
    return mass, mean


def top(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


@pytest.mark.parametrize("share", [0.6, 0.25])
@pytest.mark.parametrize("q_per_kv", [1, 3])
def test_zipcache_holds_the_most_salient_tokens_at_more_bits(share: float, q_per_kv: int) -> None:
    rule = choice_of({"policy": "zipcache", "share": share})
    assert (rule.during, rule.interval) == ("both", 100)
    for seed in range(2):
        d = dense(TOKENS, q_per_kv=q_per_kv, seed=seed)
        chosen = important(d, rule)
        for layer in range(2):
            for head in range(2):
                _, mean = columns(d, layer, range(head * q_per_kv, (head + 1) * q_per_kv))
                assert chosen[layer][head] == top(mean, int(TOKENS * share))


@pytest.mark.parametrize("tau", [0.975, 0.5, 0.01])
def test_zipvl_holds_what_most_of_a_layers_attention_goes_to(tau: float) -> None:
    rule = choice_of({"policy": "zipvl", "tau": tau})
    sizes: list[int] = []
    for seed in range(2):
        d = dense(TOKENS, seed=seed)
        chosen = important(d, rule)
        for layer in range(2):
            mass, mean = columns(d, layer, range(6))
            reached, size = 0.0, 0
            for share in sorted(mass, reverse=True):
                if reached >= tau * sum(mass):
                    break
                reached, size = reached + share, size + 1
            sizes.append(size)
            assert chosen[layer] == [top(mean, size)] * 2
    assert all(1 <= size < TOKENS for size in sizes)


@pytest.mark.parametrize("name", MIX)
def test_conforms(name: str) -> None:
    method = mix_method(name)
    assert method is mix_method(name)
    assert list(mix_schema()) == list(MIX)
    knobs = mix_model(name).model_fields
    assert set(method.Params.model_fields) < set(knobs)
    assert all(field.description for field in knobs.values())
    choice = method.choice(mix_model(name)(policy=name))
    evict = {"policy": "h2o", "budget": 0.4} if choice is None else None
    plan = Plan.parse({"kv": {"mix": {"policy": name}} | ({} if evict is None else {"evict": evict})})
    assert plan.evict is not None
    assert Plan.parse(plan.to_wire()) == plan
    assert plan.fingerprint != Plan().fingerprint


def test_scores_are_float32() -> None:
    d = dense(TOKENS)
    for name in set(MIX) - {"mikv"}:
        rule = choice_of({"policy": name})
        scores: Tensor = eviction_policy(name).score(d.view(eviction_policy(name), rule), rule)
        assert scores.dtype == torch.float32
        assert scores.shape == (2, 2, TOKENS)
