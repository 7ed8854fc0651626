"""Several processes that share a tiny model, and what they are asked."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from winnow.engine.errors import PlanNotSupported
from winnow.engine.messages import CompressionReport
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.engine.ranks import Ranks
from winnow.kernels.dispatch import backend

from ..models.checkpoints import prompt_of, random_model
from ..prompt.messages import message
from .bench import Bench, Seen, pages_for
from .seeing import TinyEyes, picture, pictured

PATIENCE_S = 300.0

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 161}
"""Four lanes a layer, and a vocabulary that two do not share evenly"""

NEW = 24


@dataclass
class Said:
    """What came of one request at one rank."""

    tokens: list[int]
    logits: NDArray[np.float32]
    """[tokens, vocab]"""
    report: CompressionReport


def write_model(folder: Path) -> Path:
    random_model("llama", max_position_embeddings=1024, **SIZES).save_pretrained(folder)
    return folder


def _said(seen: Seen) -> Said:
    assert seen.rejected is None, seen.rejected
    report = seen.last.compression
    assert report is not None
    return Said(seen.tokens, torch.stack([seen.logits[at] for at in sorted(seen.logits)]).numpy(), report)


def kv(policy: str, **knobs: Any) -> dict[str, Any]:
    return {"kv": {"evict": {"policy": policy, "budget": 0.3, **knobs}}}


PLANS: dict[str, dict[str, Any]] = {
    "none": {},
    "snapkv": kv("snapkv"),
    "adaptive": kv("snapkv", head_budget="adaptive", layer_budget="pyramid", during="both", interval=7),
    "tova": kv("tova", during="both", interval=5),
    "h2o": kv("h2o", during="both", interval=7),
    "keyformer": kv("keyformer"),
    "expected_attention": kv("expected_attention"),
    "knorm": kv("knorm", head_budget="adaptive"),
    "random": kv("random"),
    "kvzip": kv("kvzip"),
    "prompt_distill": kv("prompt_distill"),
    "compact": kv("streaming_llm", budget=60, during="both", positions="compact"),
    "merged": kv("ems"),
    "int4": {"kv": {"format": "int4", "residual": 8}},
    "think": {"kv": {"format": "think", "residual": 8}},
    "adaptive int8": {"kv": {**kv("snapkv", head_budget="adaptive")["kv"], "format": "int8", "residual": 8}},
    "mikv": {"kv": {**kv("h2o")["kv"], "mix": {"policy": "mikv", "rest": "int4"}}},
    "zipvl": {"kv": {"mix": {"policy": "zipvl"}}},
    "quest": {"kv": {"read": {"policy": "quest", "tokens": 32}}},
    "tidal_decode": {"kv": {"read": {"policy": "tidal_decode", "tokens": 32, "dense_layers": 1}}},
}


def together(model: Decoder) -> dict[str, Said]:
    """All plans in one batch."""
    bench = Bench(model, profiles={}, max_step_tokens=100)
    for name, plan in PLANS.items():
        bench.submit(name, prompt_of(150, 3), NEW, plan)
    return {name: _said(seen) for (name, _), seen in bench.run(bench.engine.check_integrity).items()}


def crowded(model: Decoder) -> dict[str, Said]:
    """Lanes of all lengths in an arena too small for all: the cache gives blocks back, sequences preempt each other,
    and who allows it is compressed further."""
    bench = Bench(model, pages_for(model, 180), profiles={}, max_step_tokens=64)
    ragged = kv("snapkv", head_budget="adaptive", during="both", interval=9)
    plans = [{}, ragged, {"on_pressure": {"format": "int4", "residual": 0}}]
    for i in range(9):
        bench.submit(str(i), prompt_of(40 + 5 * i, i), 90, plans[i % 3])
    seen = bench.run(bench.engine.check_integrity)
    stats = bench.engine.stats
    assert stats.preemptions_total > 0 and stats.squeezes_total > 0
    return {name: _said(one) for (name, _), one in seen.items()}


def sampled(model: Decoder) -> dict[str, Said]:
    """Choices of one request, drawn by a seed that the first rank makes up; guesses; what was cached."""
    bench = Bench(model, profiles={})
    bench.submit("n", prompt_of(60, 5), 12, {}, n=3, temperature=1.0, seed=None)
    bench.submit("seeded", prompt_of(60, 5), 12, {}, temperature=1.0, top_p=0.9)
    bench.submit("guessed", prompt_of(20, 5) * 4, 30, {}, speculative={"method": "prompt_lookup"})
    bench.submit("recycled", prompt_of(20, 5) * 4, 30, {}, speculative={"method": "token_recycling"})
    seen = dict(bench.run())
    seen["again", 0] = bench.alone(prompt_of(60, 5), 12)
    assert seen["again", 0].last.cached_tokens == 48
    return {f"{name} {index}": _said(one) for (name, index), one in seen.items()}


def seeing(model: Decoder) -> dict[str, Said]:
    """Prompts with pictures; each rank has a tower of its own."""
    bench = Bench(model, profiles={}, max_step_tokens=40, eyes=TinyEyes())
    vision = {"vision": {"policy": "uniform", "keep": 11}}
    prompt, pictures = pictured([20, picture(0, 0), 9, picture(1, 0, 4, 9), 15])
    for name, plan in {"whole": {}, "pruned": vision, "packed": vision | PLANS["int4"]}.items():
        bench.submit(name, prompt, 12, plan, pictures=pictures)
    return {name: _said(seen) for (name, _), seen in bench.run(bench.engine.check_integrity).items()}


def shortened(model: Decoder) -> dict[str, list[int]]:
    """Prompts, by what their own tokens say of them and by what the last ones look at."""
    bench = Bench(model, profiles={})
    plans = ({"policy": "selective", "keep": 0.5}, {"policy": "spec_pc", "keep": 0.3})
    return {plan["policy"]: bench.shorten(message(plan)).prompt for plan in plans}


def refused(model: Decoder) -> dict[str, str]:
    """What several processes cannot do; one can."""
    said = ""
    try:
        Bench(model, profiles={}).submit("a", prompt_of(20), 4, {"kv": {"read": {"policy": "token_select"}}})
    except PlanNotSupported as error:
        said = f"{error.param}: {error.message}"
    return {"token_select": said}


CASES: tuple[Callable[[Decoder], dict[str, Any]], ...] = (together, crowded, sampled, seeing, shortened, refused)


def _work(rank: int, size: int, folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join(rank, size, f"{folder}/meeting", "cpu")
    model = load_model(f"{folder}/model", backend("cpu"), "f32", ranks)
    results.put((rank, {case.__name__: case(model) for case in CASES}))


def run_in_processes(size: int, folder: Path) -> list[dict[str, dict[str, Any]]]:
    """What each rank says to every case, of the model in `folder/model`."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_work, args=(rank, size, str(folder), results)) for rank in range(size)]
    for worker in workers:
        worker.start()
    said: dict[int, dict[str, dict[str, Any]]] = {}
    deadline = time.monotonic() + PATIENCE_S
    try:
        while len(said) < size:
            codes = [worker.exitcode for worker in workers]
            assert not any(codes) and time.monotonic() < deadline, f"the processes ended with {codes}"
            with contextlib.suppress(Empty):
                rank, answers = results.get(timeout=0.2)
                said[rank] = answers
    finally:
        for worker in workers:
            worker.join(5)
            worker.kill()
    return [said[rank] for rank in range(size)]
