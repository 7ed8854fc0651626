"""The plots of the frontier: what stands where, against the coordinates that its values have."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from winnow.engine.evaluation.chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Line,
    Point,
    log_axis,
    percent_axis,
    plot,
)

WIDE, HIGH = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM


def drawn(lines: list[Line], across: Axis, up: Axis) -> ElementTree.Element:
    return ElementTree.fromstring(plot(lines, across, up))


def test_points_stand_where_their_values_are() -> None:
    """A quarter held is a quarter of the way to the right, a tenth of a nat halfway from a hundredth to one."""
    points = (Point(0.5, 0.01, 0.005, "half"), Point(0.25, 0.1, None, "a quarter"), Point(1.0, 0.0, None, "all"))
    svg = drawn([Line("a", points, 0)], percent_axis("held", [0.0, 1.0]), log_axis("nats", [0.01, 0.1, 1.0]))
    marks = {mark[0].text: (float(mark.get("cx", "")), float(mark.get("cy", ""))) for mark in svg.iter("circle")}
    assert marks == {
        "half": (LEFT + WIDE / 2, HEIGHT - BOTTOM),
        "a quarter": (pytest.approx(LEFT + WIDE / 4, abs=0.05), pytest.approx(TOP + HIGH / 2, abs=0.05)),
        "all": (WIDTH - RIGHT, HEIGHT - BOTTOM),  # 0 has no logarithm: it stands at the foot
    }
    (path,) = svg.iter("polyline")
    assert [float(pair.split(",")[0]) for pair in path.get("points", "").split()] == sorted(
        x for x, _ in marks.values()
    ), "from left to right"
    errors = [line for line in svg.iter("line") if line.get("stroke-opacity")]
    assert [float(error.get("x1", "")) for error in errors] == [marks["half"][0]]


def test_more_is_up_and_to_the_right() -> None:
    points = tuple(Point(held, share, None, str(held)) for held, share in ((0.2, 0.93), (0.6, 0.97), (0.9, 1.0)))
    svg = drawn([Line("a", points, 0)], percent_axis("held", [0.0, 0.9]), percent_axis("agree", [0.93, 1.0]))
    xs, ys = zip(*((float(m.get("cx", "")), float(m.get("cy", ""))) for m in svg.iter("circle")), strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True)
    assert ys[-1] == TOP
    texts = {text.text for text in svg.iter("text")}
    assert {"90 %", "95 %", "100 %", "0 %", "20 %"} <= texts, "agreement from 90 % on, bytes from 0"


@pytest.mark.parametrize(
    ("values", "low", "ticks"),
    [([0.97, 0.99], 0.9, 3), ([0.85], 0.8, 5), ([0.62, 0.9], 0.6, 5), ([0.3], 0.0, 6), ([], 0.0, 6)],
)
def test_percent_axes(values: list[float], low: float, ticks: int) -> None:
    axis = percent_axis("share", values)
    assert (axis.low, axis.high, len(axis.ticks)) == (low, 1.0, ticks)
    assert axis.ticks[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([0.003, 0.2], (0.001, 0.01, 0.1, 1)), ([0.1], (0.1, 1)), ([0.0], (0.1, 1)), ([2.0, 30.0], (1, 10, 100))],
)
def test_log_axes(values: list[float], ticks: tuple[float, ...]) -> None:
    assert log_axis("nats", values).ticks == pytest.approx(ticks)


def test_controls_are_grey_and_families_differ() -> None:
    lines = [Line(f"f{i}", (Point(0.5, 0.5, None, f"f{i}"),), i) for i in range(25)]
    assert len({(line.colour, line.shape) for line in lines}) == 25
    controls = [Line(f"c{i}", (Point(0.5, 0.5, None, f"c{i}"),), i, is_control=True) for i in range(2)]
    assert {line.colour for line in controls} == {"var(--control)"}
    assert len({line.shape for line in controls}) == 2
