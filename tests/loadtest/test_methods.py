"""The table of methods: everything that is registered stands in it, with what was measured of it."""

from __future__ import annotations

import methods

from winnow.engine.compression.registry import EVICTION, MERGE, MIX, PROMPT, READ
from winnow.engine.compression.vision.registry import VISION
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
    assert f"| `int4` | {PageFormat.INT4.what} | not measured | 50% / - of 100%, in qa alone |  |" in page
    assert "| 80%, 0.5 nats, 52% held | not measured | not measured |" in page
    assert "needs a profile" in page
    source = "[2412.04467](https://arxiv.org/abs/2412.04467)"
    row = next(line for line in page.splitlines() if line.startswith("| `vision_zip` |"))
    assert all(
        part in row for part in (" pre_llm | embeddings, tower attention, tower keys | images, videos |", source)
    )
    assert row.endswith(f"| contextual 0.15625 | {source} |  |")
    widths = {line.count("|") for line in page.splitlines() if line.startswith("| `") and "not measured" in line}
    assert widths <= {4, 5, 6, 7, 8}
