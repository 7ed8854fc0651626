"""Plots of the frontier as inline SVG: what a plan holds to the right, what it is worth upward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#3b4cc0")
SHAPES = ("circle", "square", "triangle", "diamond")
WIDTH, HEIGHT = 620, 380
LEFT, RIGHT, TOP, BOTTOM = 74, 26, 14, 46


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    error: float | None
    label: str
    """Shown when the pointer rests on it"""


@dataclass(frozen=True)
class Line:
    """The plans of one family, at several budgets."""

    name: str
    points: tuple[Point, ...]
    number: int
    """Decides its colour and shape"""
    is_control: bool = False
    """Drawn in grey"""

    @property
    def colour(self) -> str:
        return "var(--control)" if self.is_control else COLOURS[self.number % len(COLOURS)]

    @property
    def shape(self) -> str:
        return SHAPES[(self.number if self.is_control else self.number // len(COLOURS)) % len(SHAPES)]


@dataclass(frozen=True)
class Axis:
    title: str
    low: float
    high: float
    ticks: tuple[float, ...]
    shown: Callable[[float], str]
    is_log: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        if self.is_log:
            low, high, value = math.log(self.low), math.log(self.high), math.log(max(value, self.low))
        else:
            low, high = self.low, self.high
        return start + (end - start) * (min(max(value, low), high) - low) / (high - low)


def percent_axis(title: str, values: Sequence[float]) -> Axis:
    """From 0 to 100 %, or from the ten below the lowest value where all are high."""
    low = math.floor(10 * min(values, default=0.0)) / 10
    low = min(low, 0.9) if low >= 0.5 else 0.0
    step = 0.05 if low >= 0.8 else 0.1 if low else 0.2
    ticks = tuple(low + i * step for i in range(round((1 - low) / step) + 1))
    return Axis(title, low, 1.0, ticks, lambda value: f"{100 * value:.0f} %")


def log_axis(title: str, values: Sequence[float]) -> Axis:
    """Whole decades around the positive values."""
    positive = [value for value in values if value > 0] or [0.1, 1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)
    ticks = tuple(10.0**power for power in range(low, high + 1))
    return Axis(title, ticks[0], ticks[-1], ticks, lambda value: f"{value:g}", is_log=True)


def plot(lines: Sequence[Line], across: Axis, up: Axis) -> str:
    """One SVG element."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{up.title}, by {across.title}")}">']
    for tick in across.ticks:
        x = across.place(tick, LEFT, right)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{across.shown(tick)}</text>')
    for tick in up.ticks:
        y = up.place(tick, bottom, TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{up.shown(tick)}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across.title)}</text>')
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(up.title)}</text>')
    parts += [_line(line, across, up) for line in lines]
    return "\n".join([*parts, "</svg>"])


def swatch(line: Line) -> str:
    """The line's mark, for a legend."""
    return f'<svg class="swatch" viewBox="-7 -7 14 14">{_mark(line.shape, 0, 0, line.colour)}</svg>'


def _line(line: Line, across: Axis, up: Axis) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    places = [(across.place(p.x, LEFT, right), up.place(p.y, bottom, TOP), p) for p in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in sorted(places, key=lambda place: place[0]))
    dash = ' stroke-dasharray="4 3"' if line.is_control else ""
    parts = [f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="1.5"{dash}/>']
    for x, y, point in places:
        if point.error:
            ends = (up.place(point.y + sign * point.error, bottom, TOP) for sign in (-1, 1))
            y1, y2 = (f"{end:.1f}" for end in ends)
            parts.append(
                f'<line x1="{x:.1f}" y1="{y1}" x2="{x:.1f}" y2="{y2}" stroke="{line.colour}" stroke-opacity=".45"/>'
            )
        parts.append(_mark(line.shape, x, y, line.colour, point.label))
    return f'<g class="line">{"".join(parts)}</g>'


def _mark(shape: str, x: float, y: float, colour: str, label: str = "") -> str:
    title = f"<title>{escape(label)}</title>" if label else ""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}">{title}</circle>'
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "triangle": ((0, -5), (5, 4), (-5, 4)),
        "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{colour}">{title}</polygon>'
