"""`quality`: what is measured, what is chosen, and what is said when there is nothing to choose from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from winnow.engine.calibration.frontier import NAME, choose, load_frontier, resolve_quality, save_frontier
from winnow.engine.calibration.measure import PLANS, measure
from winnow.engine.calibration.store import PACKAGED
from winnow.engine.compression.plan import Plan
from winnow.engine.errors import PlanNotSupported, RequestError
from winnow.engine.evaluation.measures import Whole
from winnow.engine.evaluation.plans import read_plan
from winnow.engine.evaluation.targets import Answer, Ask
from winnow.engine.messages import FrontierPoint
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.files import resolve_model

from ..engine.bench import Bench, assert_same
from ..models.checkpoints import prompt_of

INT8 = {"kv": {"format": "int8"}}
HALF = {"kv": {"evict": {"policy": "knorm", "budget": 0.5}}}
POINTS = (
    FrontierPoint("off", {}, 1.0, 0.0, 1.0),
    FrontierPoint("int8", INT8, 0.99, 0.004, 0.3),
    FrontierPoint("half", HALF, 0.95, 0.01, 0.5),
    FrontierPoint("window", {"kv": {"evict": {"policy": "streaming_llm", "budget": 64}}}, 0.8, 0.02, 0.1),
)


@pytest.mark.parametrize(
    ("quality", "name"),
    [
        (1.0, "off"),
        (0.99, "off"),  # int8's is not sure
        (0.986, "int8"),
        (0.95, "int8"),  # half is worse and larger
        (0.5, "window"),
        (0.78, "window"),
        (0.781, "int8"),
    ],
)
def test_the_cheapest_that_is_sure_of_the_quality(quality: float, name: str) -> None:
    chosen = choose(POINTS, quality)
    assert chosen is not None
    assert chosen.name == name
    assert resolve_quality(Plan.parse({"quality": quality}), POINTS, "m") == Plan.parse(chosen.plan)


def test_other_plans_are_left_alone() -> None:
    plan = Plan.parse(INT8)
    assert resolve_quality(plan, (), "m") is plan


def test_an_unmeasured_model_is_named_with_the_command() -> None:
    with pytest.raises(PlanNotSupported, match="`winnow calibrate --model org/m --frontier`") as error:
        resolve_quality(Plan.parse({"quality": 0.9}), (), "org/m")
    assert error.value.param == "compression.quality"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"quality": 0.9, "kv": {}}, "compression.quality: chooses the plan itself; leave out 'kv'"),
        ({"quality": 0.9, "on_pressure": {"format": "int4"}}, "leave out 'on_pressure'"),
        ({"quality": 0}, "must be greater than 0"),
        ({"quality": 1.01}, "must be at most 1"),
        ({"quality": "high"}, "must be a number"),
    ],
)
def test_what_is_refused(plan: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        Plan.parse(plan)
    assert error.value.param == "compression.quality"


def test_the_engine_chooses_too(tiny: Decoder) -> None:
    prompt, bench = prompt_of(100), Bench(tiny)
    wanted = bench.alone(prompt, 10, HALF)
    with pytest.raises(PlanNotSupported):
        bench.submit("a", prompt, 10, {"quality": 0.9})
    bench.engine.frontier = tuple(point for point in POINTS if point.name in ("off", "half"))
    assert_same(bench.alone(prompt, 10, {"quality": 0.9}), wanted)
    assert bench.engine.info.frontier == bench.engine.frontier


def test_kept_like_a_profile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = tmp_path / "m.gguf"
    weights.write_bytes(b"weights" * 1000)
    assert load_frontier(weights, (tmp_path,)) == ()
    file = save_frontier(tmp_path, weights, POINTS, {"text": "a"})
    assert load_frontier(weights, (tmp_path,)) == POINTS
    good = file.read_bytes()
    for bad in (good[:100], good.replace(b'"knorm"', b'"nobody"'), good.replace(b'"version": "1"', b'"version": "0"')):
        file.write_bytes(bad)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert load_frontier(weights, (tmp_path,)) == ()
        assert f"{file} is not used" in caplog.text
    assert [path.name for path in file.parent.iterdir()] == [NAME]


class Stub:
    """Agrees with itself, and under a plan on every second token; holds a quarter then."""

    weights, max_model_len = "none", 10_000

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def decode(self, tokens: list[int]) -> str:
        return " ".join("x" * token for token in tokens)

    def ask(self, asks: Sequence[Ask]) -> list[Answer | RequestError]:
        answers: list[Answer | RequestError] = []
        for ask in asks:
            likely = np.full((len(ask.forced) - 1, 4), -9.0, np.float32)
            rows = np.arange(len(likely))
            likely[rows, rows % 2 if ask.plan.get("kv") else 0] = -0.1
            text = np.array(ask.forced[1:]) % 4
            answers.append(Answer("", Whole(likely, text), 25 if ask.plan.get("kv") else 100, 100))
        return answers


def test_measuring() -> None:
    told: list[tuple[int, int]] = []
    plans = {"int8": INT8}
    text = "word " * 500
    points = measure(Stub(), text, 3, 100, 21, plans, lambda read, prompts: told.append((read, prompts)))
    by_name = {point.name: point for point in points}
    assert by_name["off"] == POINTS[0]
    assert by_name["int8"] == FrontierPoint("int8", INT8, 0.5, 0.0, 0.25)
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_the_shipped_frontier() -> None:
    points = load_frontier(resolve_model("default"), (PACKAGED,))
    by_name = {point.name: point for point in points}
    assert set(PLANS) < set(by_name)
    assert by_name["off"] == POINTS[0]
    for name in PLANS:
        assert Plan.parse(by_name[name].plan) == Plan.parse(read_plan(name))
        assert 0 < by_name[name].memory < 1
    for quality in (0.5, 0.9, 0.95, 0.98, 1.0):
        chosen = choose(points, quality)
        assert chosen is not None
        assert chosen.quality - chosen.error >= quality
        assert chosen.memory < 1 or quality > 0.98
    assert len(msgspec.json.encode(points)) < 1 << 14
