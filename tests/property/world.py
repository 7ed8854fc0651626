"""The requests that the property tests draw from, and what each is answered when nothing disturbs it."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

from winnow.engine.messages import Picture
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import backend

from ..engine.bench import Bench
from ..engine.drafts import first_layers
from ..engine.seeing import TinyEyes, picture, pictured
from ..models.checkpoints import prompt_of, random_model

MOST_NEW = 60
MOST_CHOICES = 3

_BEGINNING = prompt_of(80, 99)
PROMPTS: list[list[int]] = [
    [5],
    prompt_of(16, 1),
    prompt_of(33, 2),
    _BEGINNING[:64],
    _BEGINNING,
    [*_BEGINNING, *prompt_of(17, 3)],
    [*_BEGINNING, *prompt_of(40, 4)],
    prompt_of(130, 5),
]
"""Some begin alike, and some end where a page or a block of the prefix cache does"""

_SEEN, _PICTURES = pictured([30, picture(0, 0), 11])
PICTURES: dict[int, list[Picture]] = {len(PROMPTS) + i: _PICTURES for i in range(2)}
"""Of the prompts that have any"""
PROMPTS += [_SEEN, [*_SEEN, *prompt_of(20, 6)]]

PLANS: list[dict[str, Any]] = [
    {},
    {"format": "int8", "residual": 0},
    {"format": "int4", "residual": 0},
    {"format": "bf16", "residual": 5},
    {"evict": {"policy": "snapkv", "budget": 0.4, "head_budget": "adaptive"}},
    {"evict": {"policy": "knorm", "budget": 0.9, "layer_budget": "pyramid"}, "format": "int4", "residual": 0},
    {"evict": {"policy": "h2o", "budget": 20, "during": "both", "interval": 3}},
    {"evict": {"policy": "keydiff", "budget": 0.7, "during": "decode", "interval": 5}, "format": "int8"},
    {"evict": {"policy": "tova", "budget": 1, "during": "both", "interval": 1, "sinks": 0}},
    {
        "evict": {"policy": "random", "budget": 0.8, "during": "decode", "interval": 7, "head_budget": "adaptive"},
        "format": "int4",
        "residual": 0,
    },
    {"evict": {"policy": "keyformer", "budget": 0.5, "during": "both", "interval": 6}},
    {"evict": {"policy": "expected_attention", "budget": 24, "during": "both", "interval": 9}, "format": "int8"},
    {"evict": {"policy": "streaming_llm", "budget": 30, "during": "both", "interval": 4}, "format": "bf16"},
    {"format": "mustafar70", "residual": 0},
    {"evict": {"policy": "keydiff", "budget": 0.7, "during": "decode", "interval": 5}, "format": "gear", "residual": 0},
    {"read": {"policy": "quest", "tokens": 24, "dense_layers": 0}},
    {
        "read": {"policy": "quest", "tokens": 0.2, "dense_layers": 1},
        "evict": {"policy": "knorm", "budget": 0.8, "during": "both", "interval": 6},
        "format": "int8",
        "residual": 0,
    },
    {"read": {"policy": "tidal_decode", "tokens": 12, "dense_layers": 0}, "format": "int4", "residual": 0},
    {"read": {"policy": "token_select", "tokens": 10, "sinks": 2, "recent": 8, "similarity": 0.5}, "format": "bf16"},
    {
        "evict": {
            "policy": "h2o",
            "budget": 0.5,
            "during": "both",
            "interval": 5,
            "merge": {"policy": "kv_merging", "proportional": True},
        },
        "format": "int8",
        "residual": 0,
    },
    {"evict": {"policy": "kvzip", "budget": 0.5}, "scope": "document"},
    {
        "evict": {"policy": "expected_attention", "budget": 0.6, "during": "both", "interval": 6},
        "format": "int8",
        "residual": 0,
        "scope": "document",
    },
    {"evict": {"policy": "random", "budget": 24, "merge": {"policy": "kv_merging"}}, "scope": "document"},
    {"format": "int4", "residual": 0, "scope": "document"},
    # One token ahead: more depend on how many the request is for.
    {"evict": {"policy": "spec_kv", "budget": 0.5, "window": 8, "lookahead": 1}, "format": "int8"},
]


BLIND = ("kvzip", "spec_kv")


def plan_of(prompt: int, plan: int) -> dict[str, Any]:
    """The whole plan: some tokens of pictures are dropped, and what does not go with pictures is left out there."""
    kv = PLANS[plan]
    if prompt not in PICTURES:
        return {"kv": kv}
    is_blind = "scope" in kv or kv.get("evict", {}).get("policy") in BLIND
    return {"kv": {} if is_blind else kv, "vision": {"policy": "uniform", "keep": 13 + plan % 2}}


def document_of(prompt: int, plan: int) -> int:
    """Tokens that a plan of scope 'document' compresses before it reads the rest: several prompts share some."""
    if prompt in PICTURES:
        return 0
    return min(64, len(PROMPTS[prompt]) - 1) if "scope" in PLANS[plan] else 0


Answers = list[tuple[int, ...]]


@cache
def model() -> Decoder:
    """Two layers of a Mistral whose window is shorter than most prompts."""
    with TemporaryDirectory() as path:
        reference = random_model("mistral", num_hidden_layers=2, sliding_window=60, max_position_embeddings=256)
        reference.save_pretrained(path)
        return load_model(path, backend("cpu"), "f32")


def draft() -> Decoder:
    return first_layers(model(), 1)


@cache
def answers(prompt: int, plan: int, temperature: float, tokens: int = MOST_NEW) -> Answers:
    """Of a request's choices, so many tokens each; a request for fewer is answered with their beginning."""
    bench = Bench(model(), prefix_caching=False, draft=draft(), eyes=TinyEyes())
    more: dict[str, Any] = {"document": document_of(prompt, plan), "n": MOST_CHOICES, "temperature": temperature}
    bench.submit("a", PROMPTS[prompt], tokens, plan_of(prompt, plan), pictures=PICTURES.get(prompt, ()), **more)
    bench.run()
    return [tuple(bench.seen["a", index].tokens) for index in range(MOST_CHOICES)]
