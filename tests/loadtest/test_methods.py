"""The table of methods: everything that is registered stands in it, with what was measured of it."""

from __future__ import annotations

import json
from pathlib import Path

import methods

from winnow.engine.compression.registry import EVICTION, MERGE, MIX, PROMPT, READ
from winnow.engine.compression.vision.registry import VISION
from winnow.engine.evaluation.harness import IMAGE
from winnow.engine.evaluation.plans import FORMATS
from winnow.engine.evaluation.result import Result
from winnow.kernels.formats import PageFormat


def test_the_table_of_methods() -> None:
    result = Result("unit", {"model": "tiny", "weights": "f32"}, {"off": {}}, refused={"tova:0.25": "needs a profile"})
    for kl in (0.1, 0.3):
        result.add("snapkv:0.5", "text", 100, "", kl=kl, agreement=0.9, held=0.55)
    for plan, score in (("off", 1.0), ("snapkv:0.5", 0.25), ("int4", 0.5)):
        result.add(plan, "qa", methods.ANSWERS_AT, "query-agnostic", score=score)
        result.add(plan, "qa", 2 * methods.ANSWERS_AT, "query-agnostic", score=0.0)
    result.add("off", "qa", methods.ANSWERS_AT, "query-aware", score=1.0)
    result.add("snapkv:0.5", "qa", methods.ANSWERS_AT, "query-aware", score=0.75)
    result.add("selective:0.5", "text", 100, "", kl=0.5, agreement=0.8, held=0.52)
    page = methods.methods(result)
    for name in (*EVICTION, *MERGE, *MIX, *PROMPT, *READ, *FORMATS, *VISION):
        assert f"| `{name}` |" in page
    row = next(line for line in page.splitlines() if line.startswith("| `snapkv` |"))
    assert "| attention | 90%, 0.2 nats, 55% held | not measured | 25% / 75% of 100%, in qa alone |" in row
    assert row.endswith("| compact positions, documents |")
    for name, without in (
        ("kvzip", "adaptive heads, pyramid layers, decode, compact positions, images"),
        ("quest", "gear, pressure"),
        ("token_select", "eviction, gear, pressure, guesses"),
        ("mini_cache", "eviction, int4, quest, pressure"),
    ):
        assert next(line for line in page.splitlines() if line.startswith(f"| `{name}` |")).endswith(f"| {without} |")
    assert f"| `int4` | {PageFormat.INT4.what} | not measured | 50% / - of 100%, in qa alone |  |" in page
    assert "| 80%, 0.5 nats, 52% held | not measured | not measured |" in page
    assert "needs a profile" in page
    source = "[2412.04467](https://arxiv.org/abs/2412.04467)"
    row = next(line for line in page.splitlines() if line.startswith("| `vision_zip` |"))
    assert all(
        part in row for part in (" pre_llm | embeddings, tower attention, tower keys | images, videos |", source)
    )
    assert row.endswith(f"| contextual 0.15625 | {source} |  |")
    assert "keeps 50 %" not in page
    widths = {line.count("|") for line in page.splitlines() if line.startswith("| `") and "not measured" in line}
    assert widths <= {4, 5, 6, 7, 8}


def test_the_committed_page_is_made_of_the_committed_results() -> None:
    folder = Path(methods.__file__).parent
    result, images = (
        Result.from_dict(json.loads((folder / "results" / f"{name}.json").read_text("utf-8")))
        for name in ("smollm2-135m-eval", "mosaic-vision")
    )
    page = folder.parent / "engine" / "compression" / "METHODS.md"
    assert page.read_text("utf-8") == methods.methods(result, images), "make methods"


def test_what_was_measured_of_images() -> None:
    plans = {"off": {}, "blind": {}} | {
        f"vision:{name}:{keep}": {"vision": {"policy": name, "keep": keep}}
        for name in ("random", "downsample", "div_prune", "vision_zip")
        for keep in (0.5, 0.125)
    }
    images = Result("unit", {"model": "mosaic"}, plans, refused={"vision:vision_zip:0.125": "too few are left"})
    right = {"off": 1.0, "blind": 0.0, "random": 0.75, "downsample": 0.25, "div_prune": 0.5}
    for plan in plans:
        if (name := plan.removeprefix("vision:").split(":")[0]) in right:
            for question in range(4):
                images.add(plan, "colour", 0, IMAGE, kept=9, held=0.5, score=float(question < 4 * right[name]))
    page = methods.methods(Result("unit", {}, {"off": {}}), images)
    assert "Measured on mosaic: right answers to questions" in page
    assert "(unpruned 100%, shown a grey picture 0%)" in page
    assert "| source | keeps 50 % | keeps 12.5 % | loses to | goes not with |" in page
    rows = {line.split("`")[1]: line.split(" | ")[7:10] for line in page.splitlines() if line.startswith("| `")}
    assert rows["random"] == ["75%", "75%", ""]
    assert rows["div_prune"] == ["50%", "50%", "random"]
    assert rows["vision_zip"] == ["not measured", "too few are left", ""]
