"""A result as one HTML file that needs nothing else: plots of the frontier, and every figure in tables."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from itertools import count

from winnow.engine.evaluation.chart import Line, Point, log_axis, percent_axis, plot, swatch
from winnow.engine.evaluation.harness import TEXT
from winnow.engine.evaluation.plans import OFF, WEIGHTS, family, is_control
from winnow.engine.evaluation.result import Result
from winnow.engine.evaluation.tables import number, percent, task_cells, task_titles, with_error
from winnow.engine.evaluation.tasks import TASKS

FEW = 0.2
"""Of the answers: where the uncompressed model finds fewer, they say little of plans"""

_STYLE = """
:root { color-scheme: light dark; --text: #1c1c1e; --soft: #6b7280; --rule: #d8dbe0; --back: #fff; --control: #8a8f98; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e8; --soft: #9aa0aa; --rule: #34373d; --back: #17181b; --control: #80858e; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 1320px;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin: 1.4rem 0 0; }
p, figcaption { color: var(--soft); max-width: 75ch; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1.2rem; }
figure { margin: 0; } svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: var(--soft); }
svg .grid { stroke: var(--rule); } .line:hover polyline { stroke-width: 3.5; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; list-style: none; }
.swatch { width: 13px; height: 13px; vertical-align: -1px; margin-right: .35rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .22rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
tr.off td { font-weight: 600; } tr.control td { color: var(--soft); }
"""


def page(result: Result) -> str:
    lines = [
        "<p>Every plan is compared with the same model uncompressed, on the same tokens. Bytes are those of the pages "
        "that a request held at its end. Errors are one standard error over contexts. Grey are the controls, which "
        "keep tokens at random, or the first and the newest: what any other eviction has to beat.</p>",
        *_plots(result),
        *_text_table(result),
    ]
    for protocol in result.protocols:
        lines += _tasks(result, protocol)
    return document("What compression costs", result, lines)


def document(title: str, result: Result, body: list[str]) -> str:
    """The page around lines of HTML: whose result it is, what was measured how, and what was not measured."""
    facts = result.facts
    stated = "; ".join(f"{key}: {value}" for key, value in facts.items() if isinstance(value, str | int))
    lines = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>winnow eval: {escape(result.name)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>',
        f"<h1>{escape(title)}: {escape(str(facts.get('model', '')))}</h1>",
        f"<p>{escape(stated)}</p>",
        *body,
    ]
    if result.refused:
        lines += ["<h2>Not measured</h2><ul>"]
        lines += [f"<li>{escape(name)}: {escape(why)}</li>" for name, why in result.refused.items()]
        lines += ["</ul>"]
    return "\n".join([*lines, "</body></html>", ""])


def _plots(result: Result) -> list[str]:
    wanted: list[tuple[str, str | None, int | None, str]] = [
        ("kl", None, None, "KL divergence, nats (less is better)"),
        ("agreement", None, None, "same likeliest token"),
    ]
    for protocol in result.protocols:
        for length in result.tasks(protocol):
            wanted += [
                ("score", protocol, length, f"answers found at {length} tokens, {protocol}"),
                ("loss", protocol, length, f"loss of the right answer at {length} tokens, {protocol} (less is better)"),
            ]
    figures: list[str] = []
    legend: dict[str, Line] = {}
    for measure, kind, at, title in wanted:
        lines = _lines(result, measure, kind, at)
        if not lines:
            continue
        legend |= {line.name: line for line in lines}
        xs, ys = ([getattr(p, axis) for line in lines for p in line.points] for axis in "xy")
        up = log_axis(title, ys) if measure in ("kl", "loss") else percent_axis(title, ys)
        if measure == "score":
            up = percent_axis(title, [0.0])
        figures.append(
            f"<figure>{plot(lines, percent_axis('bytes held, of those under no plan', [0.0, *xs]), up)}</figure>"
        )
    return ["<h2>Frontier</h2>", legend_of(legend.values()), '<div class="plots">', *figures, "</div>"]


def legend_of(lines: Iterable[Line]) -> str:
    marks = [f"<li>{swatch(line)}{escape(line.name)}</li>" for line in lines]
    return f'<ul class="legend">{"".join(marks)}</ul>'


def _lines(result: Result, measure: str, protocol: str | None, length: int | None) -> list[Line]:
    """One for each family of plans; where all that is measured is alike, colours are too."""
    families: dict[str, list[str]] = {}
    for name in result.measured_plans:
        if name == WEIGHTS:
            continue
        families.setdefault(family(name), []).append(name)
    numbers = {False: count(), True: count()}
    part = TEXT if protocol is None else None
    lines = []
    for name, plans in families.items():
        points = []
        is_grey = is_control(plans[0])
        place = next(numbers[is_grey])
        for plan in plans:
            value, held = (result.mean(plan, of, part, length, protocol) for of in (measure, "held"))
            if value is not None and held is not None and not (measure == "kl" and plan == OFF):
                label = f"{plan}: {with_error(value)} at {percent(held)}"
                points.append(Point(held.value, value.value, value.error, label))
        if points:
            lines.append(Line(name, tuple(points), place, is_grey))
    return lines


def _text_table(result: Result) -> list[str]:
    rows = []
    for name in result.measured_plans:
        means = {m: result.mean(name, m, TEXT) for m in ("held", "held_mib", "read", "kl", "agreement", "loss")}
        if means["kl"] is not None:
            rows.append(
                row(
                    name,
                    [
                        percent(means["held"]),
                        number(means["held_mib"], 1),
                        percent(means["read"]),
                        with_error(means["kl"], digits=4),
                        with_error(means["agreement"], 100, 1),
                        with_error(means["loss"], digits=4),
                    ],
                )
            )
    if not rows:
        return []
    head = ["held", "MiB", "read", "KL, nats", "agreement, %", "loss, nats"]
    note = (
        "KL: from the uncompressed model's distribution of the next token to the plan's. Agreement: how often both "
        "find the same token likeliest. Loss: of the plan on what the text says. The tokens are the text's own, "
        "whatever the model would have said, and were read after the context was compressed. Read: bytes that their "
        "attention read, of those under no plan, for plans that read a part of what is held."
    )
    return ["<h2>Real text</h2>", f"<p>{note}</p>", *table(head, rows)]


def _tasks(result: Result, protocol: str) -> list[str]:
    tasks = result.tasks(protocol)
    when = "before the question was read" if protocol == "query-agnostic" else "with the question in it"
    named = dict.fromkeys(task for names in tasks.values() for task in names if task in TASKS)
    chances = "; ".join(f"{task}: {TASKS[task].title} (guessing: {TASKS[task].chance})" for task in named)
    note = (
        f"The context was compressed {when}. Per cent of the answers found; loss is of the right answer, in nats a "
        f"token beyond the uncompressed model's on the same contexts, and ranks the plans. {chances}."
    )
    lines = [f"<h2>Tasks, {escape(protocol)}</h2>", f"<p>{escape(note)}</p>"]
    for length in tasks:
        rows = [row(name, task_cells(result, name, protocol, length)) for name in result.ranked(protocol, length)]
        lines += [f"<h3>{length} tokens</h3>", f"<p>{_worth(result, protocol, length)}</p>"]
        lines += table(task_titles(result, protocol, length), rows)
    return lines


def _worth(result: Result, protocol: str, length: int) -> str:
    """What the uncompressed model can do, which bounds what its answers can tell of plans."""
    score, loss = (result.mean(OFF, measure, length=length, protocol=protocol) for measure in ("score", "loss"))
    if score is None or loss is None:
        return "The uncompressed model was not asked."
    said = f"The uncompressed model finds {100 * score.value:.0f} % of the answers, at {loss.value:.2f} nats a token."
    few = " That is too few to tell plans apart by their answers: go by the loss." if score.value < FEW else ""
    return said + few


def row(name: str, cells: list[str]) -> str:
    kind = ' class="off"' if name == OFF else ' class="control"' if is_control(name) else ""
    return f"<tr{kind}><td>{escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def table(head: list[str], rows: list[str]) -> list[str]:
    titles = "".join(f"<th>{escape(title)}</th>" for title in ("plan", *head))
    return ['<div class="scroll"><table>', f"<tr>{titles}</tr>", *rows, "</table></div>"]
