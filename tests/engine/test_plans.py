"""What plans do to a sequence, against dense runs of transformers that are masked to the same tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnow.engine.calibration.store import PACKAGED, load_profiles
from winnow.engine.compression.plan import Plan
from winnow.engine.compression.policy import LaneView, SetsBudgets
from winnow.engine.compression.registry import eviction_policy
from winnow.engine.compression.select import keep_sets, layer_budgets
from winnow.engine.models.config import read_config
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model, resolve_model
from winnow.kernels.dispatch import Backend

from ..compression.dense import SINKS, Dense, mass_of, moments_of, noise_of
from ..compression.knobs import taken
from ..compression.oracles import ORACLES, best, budget_of
from ..models.checkpoints import prompt_of, random_model
from ..models.reference import default_reference
from .bench import Bench, Seen, assert_same
from .masked import MaskedRun, causal, hide_evicted, run_masked, turned_back
from .profiles import profiles_of
from .texts import tokens_of_text

NEW = 20
ROUNDING = 1e-5
"""Scores whose difference is smaller than this part of the largest may fall either way"""


# A plan that changes nothing ---------------------------------------------------------------------------------------

IDLE: list[dict[str, Any]] = [
    *({"kv": {"evict": {"policy": policy, "budget": 1.0, "during": "both"}}} for policy in ORACLES),
    *({"kv": {"evict": {"policy": policy, "budget": 10_000}}} for policy in ORACLES),
    {"kv": {"format": "f32"}},
    {"kv": {"evict": {"policy": "snapkv", "budget": 1.0}, "format": "f32", "residual": 0}},
]


def test_a_plan_that_keeps_everything_is_none(tiny: Decoder) -> None:
    bench = Bench(tiny, max_step_tokens=50)
    prompt = prompt_of(130)
    wanted = bench.alone(prompt, 30)
    assert len(wanted.logits) == 30
    for plan in IDLE:
        seen = bench.alone(prompt, 30, plan)
        assert_same(seen, wanted)
        assert seen.logits.keys() == wanted.logits.keys()
        said, without = seen.last.compression, wanted.last.compression
        assert said is not None and without is not None
        noted = said.bytes_held - without.bytes_held  # by those whose budget might be exceeded yet
        assert noted == 0 or (noted > 0 and Plan.parse(plan).evicts_in_decode)
        assert msgspec.structs.replace(said, bytes_held=without.bytes_held) == without


def test_a_plan_that_keeps_everything_is_none_on_the_default_model(default_model: Decoder) -> None:
    bench = Bench(default_model)
    prompt = tokens_of_text(140)
    wanted = bench.alone(prompt, 6)
    for plan in (IDLE[1], IDLE[-1]):
        assert_same(bench.alone(prompt, 6, plan), wanted)


# Eviction is a mask ------------------------------------------------------------------------------------------------


def masked_like(model: PreTrainedModel, config: Any, tokens: list[int], seen: Seen) -> MaskedRun:
    visible = causal(config.layers, config.kv_heads, len(tokens), config.windows[0])
    return run_masked(model, tokens, hide_evicted(visible, seen.kept))


def check_is_masked(bench: Bench, model: PreTrainedModel, prompt: list[int], plan: dict[str, Any]) -> None:
    """Logits of the engine are those of a dense run that sees the same tokens, and so is the likeliest token."""
    seen = bench.alone(prompt, NEW, plan)
    assert seen.kept, "nothing was evicted"
    run = masked_like(model, bench.engine.config, [*prompt, *seen.tokens[:-1]], seen)
    rows = sorted(seen.logits)
    assert rows == list(range(len(prompt), len(prompt) + NEW))
    wanted = run.logits[[at - 1 for at in rows]]
    torch.testing.assert_close(torch.stack([seen.logits[at] for at in rows]), wanted, atol=1e-3, rtol=0)
    assert seen.tokens == wanted.argmax(-1).tolist()


@pytest.mark.parametrize(
    "evict",
    [
        {"policy": "snapkv", "budget": 0.3},
        {"policy": "snapkv", "budget": 0.3, "head_budget": "adaptive", "layer_budget": "pyramid"},
        {"policy": "knorm", "budget": 50, "head_budget": "adaptive", "during": "both", "interval": 6},
        {"policy": "h2o", "budget": 0.5, "during": "decode", "interval": 5},
    ],
    ids=["uniform", "adaptive pyramid", "adaptive, in prefill and decode", "in decode"],
)
def test_eviction_is_a_mask_on_the_default_model(default_model: Decoder, evict: dict[str, Any]) -> None:
    prompt = tokens_of_text(180, start=400)
    check_is_masked(Bench(default_model), default_reference(), prompt, {"kv": {"evict": evict}})


@pytest.mark.parametrize("window", [None, 30])
def test_eviction_is_a_mask(ops: Backend, tmp_path: Path, window: int | None) -> None:
    """With every policy; windows count positions, not what is left of them."""
    reference = random_model("mistral", sliding_window=window, max_position_embeddings=256)
    reference.save_pretrained(tmp_path)
    bench = Bench(load_model(str(tmp_path), ops, "f32"), max_step_tokens=64)
    for policy, during, heads in product(ORACLES, ("prefill", "decode", "both"), ("uniform", "adaptive")):
        # What is merged is no mask: that is tested with the merging.
        evict = taken({"policy": policy, "budget": 0.5, "during": during, "head_budget": heads, "merge": None})
        evict |= {} if during == "prefill" else {"interval": 6}
        check_is_masked(bench, reference, prompt_of(100, 3), {"kv": {"evict": evict}})


# Keep sets ---------------------------------------------------------------------------------------------------------


def differ_by_rounding(scores: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether two choices [...] bool differ only in entries whose scores are the same but for rounding."""
    swapped = scores[one != other]
    held = scores[scores.isfinite()]
    return len(swapped) == 0 or bool(swapped.max() - swapped.min() <= ROUNDING * held.abs().max())


@pytest.mark.parametrize("policy", ORACLES)
def test_keeps_what_the_oracle_keeps(default_model: Decoder, attention: Dense, policy: str) -> None:
    """At the end of a prompt on the real model, judged by its full attention matrices."""
    oracle, recent, knobs = ORACLES[policy]
    evict = {"policy": policy, "budget": 20, "sinks": SINKS, **knobs}
    seen = Bench(default_model, max_step_tokens=64).alone(tokens_of_text(150, start=900), 1, {"kv": {"evict": evict}})
    (event,) = seen.kept
    assert event == attention.tokens
    layers, heads, _ = seen.kept[event].shape
    for layer, head in product(range(layers), range(heads)):
        scores, budget = oracle(attention, layer, head), budget_of(policy, attention, layer, head, 20)
        kept, wanted = torch.zeros(2, event, dtype=torch.bool)
        kept[seen.kept[event][layer, head]] = True
        wanted[list(best(scores, budget, recent))] = True
        assert kept.sum() == budget
        assert differ_by_rounding(scores, kept, wanted), (layer, head)


@pytest.fixture(scope="module")
def attention() -> Dense:
    run = run_masked(default_reference(), tokens_of_text(150, start=900), causal(30, 3, 150))
    inv_freq = torch.tensor(read_config(resolve_model("default")).inv_freq)
    return Dense(
        run.keys,
        run.values,
        turned_back(run.queries, inv_freq),
        run.attention.double(),
        q_per_kv=3,
        inv_freq=inv_freq,
        profiles=load_profiles(resolve_model("default"), (PACKAGED,)),
    )


def view_at(event: int, last: int | None, held: Tensor, run: MaskedRun, plan: Plan, inv_freq: Tensor) -> LaneView:
    """What a policy must be shown at an event, from a dense run: held [layers, kv_heads, n] are positions, padded."""
    assert plan.evict is not None
    layers, heads = held.shape[:2]
    voters = plan.evict.voters(event)
    first = plan.evict.first_voter if voters is None else max(event - voters, last or 0)
    newest, noise = plan.evict.newest_voters(event), noise_of(7, layers, heads, run.keys.shape[2])
    votes, apart = (
        mass_of(run.attention[:, :, start:event].double(), range(start, event), plan.evict.vote(90), noise).float()
        for start in (first, max(event - newest, last or 0))
    )
    at, padding = held.clamp_min(0), held < 0
    keys, values = (
        side.gather(2, at[..., None].expand(*at.shape, side.shape[-1])).masked_fill(padding[..., None], 0.0)
        for side in (run.keys, run.values)
    )
    return LaneView(
        positions=held,
        kept=(~padding).sum(-1),
        layers=torch.arange(layers),
        keys=keys,
        values=values,
        mass=votes.gather(2, at).masked_fill(padding, 0.0),
        newest_mass=apart.gather(2, at).masked_fill(padding, 0.0) if newest else None,
        newest_votes=min(newest, event - (last or 0)),
        queries=moments_of(turned_back(run.queries, inv_freq)[:, :, first:event]),
        votes=event - first,
        q_per_kv=run.attention.shape[1] // heads,
        seen=event,
        seed=7,
        sinks=plan.evict.sinks,
        depth=layers,
        inv_freq=inv_freq,
        rope_factor=1.0,
    )


@pytest.mark.parametrize("policy", ORACLES)
def test_decode_evicts_what_a_dense_run_says(tiny: Decoder, policy: str) -> None:
    """At every event, ragged lanes and all: the engine shows its policies what a dense run would."""
    reference = random_model("llama", max_position_embeddings=1024)
    bench = Bench(tiny, max_step_tokens=64)
    prompt = prompt_of(90, 4)
    for during, heads, depth in product(("decode", "both"), ("uniform", "adaptive"), ("uniform", "pyramid")):
        evict: dict[str, Any] = {"policy": policy, "budget": 0.6, "during": during, "interval": 7, "merge": None}
        plan = {"kv": {"evict": taken(evict | {"head_budget": heads, "layer_budget": depth})}}
        seen = bench.alone(prompt, 30, plan)
        run = masked_like(reference, tiny.config, [*prompt, *seen.tokens], seen)
        last, held = None, torch.empty(3, 2, 0, dtype=torch.int64)
        assert len(seen.kept) == 4 + (during == "both")
        for event in sorted(seen.kept):
            new = torch.arange(last or 0, event).expand(3, 2, -1)
            held = packed(torch.cat([held, new], -1))
            view = replace(
                view_at(event, last, held, run, Plan.parse(plan), torch.tensor(tiny.config.inv_freq)),
                profile=profiles_of(tiny).get(policy),
            )
            check_choice(view, Plan.parse(plan), seen.kept[event])
            last, held = event, seen.kept[event]


def packed(held: Tensor) -> Tensor:
    """Padding (-1) last, the rest ascending."""
    end = held.max() + 1
    sorted_ = held.where(held >= 0, end).sort(-1).values
    return sorted_.where(sorted_ < end, -1)


def check_choice(view: LaneView, plan: Plan, kept: Tensor) -> None:
    evict = plan.evict
    assert evict is not None
    budget = evict.budget_tokens(view.seen)
    recent = evict.recent_tokens(budget)
    protected = min(budget, recent + evict.sinks)
    budgets = torch.tensor(layer_budgets(budget, 3, evict.layer_budget, view.seen, protected=protected))
    policy = eviction_policy(evict.policy)
    if isinstance(policy, SetsBudgets):
        budgets = policy.lane_budgets(view, evict)
    scores = policy.score(view, evict).masked_fill(~view.is_held, -torch.inf)
    index, _ = keep_sets(scores, view.kept, budgets, evict.sinks, recent, evict.head_budget)
    wanted = view.positions.gather(2, index.clamp_min(0)).masked_fill(index < 0, -1)
    for layer in range(3):  # where heads compete, a tie may be between two of them
        one, other = (
            torch.stack([torch.isin(view.positions[layer, head], choice[layer, head]) for head in range(2)])
            & view.is_held[layer]
            for choice in (kept, wanted)
        )
        assert one.sum() == other.sum()
        assert differ_by_rounding(scores[layer], one, other), (evict.policy, view.seen, layer)
