"""The benchmark's arithmetic and its result file. What it measures is not tested."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import plans
import pytest
from client import Completion
from report import Figure, Report, Table, shown
from rich.console import Console
from scenarios import F32, INT8, QUICK, TARGETS, Sizes
from serving import metric

from winnow.engine.compression.plan import Plan

BASE = "transformers f32"


def make_report(decode: float = 30.0) -> Report:
    report = Report("unit", {"commit": "abc"}, targets=TARGETS)
    table = report.table("decode", "Decode", base_column=BASE)
    for value in (10.0, 30.0, 11.0):  # one slow round does not move the median
        table.add("128 tokens", BASE, "tok/s", value)
    table.add("128 tokens", INT8, "tok/s", decode, "a note")
    return report


def test_a_figure_is_its_median() -> None:
    figure = Figure("tok/s", [3.0, 1.0, 100.0])
    assert figure.as_dict() == {"unit": "tok/s", "median": 3.0, "low": 1.0, "high": 100.0, "values": [3.0, 1.0, 100.0]}


def test_ratios_to_a_column_and_to_a_row() -> None:
    table = make_report().tables["decode"]
    assert table.ratio("128 tokens", INT8) == pytest.approx(30 / 11)
    assert table.ratio("128 tokens", BASE) is None
    assert table.ratio("128 tokens", F32) is None  # nobody measured it
    rows = Table("Plans", base_row=plans.OFF)
    rows.add("int4", "speed", "tok/s", 3)
    assert rows.ratio("int4", "speed") is None  # the base is missing
    rows.add(plans.OFF, "speed", "tok/s", 2)
    assert rows.ratio("int4", "speed") == 1.5
    rows.add(plans.OFF, "preemptions", "times", 0)
    rows.add("int4", "preemptions", "times", 2)
    assert rows.ratio("int4", "preemptions") is None  # no ratio to zero


@pytest.mark.parametrize(("decode", "verdict"), [(30.0, "met"), (22.0, "met"), (21.9, "missed")])
def test_targets_are_met_or_missed(decode: float, verdict: str) -> None:
    first, *others = make_report(decode).verdicts()
    assert (first["verdict"], first["wanted"]) == (verdict, 2.0)
    assert {other["verdict"] for other in others} == {"not measured"}


def test_targets_find_the_figures_of_a_full_run() -> None:
    report = make_report()
    sizes = Sizes()
    report.table("together", "").add(f"{max(sizes.together)} requests", INT8, "tok/s", 61.0)
    table = report.table("plans", "", base_row=plans.OFF)
    for name in sizes.plans:
        table.add(name, f"decode at {sizes.plan_context}", "tok/s", 20.0 if name == plans.OFF else 25.0)
    title = f"{sizes.capacity_requests} requests of {sizes.capacity_context} tokens"
    report.table("capacity", title).add(plans.SMALLEST, "decode together", "requests", 20)
    assert [verdict["measured"] for verdict in report.verdicts()] == [pytest.approx(30 / 11), 61.0, 1.25, 20]


def test_a_written_report_reads_back(tmp_path: Path) -> None:
    report = make_report()
    report.write(tmp_path / "results")
    path = report.write(tmp_path / "results")  # again, as after every measurement
    assert [file.name for file in path.parent.iterdir()] == ["unit.json"]
    data = json.loads(path.read_text("utf-8"))
    assert data == report.as_dict()
    assert data["commit"] == "abc"
    assert data["tables"]["decode"]["figures"][1]["note"] == "a note"


def test_tables_on_a_terminal() -> None:
    out = StringIO()
    make_report(22.0).show(Console(file=out, width=140))
    assert "22 tok/s (2×)" in out.getvalue()
    assert "not measured" in out.getvalue()


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (2048.0, "2048"), (147.6, "148"), (3.14159, "3.14"), (0.00194, "0.00194")]
)
def test_shown(value: float, text: str) -> None:
    assert shown(value) == text


def test_times_of_a_completion() -> None:
    done = Completion(sent=1.0, arrivals=[3.0, 3.5, 5.0], tokens=5)
    assert (done.ttft_s, done.decode_tok_s, done.gaps_s) == (2.0, 2.0, [0.5, 1.5])
    assert done.is_decoding
    assert not Completion().is_decoding


def test_metrics_are_found() -> None:
    text = '# HELP winnow:num_preemptions_total x\nwinnow:num_preemptions_total{model_name="m",engine="0"} 3.0\n'
    assert metric(text, "num_preemptions_total") == 3.0
    assert metric(text, "num_preemptions") == 0.0


@pytest.mark.parametrize("name", plans.SPEED)
def test_plans_are_plans(name: str) -> None:
    assert Plan.parse(plans.SPEED[name]).is_off == (name == plans.OFF)
    assert set(QUICK.plans) <= set(plans.SPEED)
