"""Profile files: those we ship are right, and a wrong one says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.profiles import PROFILES, load_profiles


def test_the_shipped_profiles() -> None:
    profiles = load_profiles()
    assert {"off", "light", "balanced", "aggressive", "streaming"} <= set(profiles)
    assert profiles["off"].is_off
    assert not any(plan.is_off for name, plan in profiles.items() if name != "off")
    assert profiles["streaming"].evicts_in_decode
    assert profiles["endless"].evict is not None and profiles["endless"].evict.is_compact
    assert load_profiles(str(PROFILES)) == profiles
    assert Plan.resolve("balanced", profiles).budget_tokens(100) == 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine: {kv: {evict: {policy: snapkv, budget: 2.5}}}", "mine.kv.evict.budget must be a fraction"),
        ("mine: {kv: {evict: {policy: snapkv, budget: 1e-1}}}", "not '1e-1'"),  # a string to YAML
        ("mine: {vision: {policy: random}}", "mine.vision.keep is required"),
        ("mine: {kv: {format: int3}}", "mine.kv.format must be"),
        ("mine:", "mine must be an object"),
        ("- mine", "must be a mapping of profile names"),
        ("", "must be a mapping of profile names"),
        ("off: {}", "False is no name for a profile; put it in quotes"),
        ("mine: {}\nmine: {}", "a key stands twice"),
        ("mine: {kv: {format: int8, format: int4}}", "a key stands twice"),
        ("mine: [", "cannot be read"),
        ("mine: !!python/object:os.system {}", "cannot be read"),
    ],
)
def test_a_broken_file_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "profiles.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"profiles\.yaml: ") as caught:
        load_profiles(path)
    assert message in str(caught.value)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_profiles(tmp_path / "none.yaml")


def test_profiles_may_share_parts(tmp_path: Path) -> None:
    path = tmp_path / "profiles.yaml"
    path.write_text("a: &a {kv: &kv {format: int8, residual: 64}}\nb: {kv: {<<: *kv, format: int4}}\n")
    profiles = load_profiles(path)
    assert (profiles["b"].kv.format, profiles["b"].kv.residual) == ("int4", 64)
