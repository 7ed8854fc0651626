"""A result on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from winnow.engine.evaluation.harness import TEXT
from winnow.engine.evaluation.measures import Mean
from winnow.engine.evaluation.plans import OFF, is_control
from winnow.engine.evaluation.result import Cell, Result


def show(result: Result, console: Console) -> None:
    if result.mean(OFF, "kl") is not None:
        console.print(_text(result))
    for protocol in result.protocols:
        for length in result.tasks(protocol):
            console.print(_tasks(result, protocol, length))
    for name, why in result.refused.items():
        console.print(f"[yellow]not measured[/]  {name}: {why}", highlight=False)


def _text(result: Result) -> Table:
    length = next(cell.length for cell in result.values if cell.part == TEXT)
    least = f"; KL: {known}" if (known := result.facts.get("kl")) else ""
    table = new_table(f"Real text after {length} tokens, against the uncompressed model{least}")
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
                style=style(name),
            )
    return table


def _tasks(result: Result, protocol: str, length: int) -> Table:
    table = new_table(f"Tasks, {protocol}: % of answers at {length} tokens; loss of the right one beyond that of {OFF}")
    for title in task_titles(result, protocol, length):
        table.add_column(title, justify="right")
    for name in result.ranked(protocol, length):
        table.add_row(name, *task_cells(result, name, protocol, length), style=style(name))
    return table


def task_titles(result: Result, protocol: str, length: int) -> list[str]:
    return ["held", "loss", "all", *result.tasks(protocol)[length], "contexts"]


def task_cells(result: Result, name: str, protocol: str, length: int) -> list[str]:
    """One for each of `task_titles`."""

    def mean(measure: str, task: str | None = None) -> Mean | None:
        return result.mean(name, measure, task, length, protocol)

    tasks = result.tasks(protocol)[length]
    contexts = sum(result.contexts(Cell(name, task, length, protocol)) for task in tasks)
    beyond = result.beyond(name, "loss", length, protocol)
    every = [percent(mean("held")), with_error(beyond, digits=2), with_error(mean("score"), 100, 0)]
    return [*every, *(number(mean("score", task), 0, 100) for task in tasks), str(contexts)]


def new_table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("plan", no_wrap=True)
    return table


def style(name: str) -> str | None:
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
