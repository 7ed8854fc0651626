"""Every plan on a GPU says and keeps what it does on the reference backend, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from winnow.engine.compression.plan import Plan
from winnow.engine.errors import PlanNotSupported
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import backend
from winnow.kernels.layout import PageFormat

from ..engine.bench import Bench, Seen
from ..engine.drafts import first_layers
from ..engine.plans import KV, LEAD_INS, evict
from ..engine.profiles import profiles_of
from ..models.checkpoints import prompt_of, random_model
from ..prompt.messages import TEXT, message

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

NEW = 24
PROMPT = prompt_of(150, 3)
FORMATS = [fmt.label for fmt in backend("triton").page_formats()] if torch.cuda.is_available() else []


def is_read_there(kv: dict[str, Any]) -> bool:
    """Whether the GPU has all page formats of a plan."""
    try:
        Plan.parse({"kv": kv}).check_formats(FORMATS)
    except PlanNotSupported:
        return False
    return True


PLANS: dict[str, dict[str, Any]] = {"none": {}} | {name: {"kv": kv} for name, kv in KV.items() if is_read_there(kv)}
TOLERANCE = {32: 1e-3, 16: 0.01, 8: 0.02, 4: 0.2, 2: 0.4}
"""Of logits, which spread over about ten; by the bits of the smallest page format"""
COMMON: dict[str, Any] = {"page_tokens": 16, "max_step_tokens": 64, "prefix_caching": False}


@dataclass(frozen=True)
class Pair:
    """The tiny model on the reference backend and on the GPU."""

    here: Decoder
    there: Decoder

    def bench(self, **settings: Any) -> Bench:
        """An engine on the reference backend."""
        return Bench(self.here, ops=backend("reference"), draft=first_layers(self.here), **(COMMON | settings))

    def gpu_bench(self, **settings: Any) -> Bench:
        settings = {"device": "cuda", "profiles": profiles_of(self.here)} | COMMON | settings
        return Bench(self.there, ops=backend("triton"), draft=first_layers(self.there), **settings)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path: Path = tmp_path_factory.mktemp("tiny")
    random_model("llama", max_position_embeddings=1024).save_pretrained(path)
    return Pair(*(load_model(str(path), backend(name), "f32") for name in ("reference", "triton")))


@pytest.fixture(scope="module")
def wanted(pair: Pair) -> dict[str, Seen]:
    """What each plan does on the reference backend."""
    bench = pair.bench()
    return {name: bench.alone(PROMPT, NEW, plan, lead_ins=LEAD_INS) for name, plan in PLANS.items()}


@pytest.fixture(scope="module")
def gpu_bench(pair: Pair) -> Bench:
    return pair.gpu_bench()


NEAR_TIES = {"knorm"}
"""Norms of a random model's keys are as good as equal"""


def _held_tokens(kept: Tensor) -> list[list[int]]:
    """(layer, head, token) of each token in [layers, kv_heads, n], padded with negative numbers."""
    return [[*at[:2], int(kept[tuple(at)])] for at in (kept >= 0).nonzero().tolist()]


def assert_alike(seen: Seen, wanted: Seen, has_near_ties: bool = False) -> None:
    """The same tokens kept and said, and logits that differ by rounding; where a code is, by a code here and there.

    With near ties rounding may decide which of a few tokens is kept; what follows is then another text.
    """
    assert seen.rejected is None
    assert seen.kept.keys() == wanted.kept.keys()
    for event, held in wanted.kept.items():
        differ = seen.kept[event].shape != held.shape or not torch.equal(seen.kept[event], held)
        if differ and has_near_ties:
            ours, theirs = (set(map(tuple, _held_tokens(kept))) for kept in (seen.kept[event], held))
            assert len(ours ^ theirs) <= 0.02 * len(theirs), f"other tokens are kept at {event}"
            return
        assert not differ, f"other tokens are kept at {event}"
    assert seen.tokens == wanted.tokens
    report = wanted.last.compression
    assert report is not None
    bits = min(PageFormat.parse(fmt).bits for fmt, tokens in report.tokens_by_format.items() if tokens)
    for at, logits in wanted.logits.items():
        torch.testing.assert_close(seen.logits[at], logits, atol=TOLERANCE[bits], rtol=0)


@pytest.mark.parametrize("name", PLANS)
def test_alone(gpu_bench: Bench, wanted: dict[str, Seen], name: str) -> None:
    seen = gpu_bench.alone(PROMPT, NEW, PLANS[name], lead_ins=LEAD_INS)
    assert_alike(seen, wanted[name], has_near_ties=name in NEAR_TIES)
    assert seen.last.compression == wanted[name].last.compression


def test_in_one_batch(pair: Pair, wanted: dict[str, Seen]) -> None:
    """Beginning with the same pages, in steps that are shared out anew each time."""
    bench = pair.gpu_bench(prefix_caching=True, max_step_tokens=100)
    for name, plan in PLANS.items():
        bench.submit(name, PROMPT, NEW, plan, lead_ins=LEAD_INS)
    bench.run()
    assert bench.engine.scheduler.counters.hit_tokens
    for name in PLANS:
        assert_alike(bench.seen[name, 0], wanted[name], has_near_ties=name in NEAR_TIES)


@pytest.mark.parametrize("name", ["none", "snapkv", "int4", "quest"])
def test_choices_and_guesses(pair: Pair, name: str) -> None:
    """Lanes are copied for choices, and cut where guesses are wrong."""
    seen = []
    for bench in (pair.bench(), pair.gpu_bench()):
        speculative = {"method": "prompt_lookup", "tokens": 4, "ngram_min": 1}
        kv = evict("snapkv", window=3) if name == "snapkv" else PLANS[name].get("kv", {})
        bench.submit("x", PROMPT[:40] * 4, NEW, {"kv": kv}, speculative=speculative, n=2, temperature=0.7)
        seen.append(bench.run())
        assert bench.engine.speculator.counters.draft_tokens
    assert seen[0].keys() == seen[1].keys()
    for choice, other in seen[0].items():
        assert_alike(seen[1][choice], other)


@pytest.mark.parametrize("plan", [{"policy": "selective", "keep": 0.5}, {"policy": "spec_pc", "keep": 0.3}])
def test_prompts_are_shortened(pair: Pair, plan: dict[str, Any]) -> None:
    there, here = (bench.shorten(message(plan, [TEXT, TEXT[::-1]])) for bench in (pair.gpu_bench(), pair.bench()))
    assert there == here
