"""Prompts that are read in stages (prompt_distill), against dense runs of transformers that see as little."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from winnow.engine.errors import RequestError
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import Backend

from ..models.checkpoints import prompt_of, random_model
from ..models.reference import default_reference
from .bench import Bench, assert_same, pages_for
from .masked import MaskedRun, causal, run_masked
from .texts import tokens_of_text

SINKS = 3


def distil(**knobs: Any) -> dict[str, Any]:
    return {"kv": {"evict": {"policy": "prompt_distill", "budget": 0.3, "sinks": SINKS} | knobs}}


def chosen_by(attention: Tensor, budget: int, pool: int) -> list[int]:
    """The paper's choice: [q_heads, prompt] probabilities of the last query -> positions, the newest and sinks among
    them."""
    mean = attention.double().mean(0).tolist()
    near = pool // 2
    scores = [sum(mean[max(0, i - near) : i + near + 1]) / pool for i in range(len(mean))]
    sure = {len(mean) - 1, *range(SINKS)}
    rest = sorted((i for i in range(len(mean)) if i not in sure), key=lambda i: -scores[i])
    return sorted([*sure, *rest[: budget - len(sure)]])


def masked(model: Any, config: Any, tokens: list[int], prompt: int, layer: int, plan: dict[str, Any]) -> MaskedRun:
    """A dense run in which upper layers see only what the layer chose, and lower ones do once the prompt is read."""
    evict = plan["kv"]["evict"]
    visible = causal(config.layers, config.kv_heads, len(tokens))
    whole = run_masked(model, tokens, visible.clone())
    budget = evict["budget"] if isinstance(evict["budget"], int) else max(1, int(prompt * evict["budget"]))
    chosen = chosen_by(whole.attention[layer, :, prompt - 1, :prompt], budget, evict.get("pool", 5))
    held = torch.zeros(prompt, dtype=torch.bool)
    held[chosen] = True
    visible[layer + 1 :, :, :, :prompt] &= held | torch.eye(len(tokens), prompt, dtype=torch.bool)
    if evict.get("lower", "truncate") == "truncate":
        visible[: layer + 1, :, prompt:, :prompt] &= held
    return run_masked(model, tokens, visible)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("knobs", [{"layer": 0}, {"layer": 1, "lower": "keep"}, {"layer": 1, "budget": 20, "pool": 1}])
def test_equals_a_run_that_sees_as_little(family: str, knobs: dict[str, Any], ops: Backend, tmp_path: Path) -> None:
    model = random_model(family)
    model.save_pretrained(tmp_path)
    bench, prompt, plan = Bench(load_model(str(tmp_path), ops, "f32")), prompt_of(90), distil(**knobs)
    seen = bench.alone(prompt, 12, plan)
    run = masked(model, bench.engine.config, [*prompt, *seen.tokens[:-1]], 90, knobs["layer"], plan)
    for at, logits in seen.logits.items():
        torch.testing.assert_close(logits, run.logits[at - 1], atol=1e-4, rtol=1e-4)
        assert int(run.logits[at - 1].argmax()) == seen.tokens[at - 90]
    report = seen.last.compression
    assert report is not None
    budget = 20 if "budget" in knobs else 27
    assert report.tokens_kept_min == budget + 11
    assert report.tokens_kept_max == (101 if "lower" in knobs else budget + 11)


def test_equals_it_on_the_default_model(default_model: Decoder) -> None:
    """The layer that chooses lies at 13/32 of the depth if none is named."""
    prompt, plan = tokens_of_text(200), distil(budget=0.5)
    seen = Bench(default_model, max_step_tokens=64).alone(prompt, 5, plan)
    run = masked(default_reference(), default_model.config, [*prompt, *seen.tokens[:-1]], 200, 12, plan)
    wanted = torch.stack([run.logits[at - 1] for at in seen.logits])
    torch.testing.assert_close(torch.stack([*seen.logits.values()]), wanted, atol=1e-3, rtol=1e-3)
    assert wanted.argmax(-1).tolist() == seen.tokens


@pytest.mark.parametrize("plan", [distil(layer=1), distil(layer=0, lower="keep"), distil(layer=1, budget=40)])
@pytest.mark.parametrize("fmt", [None, "int4"])
def test_bits_do_not_depend_on_the_schedule(tiny: Decoder, plan: dict[str, Any], fmt: str | None) -> None:
    """Alone, in chunks, beside others, after a prefix that others have published, and preempted anywhere."""
    if fmt is not None:
        plan = {"kv": plan["kv"] | {"format": fmt, "residual": 0}}
    prompt = prompt_of(150)
    wanted = Bench(tiny).alone(prompt, 30, plan)
    chunked = Bench(tiny, max_step_tokens=17)
    chunked.alone(prompt, 3)
    assert_same(chunked.alone(prompt, 30, plan), wanted)
    bench, dice = Bench(tiny, pages_for(tiny, 500), max_step_tokens=40), random.Random(3)
    for i in range(3):
        bench.submit(f"plain {i}", prompt_of(60 + i, i), 30)
        bench.submit(f"staged {i}", prompt, 30, plan, n=1 + i % 2)

    def preempt() -> None:
        if bench.running and dice.random() < 0.1:
            bench.engine.scheduler.preempt(dice.choice(bench.running))
        bench.engine.check_integrity()

    bench.run(preempt)
    assert bench.engine.stats.preemptions_total
    for i in range(3):
        assert_same(bench.seen[f"staged {i}", 0], wanted)
        assert_same(bench.seen[f"plain {i}", 0], Bench(tiny).alone(prompt_of(60 + i, i), 30))
    assert bench.held_pages == 0


def test_a_budget_of_everything_changes_nothing(tiny: Decoder) -> None:
    """Stages alone are no approximation: reading all rows in two passes has the bits of one."""
    prompt = prompt_of(100)
    assert_same(Bench(tiny).alone(prompt, 20, distil(layer=1, budget=1000)), Bench(tiny).alone(prompt, 20))


def test_upper_layers_never_hold_what_was_not_chosen(tiny: Decoder) -> None:
    bench = Bench(tiny, max_step_tokens=50)
    bench.submit("a", prompt_of(200), 5, distil(layer=0, budget=32, lower="keep"))
    most = 0
    while not bench.engine.is_idle:
        bench.step()
        if bench.running:
            kept = bench.engine.arena.kept[bench.sequence("a").slot]
            most = max(most, int(kept[1:].max()))
    assert most == 32 + 3  # the last token it says is not read, and the one before is when it goes


@pytest.mark.parametrize(
    ("knobs", "path"),
    [
        ({"layer": 2}, "layer"),
        ({"layer": -1}, "layer"),
        ({"pool": 4}, "pool"),
        ({"during": "both"}, "during"),
        ({"head_budget": "adaptive"}, "head_budget"),
        ({"layer_budget": "pyramid"}, "layer_budget"),
        ({"merge": {"policy": "kv_merging"}}, "merge"),
    ],
)
def test_what_cannot_be(tiny: Decoder, knobs: dict[str, Any], path: str) -> None:
    with pytest.raises(RequestError) as error:
        Bench(tiny).submit("a", prompt_of(50), 5, distil(**knobs))
    assert error.value.param == f"compression.kv.evict.{path}"


def test_not_under_sliding_windows(ops: Backend, tmp_path: Path) -> None:
    random_model("mistral", sliding_window=32).save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="sliding windows"):
        Bench(load_model(str(tmp_path), ops, "f32")).submit("a", prompt_of(50), 5, distil(layer=0))
