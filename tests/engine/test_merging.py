"""Merging on the way from an eviction to pages: engine against dense attention over tokens merged by the oracles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnow.engine.compression.registry import MERGE
from winnow.engine.models.decoder import Decoder

from ..compression.merge_oracles import ORACLES, Lane
from ..models.checkpoints import prompt_of, random_model
from ..models.reference import default_reference
from .bench import Bench, Seen, assert_same
from .masked import dense_attention
from .texts import tokens_of_text

NEW = 12


class MergedAttention:
    """Attention whose queries from position `event` on see, of what lies before it, merged tokens only."""

    def __init__(self, seen: Seen, name: str, knobs: dict[str, Any], sinks: int, recent: int):
        (self.event,) = seen.kept
        self.kept = seen.kept[self.event]
        self.name, self.knobs, self.sinks, self.recent = name, knobs, sinks, recent

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [q_heads, T, D], key and value [kv_heads, T, D] -> [q_heads, T, D]."""
        group, event = query.shape[0] // key.shape[0], self.event
        out = torch.empty(query.shape, dtype=torch.float64)
        future = torch.ones(event, event).triu(1) > 0
        for head in range(key.shape[0]):
            mine = slice(head * group, (head + 1) * group)
            q, k, v = query[mine].double(), key[head].double(), value[head].double()
            before = (q[:, :event] @ k[:event].T * scaling).masked_fill(future, -torch.inf).softmax(-1)
            out[mine, :event] = before @ v[:event]
            keep = [i for i in self.kept[layer, head].tolist() if i >= 0]
            h2o = before.sum((0, 1))
            lane = Lane(k[:event], v[:event], h2o, [1.0] * event, keep, self.sinks, self.recent)
            keys, values, stands_for = ORACLES[self.name](lane, **self.knobs)
            held_k = torch.cat([torch.stack([keys[i] for i in keep]), k[event:]])
            held_v = torch.cat([torch.stack([values[i] for i in keep]), v[event:]])
            weight = torch.tensor([stands_for[i] for i in keep] + [1.0] * (len(k) - event), dtype=torch.float64)
            scores = q[:, event:] @ held_k.T * scaling + weight.log()
            later = torch.ones(scores.shape[1:]).triu(len(keep) + 1) > 0
            out[mine, event:] = scores.masked_fill(later, -torch.inf).softmax(-1) @ held_v
        return out


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("kv_merging", {}, {"policy": "h2o"}),
    ("kv_merging", {"proportional": True, "threshold": 0.3}, {"policy": "knorm", "head_budget": "adaptive"}),
    ("ems", {"threshold": 0.4}, {"policy": "h2o", "head_budget": "adaptive", "layer_budget": "pyramid"}),
    ("compensation", {}, {"policy": "streaming_llm"}),
]


def check(bench: Bench, model: PreTrainedModel, prompt: Sequence[int], case: tuple[str, Any, Any]) -> None:
    name, knobs, evict = case
    evict = {"budget": 0.3, "sinks": 3, "recent": 8, "merge": {"policy": name} | knobs} | evict
    seen = bench.alone(prompt, NEW, {"kv": {"evict": evict}})
    attention = MergedAttention(seen, name, knobs, 3, 8)
    logits = dense_attention(model, [*prompt, *seen.tokens[:-1]], attention)
    wanted = logits[[at - 1 for at in sorted(seen.logits)]]
    torch.testing.assert_close(torch.stack([seen.logits[at] for at in sorted(seen.logits)]), wanted, atol=2e-3, rtol=0)
    assert seen.tokens == wanted.argmax(-1).tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_what_stays_is_merged_as_the_oracle_says(tiny: Decoder, case: tuple[str, Any, Any]) -> None:
    assert {name for name, _, _ in CASES} == set(MERGE)
    reference = random_model("llama", max_position_embeddings=1024)
    check(Bench(tiny, max_step_tokens=40), reference, prompt_of(90, 4), case)


def test_on_the_default_model(default_model: Decoder) -> None:
    check(Bench(default_model), default_reference(), tokens_of_text(40, start=400), CASES[0])


@pytest.mark.parametrize("name", MERGE)
def test_a_budget_of_everything_merges_nothing(tiny: Decoder, name: str) -> None:
    bench, prompt = Bench(tiny), prompt_of(100, 2)
    wanted = bench.alone(prompt, 20)
    for budget in (1.0, 10_000):
        evict = {"policy": "h2o", "budget": budget, "during": "both", "interval": 7, "merge": {"policy": name}}
        assert_same(bench.alone(prompt, 20, {"kv": {"evict": evict}}), wanted)
