"""`winnow calibrate`, and what a plan that needs a profile is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from winnow.engine.calibration.registry import CALIBRATED, check_profiles, profiles_needed
from winnow.engine.calibration.store import load_profiles
from winnow.engine.compression.plan import Plan
from winnow.engine.errors import PlanNotSupported
from winnow.engine.models.loader import resolve_model
from winnow.server.cli import app

TRI = {"kv": {"evict": {"policy": "tri_attention", "budget": 0.5}}}


def test_a_profile_from_the_users_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A profile is made of what the model reads. " * 30)
    options = ["--method", "double_sparsity", "--text", str(text), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["calibrate", *options, "--threads", str(torch.get_num_threads())])
    assert done.exit_code == 0, done.output
    assert "double_sparsity" in done.stdout
    assert "1/1" in done.stdout  # prompts read, of all
    (profile,) = load_profiles(resolve_model("default"), (tmp_path / "out",)).values()
    assert profile["channels"].shape == (30, 3, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "snapkv"], "--method snapkv needs no calibration; one of tri_attention"),
        (["--weights", "int4"], "--weights is f32 or int8, not int4"),
        (["--text", "/nowhere/to/be/found"], "/nowhere/to/be/found: cannot be read"),
        (["--model", "/nowhere/to/be/found"], "no such directory"),
    ],
)
def test_mistakes_are_said_in_one_line(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["calibrate", *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_plan_names_what_it_needs() -> None:
    assert profiles_needed(Plan.parse({})) == []
    assert profiles_needed(Plan.parse({"kv": {"evict": {"policy": "knorm", "budget": 0.5}, "format": "int8"}})) == []
    assert profiles_needed(Plan.parse(TRI)) == [("kv.evict.policy", "tri_attention")]
    assert profiles_needed(Plan.parse({"kv": {"format": "cskv"}})) == [("kv.format", "cskv")]
    mix = {"mix": {"policy": "zipcache", "format": "f16", "rest": "matryoshka"}}
    assert profiles_needed(Plan.parse({"kv": mix})) == [("kv.mix.rest", "matryoshka")]


def test_a_missing_profile_is_named_with_its_command() -> None:
    check_profiles(Plan.parse(TRI), ["tri_attention"], "default")
    check_profiles(Plan.parse({}), [], "default")
    with pytest.raises(PlanNotSupported, match="winnow calibrate --model org/m --method tri_attention") as error:
        check_profiles(Plan.parse(TRI), ["razor_attention"], "org/m")
    assert error.value.param == "compression.kv.evict.policy"


def test_the_server_needs_no_torch_to_know() -> None:
    program = """
import sys
import winnow.server.cli
from winnow.engine.calibration.registry import CALIBRATED, check_profiles
assert CALIBRATED
assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert CALIBRATED
