"""What was measured, as data: every value, with means and standard errors beside, and the summary of each plan."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from winnow.engine.evaluation.measures import Mean
from winnow.engine.evaluation.plans import OFF, WEIGHTS, Plans, is_control


class Cell(NamedTuple):
    """Where a value belongs."""

    plan: str
    part: str
    """"text" or a task"""
    length: int
    """Tokens of the context"""
    protocol: str
    """"query-aware" or "query-agnostic"; empty for text"""


@dataclass
class Result:
    name: str
    facts: dict[str, Any]
    plans: Plans
    refused: dict[str, str] = field(default_factory=dict)
    """Why, by plan"""
    values: dict[Cell, dict[str, list[float]]] = field(default_factory=dict)
    """Measure to its values, one for each context"""

    def add(self, plan: str, part: str, length: int, protocol: str, **measured: float) -> None:
        cell = self.values.setdefault(Cell(plan, part, length, protocol), {})
        for measure, value in measured.items():
            cell.setdefault(measure, []).append(value)

    def contexts(self, cell: Cell) -> int:
        """On how many contexts a cell was measured."""
        return len(self.values.get(cell, {}).get("held", ()))

    @property
    def measured_plans(self) -> list[str]:
        """Uncompressed, the controls, then the others, as they were named."""
        seen = {cell.plan for cell in self.values}
        names = [name for name in (*self.plans, WEIGHTS) if name in seen]
        return sorted(names, key=lambda name: (name not in (OFF, WEIGHTS), not is_control(name)))

    def tasks(self, protocol: str) -> dict[int, list[str]]:
        """Of each length, ascending."""
        cells = [cell for cell in self.values if cell.protocol == protocol]
        lengths = sorted({cell.length for cell in cells})
        return {at: list(dict.fromkeys(cell.part for cell in cells if cell.length == at)) for at in lengths}

    def ranked(self, protocol: str, length: int) -> list[str]:
        """The uncompressed model, and the plans that tasks of a length were measured under: those first under which the
        right answers are likeliest, beside the uncompressed model on the same contexts."""

        def place(name: str) -> tuple[bool, float]:
            loss = self.beyond(name, "loss", length, protocol)
            return name != OFF, loss.value if loss is not None else math.inf

        seen = {cell.plan for cell in self.values if (cell.protocol, cell.length) == (protocol, length)}
        return sorted((name for name in self.plans if name in seen), key=place)

    @property
    def protocols(self) -> list[str]:
        return list(dict.fromkeys(cell.protocol for cell in self.values if cell.protocol))

    def mean(
        self,
        plan: str,
        measure: str,
        part: str | None = None,
        length: int | None = None,
        protocol: str | None = None,
    ) -> Mean | None:
        """Over all contexts of the cells that match; None where nothing was measured."""
        values = [
            value
            for cell, measures in self.values.items()
            if cell.plan == plan
            and part in (None, cell.part)
            and length in (None, cell.length)
            and protocol in (None, cell.protocol)
            for value in measures.get(measure, ())
        ]
        return Mean.of(values) if values else None

    def beyond(self, plan: str, measure: str, length: int, protocol: str) -> Mean | None:
        """The mean over the contexts of tasks that a plan was asked about, less the uncompressed model's there."""
        differences = [
            value - exact
            for cell, measures in self.values.items()
            if (cell.plan, cell.length, cell.protocol) == (plan, length, protocol)
            for value, exact in zip(
                measures.get(measure, ()), self.values.get(cell._replace(plan=OFF), {}).get(measure, ()), strict=False
            )
        ]
        return Mean.of(differences) if differences else None

    def as_dict(self) -> dict[str, Any]:
        cells = []
        for cell, measures in self.values.items():
            values = {measure: [_short(value) for value in of] for measure, of in measures.items()}
            means = {measure: _shown(Mean.of(of)) for measure, of in values.items()}
            cells.append({**cell._asdict(), "means": means, "values": values})
        return {"name": self.name, **self.facts, "plans": self.plans, "refused": self.refused, "cells": cells}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        facts = {key: value for key, value in data.items() if key not in ("name", "plans", "refused", "cells")}
        result = cls(data["name"], facts, data["plans"], data["refused"])
        for cell in data["cells"]:
            result.values[Cell(*(cell[name] for name in Cell._fields))] = cell["values"]
        return result

    def write(self, folder: Path) -> Path:
        """Writes NAME.json whole, a line for each cell: a run that is cut keeps what it had."""
        data = self.as_dict()
        cells = ",\n".join(f"  {json.dumps(cell)}" for cell in data.pop("cells"))
        head = json.dumps(data, indent=1, ensure_ascii=False).removesuffix("\n}")
        return write_text(folder / f"{self.name}.json", f'{head},\n "cells": [\n{cells}\n ]\n}}\n')


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(path.suffix + ".tmp")
    draft.write_text(text, "utf-8")
    draft.replace(path)
    return path


def _shown(mean: Mean) -> dict[str, float | None]:
    return {"mean": _short(mean.value), "error": None if mean.error is None else _short(mean.error)}


def _short(value: float) -> float:
    short = float(f"{value:.5g}")
    return int(short) if short.is_integer() else short
