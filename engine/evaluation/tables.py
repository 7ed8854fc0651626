"""A result on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from winnow.engine.evaluation.harness import TEXT
from winnow.engine.evaluation.measures import Mean
from winnow.engine.evaluation.plans import OFF, is_control
from winnow.engine.evaluation.result import Result


def show(result: Result, console: Console) -> None:
    if result.mean(OFF, "kl") is not None:
        console.print(_text(result))
    for protocol in result.protocols:
        console.print(_tasks(result, protocol))
    for name, why in result.refused.items():
        console.print(f"[yellow]not measured[/]  {name}: {why}", highlight=False)


def _text(result: Result) -> Table:
    length = next(cell.length for cell in result.values if cell.part == TEXT)
    table = _table(f"Real text after {length} tokens, against the uncompressed model")
    for title in ("held", "MiB", "read", "KL, nats", "agreement, %", "loss, nats"):
        table.add_column(title, justify="right")
    for name in result.measured_plans:
        held, mib, read, kl, agreement, loss = (
            result.mean(name, measure, TEXT) for measure in ("held", "held_mib", "read", "kl", "agreement", "loss")
        )
        if kl is not None:
            table.add_row(
                name,
                percent(held),
                number(mib, 1),
                percent(read),
                with_error(kl),
                with_error(agreement, scale=100, digits=1),
                with_error(loss),
                style=_style(name),
            )
    return table


def _tasks(result: Result, protocol: str) -> Table:
    parts = list(dict.fromkeys(part for part, _ in result.parts))
    lengths = sorted({length for _, length in result.parts})
    table = _table(f"Tasks, {protocol}: % of answers, over {', '.join(map(str, lengths))} tokens")
    for title in ("held", *parts, "all"):
        table.add_column(title, justify="right")
    for name in result.measured_plans:
        scores = [result.mean(name, "score", part, protocol=protocol) for part in parts]
        every = result.mean(name, "score", protocol=protocol)
        if every is not None:
            held = result.mean(name, "held", protocol=protocol)
            cells = (number(score, 0, 100) for score in scores)
            table.add_row(name, percent(held), *cells, with_error(every, 100, 0), style=_style(name))
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("plan", no_wrap=True)
    return table


def _style(name: str) -> str | None:
    return "bold" if name == OFF else "dim" if is_control(name) else None


def percent(mean: Mean | None) -> str:
    return "" if mean is None else f"{100 * mean.value:.1f} %"


def number(mean: Mean | None, digits: int, scale: float = 1.0) -> str:
    return "" if mean is None else f"{scale * mean.value:.{digits}f}"


def with_error(mean: Mean | None, scale: float = 1.0, digits: int = 3) -> str:
    """The mean ± its standard error."""
    if mean is None:
        return ""
    error = "" if mean.error is None else f" ± {scale * mean.error:.{digits}f}"
    return f"{scale * mean.value:.{digits}f}{error}"
