"""A result of `winnow eval --vision`: on the terminal, and as an HTML file like that of `page.py`."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from rich.console import Console

from winnow.engine.compression.vision.policy import STAGES, stages_of
from winnow.engine.compression.vision.registry import VISION, vision_policy
from winnow.engine.evaluation.chart import Axis, Line, Point, log_axis, percent_axis, plot
from winnow.engine.evaluation.page import document, legend_of, row, table
from winnow.engine.evaluation.plans import BLIND, OFF, VISION_CONTROLS
from winnow.engine.evaluation.result import Result
from winnow.engine.evaluation.tables import new_table, number, percent, style, with_error
from winnow.engine.evaluation.vision import RIVALS, Seen, families, image_tokens, keeps, kinds, losses, policy_of, seen

TITLES = ("tokens", "held", "prefill, ms", "right, %", "questions")
CONTROLS = "controls"
WHERE = {
    "pre_llm": "Between tower and language model",
    "encoder": "In the tower",
    "llm_layer": "In the language model",
}
"""Headings of the stages"""


def show_vision(result: Result, console: Console) -> None:
    shown = new_table("Questions about pictures: % answered rightly")
    for title in TITLES:
        shown.add_column(title, justify="right", no_wrap=True)
    for name in result.measured_plans:
        if (of := seen(result, name)) is not None:
            shown.add_row(name, *_cells(result, name, of), style=style(name))
    console.print(shown)
    for name in _policies(result):
        if lost := _lost(result, name):
            console.print(f"[yellow]{name}[/]  {lost}", highlight=False)
    for name, why in result.refused.items():
        console.print(f"[yellow]not measured[/]  {name}: {why}", highlight=False)


def vision_page(result: Result) -> str:
    whole, blind = seen(result, OFF), seen(result, BLIND)
    known = [
        f"{said} {with_error(of.score, 100, 1)} % of the questions."
        for said, of in (("Unpruned, the model answers", whole), ("Blind, shown a grey picture, it answers", blind))
        if of is not None
    ]
    lines = [
        f"<p>{' '.join(known)} Pictures and questions are new to the model. Grey are the controls: what any other "
        "policy has to beat at what it keeps. Bytes are those of the pages that a request held at its end, question "
        "and answer included; prefill is the median time to the first token of a request alone, with a picture that "
        "was not seen before. Errors are one standard error over questions.</p>",
        *_plots(result),
        *_overview(result),
        "<h2>All figures</h2>",
        *table(
            [*TITLES, *kinds(result)],
            [
                row(name, [*_cells(result, name, of), *_by_kind(result, name)])
                for name in result.measured_plans
                if (of := seen(result, name)) is not None
            ],
        ),
    ]
    return document("What pruning image tokens costs", result, lines)


def _by_kind(result: Result, name: str) -> list[str]:
    return [number(result.mean(name, "score", kind), 0, 100) for kind in kinds(result)]


def _cells(result: Result, name: str, of: Seen) -> list[str]:
    """One for each of `TITLES`."""
    asked = sum(len(measures.get("score", ())) for cell, measures in result.values.items() if cell.plan == name)
    milliseconds = "" if of.prefill_s is None else f"{1000 * of.prefill_s:.1f}"
    return [number(of.kept, 1), percent(of.held), milliseconds, with_error(of.score, 100, 1), str(asked)]


def _policies(result: Result) -> list[str]:
    return [policy_of(name) for name in families(result)]


def _lost(result: Result, policy: str) -> str:
    """What a policy loses to; empty if to nothing."""
    lost = losses(result, policy)
    return ", ".join(f"{-100 * by.value:+.1f} points beside {rival}" for rival, by in lost.items())


def _overview(result: Result) -> list[str]:
    """A line for each policy, what it answers at each keep side by side."""
    rows = []
    for name, plans in families(result).items():
        by_keep = {result.plans[plan].get("vision", {}).get("keep"): seen(result, plan) for plan in plans}
        cells = ["" if (of := by_keep.get(keep)) is None else with_error(of.score, 100, 1) for keep in keeps(result)]
        rows.append(row(policy_of(name), [*cells, escape(_lost(result, policy_of(name)))]))
    if not rows:
        return []
    head = [f"{100 * keep:g} % kept" if isinstance(keep, float) else f"{keep} kept" for keep in keeps(result)]
    note = (
        "Per cent of the questions answered rightly. The last column has the policies that lose to "
        f"{' or '.join(RIVALS)} on the whole, and by how much: they are not recommended."
    )
    return ["<h2>By what is kept</h2>", f"<p>{note}</p>", *table([*head, "loses"], rows)]


def _plots(result: Result) -> list[str]:
    """For each stage, the controls beside: answers by tokens kept and by bytes, and prefill by tokens."""
    lines: list[str] = []
    for stage in (CONTROLS, *STAGES):
        names = [name for name in families(result) if _stage(policy_of(name)) == stage]
        if stage == CONTROLS or not names:
            continue
        controls = [name for name in families(result) if _stage(policy_of(name)) == CONTROLS]
        shown = [*controls, *names]
        answers = _lines(result, shown, lambda plan, of: (_keep(result, plan), of.score.value, of.score.error))
        bytes_ = _lines(result, shown, lambda _, of: (of.held.value, of.score.value, of.score.error))
        times = _lines(result, shown, lambda plan, of: (_keep(result, plan), of.prefill_s, None))
        lines += [f"<h2>{WHERE[stage]}</h2>", legend_of(answers), '<div class="plots">']
        right = percent_axis("questions answered rightly", [0.0])
        held = percent_axis("bytes held, of those under no plan", [p.x for line in bytes_ for p in line.points])
        lines += [_figure(answers, _kept_axis(answers), right), _figure(bytes_, held, right)]
        if times:
            up = log_axis("prefill, s", [p.y for line in times for p in line.points])
            lines.append(_figure(times, _kept_axis(times), up))
        lines.append("</div>")
    return lines


def _stage(policy: str) -> str:
    """Of the plot that shows it."""
    name = policy.split(":")[0].split("+")[0]
    return CONTROLS if name in VISION_CONTROLS else stages_of(vision_policy(name))[0] if name in VISION else ""


def _keep(result: Result, plan: str) -> float:
    """What a plan keeps, as a share of an image's tokens."""
    keep: float | int = result.plans[plan].get("vision", {}).get("keep", 1.0)
    return keep if isinstance(keep, float) else min(1.0, keep / (image_tokens(result) or keep))


Place = Callable[[str, Seen], tuple[float, float | None, float | None]]
"""x, y and the error of y; no y: there is nothing to show"""


def _lines(result: Result, names: list[str], place: Place) -> list[Line]:
    """One for each family, to which the unpruned model belongs too."""
    lines = []
    for is_grey in (True, False):
        mine = [name for name in names if (policy_of(name) in VISION_CONTROLS) is is_grey]
        for index, name in enumerate(mine):
            points = []
            for plan in (OFF, *families(result)[name]):
                of = seen(result, plan)
                if of is not None and (at := place(plan, of))[1] is not None:
                    label = f"{plan}: {with_error(of.score, 100, 1)} % at {of.kept.value:.1f} tokens"
                    points.append(Point(at[0], at[1], at[2], label))
            if points:
                lines.append(Line(policy_of(name), tuple(points), index, is_grey))
    return lines


def _kept_axis(lines: list[Line]) -> Axis:
    """Halves of the image's tokens down to the least."""
    least = min((point.x for line in lines for point in line.points if point.x > 0), default=0.5)
    ticks = [1.0]
    while ticks[-1] > 1.01 * least:
        ticks.append(ticks[-1] / 2)
    ticks.reverse()
    return Axis(
        "image tokens that a plan keeps",
        min(ticks[0], least),
        1.0,
        tuple(ticks),
        lambda share: f"{100 * share:.3g} %",
        is_log=True,
    )


def _figure(lines: list[Line], across: Axis, up: Axis) -> str:
    return f"<figure>{plot(lines, across, up)}</figure>"
