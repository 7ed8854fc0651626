"""Each policy against its paper's formula over a dense attention matrix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from winnow.engine.compression.plan import Evict, Plan
from winnow.engine.compression.policy import LaneView, LooksAhead, QueryMoments, Reciting, SetsBudgets, StagedPolicy
from winnow.engine.compression.registry import EVICTION, eviction_policy
from winnow.engine.compression.select import keep_sets
from winnow.engine.errors import RequestError
from winnow.kernels.vote import Vote

from .dense import SINKS, cut, dense, hashed
from .oracles import ORACLES, best, budget_of, group_of, ladder, retrieves, snapkv

TOKENS = 61


def evict(policy: str, **knobs: object) -> Evict:
    plan = Plan.parse({"kv": {"evict": {"policy": policy, "budget": 0.5, "sinks": SINKS} | knobs}})
    assert plan.evict is not None
    return plan.evict


def kept_by(evict: Evict, view: LaneView, budget: int) -> list[list[set[int]]]:
    """Logical positions that survive, by layer and head."""
    policy = eviction_policy(evict.policy)
    scores = policy.score(view, evict)
    budgets = torch.full((len(view.layers),), budget)
    if isinstance(policy, SetsBudgets):
        budgets = policy.lane_budgets(view, evict)
    index, _ = keep_sets(scores, view.kept, budgets, evict.sinks, evict.recent_tokens(budget), evict.head_budget)
    return [
        [{int(view.positions[layer, head, i]) for i in index[layer, head] if i >= 0} for head in range(index.shape[1])]
        for layer in range(index.shape[0])
    ]


def test_every_policy_has_an_oracle() -> None:
    """Those that act amid the prefill, or are told by what is read behind it, have theirs in tests/engine."""
    kinds = StagedPolicy | Reciting | LooksAhead
    elsewhere = {name for name in EVICTION if isinstance(eviction_policy(name), kinds)}
    assert set(ORACLES) == set(EVICTION) - elsewhere


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("q_per_kv", [1, 3])
def test_keeps_what_the_paper_keeps(name: str, q_per_kv: int) -> None:
    oracle, recent, knobs = ORACLES[name]
    for seed in range(4):
        d = dense(TOKENS, q_per_kv=q_per_kv, seed=seed)
        rule = evict(name, **knobs)
        kept = kept_by(rule, d.view(eviction_policy(name), rule), 20)
        assert rule.recent_tokens(20) == recent
        for layer in range(2):
            for head in range(2):
                budget = budget_of(name, d, layer, head, 20)
                assert kept[layer][head] == best(oracle(d, layer, head), budget, recent), (layer, head)


@pytest.mark.parametrize("name", ORACLES)
def test_scores_of_ragged_lanes_are_those_of_each_lane_alone(name: str) -> None:
    """Padding beyond a lane's kept length takes no part in any statistic."""
    d = dense(TOKENS, layers=1, kv_heads=2)
    rule = evict(name)
    policy = eviction_policy(name)
    whole = d.view(policy, rule)
    lanes = torch.full((1, 2, 40), -1)
    lanes[0, 0, :40] = torch.arange(TOKENS - 40, TOKENS)
    lanes[0, 1, :23] = torch.arange(TOKENS - 46, TOKENS, 2)
    ragged = cut(whole, lanes, torch.tensor([[40, 23]]))
    scores = policy.score(ragged, rule)
    assert scores.shape == (1, 2, 40)
    assert scores.dtype == torch.float32
    if name == "tova":
        return  # the one policy that looks across lanes: see below
    for head, count in ((0, 40), (1, 23)):
        alone = cut(whole, lanes[..., :count], ragged.kept.clamp_max(count))
        torch.testing.assert_close(policy.score(alone, rule)[0, head, :count], scores[0, head, :count])


def test_tova_meets_by_position_where_lanes_differ() -> None:
    d = dense(TOKENS, layers=2, kv_heads=3)
    rule = evict("tova")
    policy = eviction_policy("tova")
    whole = d.view(policy, rule)
    held = [[[0, 5, 9, 60], [0, 9, 60], [5, 60]], [[1, 2], [3, 4], [1, 3, 4, 60]]]
    index = torch.full((2, 3, 4), -1)
    for layer, lanes in enumerate(held):
        for head, lane in enumerate(lanes):
            index[layer, head, : len(lane)] = torch.tensor(lane)
    count = torch.tensor([[len(lane) for lane in lanes] for lanes in held])
    scores = policy.score(cut(whole, index, count), rule)
    for layer, lanes in enumerate(held):
        for head, lane in enumerate(lanes):
            for i, position in enumerate(lane):
                holders = [other for other in range(3) if position in lanes[other]]
                wanted = torch.stack([group_of(d, layer, other)[:, -1, position] for other in holders]).mean()
                assert scores[layer, head, i].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_tova_scores_all_lanes_of_a_layer_alike() -> None:
    d = dense(TOKENS, kv_heads=4)
    rule = evict("tova", head_budget="adaptive")
    kept = kept_by(rule, d.view(eviction_policy("tova"), rule), 15)
    for layer in kept:
        assert all(lane == layer[0] for lane in layer)  # heads compete, and nobody wins


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 9, 40, 127])  # all shorter than twice the default window of 64
def test_snapkv_reads_prompts_shorter_than_its_window(tokens: int) -> None:
    rule = evict("snapkv")
    policy = eviction_policy("snapkv")
    assert policy.voters(rule, tokens) == max(1, tokens // 2)
    d = dense(tokens)
    budget = rule.budget_tokens(tokens)
    kept = kept_by(rule, d.view(policy, rule), budget)
    recent = max(1, budget // 2)
    for layer in range(2):
        for head in range(2):
            window = max(1, tokens // 2)
            wanted = best(snapkv(d, layer, head, window), budget, recent)
            assert len(kept[layer][head]) == budget
            if budget >= SINKS + window:  # else unprotected window tokens compete, which the paper does not define
                assert kept[layer][head] == wanted


def test_snapkv_divides_window_tokens_by_the_queries_that_saw_them() -> None:
    d = dense(TOKENS, layers=1)
    rule = evict("snapkv", window=8)
    scores = eviction_policy("snapkv").score(d.view(eviction_policy("snapkv"), rule), rule)
    for key in range(TOKENS - 8, TOKENS):
        wanted = group_of(d, 0, 1)[:, key:, key].mean()
        assert scores[0, 1, key].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_random_depends_on_seed_layer_head_and_position_only() -> None:
    d = dense(TOKENS, layers=3)
    rule = evict("random")
    policy = eviction_policy("random")
    for seed in (0, 7, 2**63, 2**64 - 1):  # either side of the sign bit
        whole = policy.score(d.view(policy, rule, seed), rule)
        for layer, head, position in ((0, 0, 0), (2, 1, 60), (1, 0, 33)):
            assert whole[layer, head, position].item() == hashed(seed, layer, head, position)
        few = d.view(policy, rule, seed)
        part = replace(
            few, positions=few.positions[1:2, :, 10:30], kept=few.kept[1:2] * 0 + 20, layers=few.layers[1:2], seen=999
        )
        assert torch.equal(policy.score(part, rule), whole[1:2, :, 10:30])
    assert not torch.equal(whole, policy.score(d.view(policy, rule, 1), rule))


def test_random_is_uniform() -> None:
    d = dense(2000, layers=1, kv_heads=1, q_per_kv=1)
    rule = evict("random")
    scores = eviction_policy("random").score(d.view(eviction_policy("random"), rule), rule).flatten()
    counts = torch.histc(scores, 20, 0.0, 1.0)
    assert ((counts - 100) ** 2 / 100).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


def test_h2o_hears_all_queries_and_keeps_half_of_the_budget_recent() -> None:
    rule = evict("h2o")
    assert rule.voters(10_000) is None
    assert rule.recent_tokens(100) == 50
    assert evict("h2o", recent=7).recent_tokens(100) == 7


def test_tri_attention_scores_as_the_paper_does() -> None:
    d = dense(TOKENS)
    for horizon in (1, 5, 65536):
        rule = evict("tri_attention", horizon=horizon)
        scores = eviction_policy("tri_attention").score(d.view(eviction_policy("tri_attention"), rule), rule)
        for layer in range(2):
            for head in range(2):
                wanted = ORACLES["tri_attention"][0](d, layer, head, horizon)
                torch.testing.assert_close(scores[layer, head], wanted.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("snapkv", {"window": 8, "pool": 1}),
        ("snapkv", {"window": 8, "pool": 9}),
        ("lagkv", {"lag": 8, "is_ranked": False}),
        ("expected_attention", {"future": 1}),
        ("expected_attention", {"use_covariance": False}),
        ("expected_attention", {"use_values": False}),
        ("expected_attention", {"epsilon": 0.02}),
    ],
)
def test_knobs_do_what_they_say(name: str, knobs: dict[str, object]) -> None:
    d, ends = dense(TOKENS), TOKENS - 8  # snapkv's oracle protects the window
    rule, policy, oracle = evict(name, **knobs), eviction_policy(name), ORACLES[name][0]
    scores = policy.score(d.view(policy, rule), rule)
    for layer in range(2):
        for head in range(2):
            wanted = oracle(d, layer, head, **knobs).float()
            torch.testing.assert_close(scores[layer, head, SINKS:ends], wanted[SINKS:ends], atol=1e-6, rtol=1e-4)


def test_razor_attention_keeps_whole_the_lanes_that_retrieve() -> None:
    d = dense(TOKENS, layers=5, kv_heads=3)
    policy = eviction_policy("razor_attention")
    assert isinstance(policy, SetsBudgets)
    for knobs, others in (({"budget": 0.2}, 12), ({"budget": 0.2, "floor": 40}, 40), ({"budget": 7}, 7)):
        rule = evict("razor_attention", **knobs)
        budgets = policy.lane_budgets(d.view(policy, rule), rule)
        wanted = [[TOKENS if retrieves(d, layer, head) else others for head in range(3)] for layer in range(5)]
        assert budgets.tolist() == wanted
        assert 3 <= sum(row.count(TOKENS) for row in wanted) <= 4  # 14 % and 1 % of 15 lanes, rounded up
    rule = evict("razor_attention", induction=0.0, echo=0.0)
    assert (policy.lane_budgets(d.view(policy, rule), rule) == 30).all()
    rule = evict("razor_attention", induction=1.0)
    assert (policy.lane_budgets(d.view(policy, rule), rule) == TOKENS).all()


@pytest.mark.parametrize("knobs", [{"head_budget": "adaptive"}, {"layer_budget": "pyramid"}])
def test_razor_attention_sets_budgets_itself(knobs: dict[str, str]) -> None:
    (knob,) = knobs
    with pytest.raises(RequestError, match=f"{knob} has no effect: 'razor_attention' itself says what each head keeps"):
        evict("razor_attention", **knobs)


@pytest.mark.parametrize(
    ("depth", "span", "overlap", "width", "height", "rungs"),
    [
        (32, 16, 0, 2, 1, [0] * 16 + [1] * 16),  # the paper's default
        (30, None, 0, 2, 1, [0] * 15 + [1] * 15),  # ours: half of the layers
        (8, 4, 2, 3, 2, [0, 0, 1, 1, 1, 1, 1, 1]),
        (7, 2, 0, 4, 1, [0, 0, 1, 1, 2, 2, 3]),
        (4, 9, 0, 1, 1, [0, 0, 0, 0]),  # no ladder: the oldest go first
    ],
)
def test_lacache_climbs_from_shallow_to_deep(
    depth: int, span: int | None, overlap: int, width: int, height: int, rungs: list[int]
) -> None:
    d = dense(TOKENS, layers=depth, kv_heads=1, q_per_kv=1)
    rule = evict("lacache", span=span, overlap=overlap)
    scores = eviction_policy("lacache").score(d.view(eviction_policy("lacache"), rule), rule)
    for layer, rung in enumerate(rungs):
        wanted = ladder(TOKENS, width, height, rung)
        assert scores[layer, 0, SINKS:].argsort().equal(wanted[SINKS:].argsort())


def test_lacache_cut_in_steps_keeps_what_it_keeps_at_once() -> None:
    """As decode does: a token's place in the ladders is not moved by what went before."""
    d = dense(TOKENS, layers=4, kv_heads=1, q_per_kv=1)
    rule = evict("lacache")
    policy = eviction_policy("lacache")
    view, sinks = d.view(policy, rule), rule.sinks
    at_once, _ = keep_sets(policy.score(view, rule), view.kept, torch.full((4,), 20), sinks, 5)
    for budget in (47, 33, 20):
        index, count = keep_sets(policy.score(view, rule), view.kept, torch.full((4,), budget), sinks, 5)
        view = cut(view, index, count)
    assert torch.equal(view.positions, at_once)


def test_a2sf_without_decay_is_h2o() -> None:
    d = dense(TOKENS)
    plain, faded = (evict("h2o"), evict("a2sf", decay=1.0))
    views = [d.view(eviction_policy(rule.policy), rule) for rule in (plain, faded)]
    assert torch.equal(*(eviction_policy("h2o").score(view, plain) for view in views))


def test_keyformer_warms_up_with_every_generated_token() -> None:
    vote = evict("keyformer", temperature=2.0, heating=0.5).vote(100)
    assert (vote.temperature, vote.heating, vote.warm_from) == (2.0, 0.5, 99)  # position 100 is the first generated
    assert vote.is_noisy
    assert evict("snapkv").vote(100) == Vote()


@pytest.mark.parametrize("tokens", [1, SINKS, SINKS + 7, SINKS + 15])
def test_lagkv_keeps_the_newest_of_less_than_two_partitions(tokens: int) -> None:
    d = dense(tokens)
    rule = evict("lagkv", lag=8)
    kept = kept_by(rule, d.view(eviction_policy("lagkv"), rule), SINKS + 3)
    wanted = {*range(SINKS), *range(tokens - 3, tokens)} if tokens > SINKS + 3 else set(range(tokens))
    assert all(lane == wanted for layer in kept for lane in layer)


def test_lagkv_copes_with_channels_that_never_change() -> None:
    d = dense(TOKENS)
    d.keys[..., 3] = 0.25
    rule = evict("lagkv", lag=8)
    scores = eviction_policy("lagkv").score(d.view(eviction_policy("lagkv"), rule), rule)
    assert scores.isfinite().all()
    assert len(scores[0, 0, SINKS : SINKS + 8].unique()) == 8


@pytest.mark.parametrize("tokens", [1, SINKS, SINKS + 1])
def test_expected_attention_without_queries_is_finite(tokens: int) -> None:
    """Prompts of sinks and little else."""
    d = dense(tokens)
    rule = evict("expected_attention")
    zero = QueryMoments(torch.zeros(2, 6, 16).double(), torch.zeros(2, 6, 16, 16).double())
    view = replace(d.view(eviction_policy("expected_attention"), rule), queries=zero)
    assert eviction_policy("expected_attention").score(view, rule).isfinite().all()


@pytest.mark.parametrize(
    ("policy", "knobs", "param"),
    [
        ("lacache", {"span": 4, "overlap": 4}, "compression.kv.evict"),
        ("lacache", {"overlap": 1}, "compression.kv.evict"),
        ("a2sf", {"decay": 0.0}, "compression.kv.evict.decay"),
        ("keyformer", {"temperature": 0.0}, "compression.kv.evict.temperature"),
        ("lagkv", {"lag": 1}, "compression.kv.evict.lag"),
        ("expected_attention", {"future": 0}, "compression.kv.evict.future"),
    ],
)
def test_knobs_out_of_range_are_named(policy: str, knobs: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as refusal:
        evict(policy, **knobs)
    assert refusal.value.param == param
