"""What was measured: figures in tables, targets beside them, on the terminal and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table as Grid


@dataclass
class Figure:
    """One number, measured once in each round."""

    unit: str
    values: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def median(self) -> float:
        return median(self.values)

    def as_dict(self) -> dict[str, Any]:
        spread = {"median": self.median, "low": min(self.values), "high": max(self.values), "values": self.values}
        return {"unit": self.unit, **spread, **({"note": self.note} if self.note else {})}


@dataclass
class Table:
    """A scenario's figures by row and column; each may be compared with those of one row or one column."""

    title: str
    base_row: str | None = None
    base_column: str | None = None
    figures: dict[tuple[str, str], Figure] = field(default_factory=dict)

    def add(self, row: str, column: str, unit: str, value: float, note: str = "") -> None:
        figure = self.figures.setdefault((row, column), Figure(unit))
        figure.values.append(float(value))
        figure.note = note or figure.note

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(row for row, _ in self.figures))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for _, column in self.figures))

    def ratio(self, row: str, column: str) -> float | None:
        """Of a figure's median to that of its base; None where there is none, or it is the base."""
        base = (self.base_row or row, self.base_column or column)
        if base == (row, column) or base not in self.figures or (row, column) not in self.figures:
            return None
        below = self.figures[base].median
        return self.figures[row, column].median / below if below else None

    def as_dict(self) -> dict[str, Any]:
        base = {"row": self.base_row, "column": self.base_column}
        figures = [
            {"row": row, "column": column, **figure.as_dict(), "ratio": self.ratio(row, column)}
            for (row, column), figure in self.figures.items()
        ]
        return {"title": self.title, "base": base, "figures": figures}

    def as_grid(self) -> Grid:
        grid = Grid(title=self.title, title_justify="left")
        grid.add_column("")
        for column in self.columns:
            grid.add_column(column, justify="right")
        for row in self.rows:
            grid.add_row(row, *(self._cell(row, column) for column in self.columns))
        return grid

    def _cell(self, row: str, column: str) -> str:
        figure = self.figures.get((row, column))
        if figure is None:
            return ""
        ratio = self.ratio(row, column)
        return f"{shown(figure.median)} {figure.unit}" + (f" ({shown(ratio)}×)" if ratio is not None else "")


@dataclass(frozen=True)
class Target:
    """What is wished for, never asserted."""

    text: str
    wanted: float
    measured: Callable[[dict[str, Table]], float | None]
    """None where a run did not measure it"""


@dataclass
class Report:
    name: str
    facts: dict[str, Any]
    tables: dict[str, Table] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    left_out: dict[tuple[str, str], str] = field(default_factory=dict)
    """Why, by who and what"""

    def table(self, key: str, title: str, base_row: str | None = None, base_column: str | None = None) -> Table:
        return self.tables.setdefault(key, Table(title, base_row, base_column))

    def leave_out(self, who: str, what: str, why: str) -> None:
        self.left_out[who, what] = why

    def verdicts(self) -> list[dict[str, Any]]:
        out = []
        for target in self.targets:
            measured = target.measured(self.tables)
            verdict = "not measured" if measured is None else "met" if measured >= target.wanted else "missed"
            out.append({"target": target.text, "wanted": target.wanted, "measured": measured, "verdict": verdict})
        return out

    def as_dict(self) -> dict[str, Any]:
        tables = {key: table.as_dict() for key, table in self.tables.items()}
        left_out = [{"who": who, "what": what, "why": why} for (who, what), why in self.left_out.items()]
        out = {"name": self.name, **self.facts, "tables": tables, "targets": self.verdicts()}
        return out | ({"left_out": left_out} if left_out else {})

    def write(self, folder: Path) -> Path:
        """Writes NAME.json at once and whole: a run that is cut keeps what it had."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        draft = path.with_suffix(".json.tmp")
        draft.write_text(json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n", "utf-8")
        draft.replace(path)
        return path

    def show(self, console: Console) -> None:
        for table in self.tables.values():
            console.print(table.as_grid())
        for (who, what), why in self.left_out.items():
            console.print(f"left out: {who}, {what}: {why}", markup=False, highlight=False, soft_wrap=True)
        if not self.targets:
            return
        grid = Grid("target", "wanted", "measured", "", title="Targets", title_justify="left")
        for verdict in self.verdicts():
            measured = "" if verdict["measured"] is None else shown(verdict["measured"])
            grid.add_row(verdict["target"], shown(verdict["wanted"]), measured, verdict["verdict"])
        console.print(grid)


def shown(value: float) -> str:
    """Three digits, more where they are whole."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
