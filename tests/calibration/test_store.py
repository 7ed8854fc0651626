"""Where profiles lie, which model they belong to, and what happens to those that cannot be used."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from winnow.engine.calibration import store
from winnow.engine.calibration.registry import CALIBRATED
from winnow.engine.calibration.store import PACKAGED, cache_folder, load_profiles, save_profile, weights_hash
from winnow.engine.models.config import read_config
from winnow.engine.models.loader import resolve_model

METHOD = "razor_attention"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(range(256)) * 4096)
    return path


def test_the_hash_is_of_the_weights(weights: Path, tmp_path: Path) -> None:
    key = weights_hash(weights)
    assert len(key) == 16
    assert weights_hash(weights.rename(tmp_path / "other.gguf")) == key
    data = bytearray((tmp_path / "other.gguf").read_bytes())
    for changed in (data[:-1], data + b"x", bytes([1, *data[1:]]), data[:5000] + b"!" + data[5001:]):
        weights.write_bytes(changed)
        assert weights_hash(weights) != key


def test_large_files_are_sampled_to_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    size = 40 << 20
    with path.open("wb") as file:
        file.truncate(size)
    key = weights_hash(path)
    for place in (0, size - 1, size // 255):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert weights_hash(path) != key
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\0")
    assert weights_hash(path) == key


def test_all_shards_of_a_directory_count(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode() * 100)
    (tmp_path / "config.json").write_text("{}")
    key = weights_hash(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert weights_hash(tmp_path) == key
    (tmp_path / "b.safetensors").write_bytes(b"c" * 100)
    assert weights_hash(tmp_path) != key


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WINNOW_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "winnow" / "calibration"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/winnow/calibration")
    monkeypatch.setenv("WINNOW_CACHE", "~/w")
    assert cache_folder() == Path.home() / "w" / "calibration"


def test_the_users_own_profile_wins(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "PACKAGED", tmp_path / "packaged")
    assert load_profiles(weights) == {}
    save_profile(tmp_path / "packaged", weights, METHOD, {"echo": torch.zeros(2)}, {})
    assert load_profiles(weights)[METHOD]["echo"].tolist() == [0, 0]
    file = save_profile(cache_folder(), weights, METHOD, {"echo": torch.ones(2)}, {"text": "a", "tokens": 5})
    assert load_profiles(weights)[METHOD]["echo"].tolist() == [1, 1]
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing half written is left


@pytest.mark.parametrize("damage", ["cut", "old", "empty"])
def test_what_cannot_be_used_is_missing(
    damage: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if damage == "old":
        monkeypatch.setattr(store, "VERSION", "0")
    file = save_profile(tmp_path, weights, METHOD, {"echo": torch.zeros(200)}, {})
    monkeypatch.undo()
    if damage != "old":
        file.write_bytes(file.read_bytes()[: 150 if damage == "cut" else 0])
    with caplog.at_level(logging.WARNING):
        assert load_profiles(weights, (tmp_path,)) == {}
    assert f"{file} is not used" in caplog.text


def test_the_shipped_profiles_fit_the_default_model() -> None:
    path = resolve_model("default")
    config, profiles = read_config(path), load_profiles(path, (PACKAGED,))
    assert set(profiles) == set(CALIBRATED)
    heads, lanes = (config.layers, config.heads), (config.layers, config.kv_heads)
    shapes = {
        name: {part: tuple(tensor.shape) for part, tensor in profile.items()} for name, profile in profiles.items()
    }
    assert shapes["tri_attention"] == {"mean": (*heads, config.head_dim), "length": (*heads, config.head_dim // 2)}
    assert shapes["razor_attention"] == {"echo": heads, "induction": heads}
    assert shapes["double_sparsity"] == dict.fromkeys(("channels", "weight"), (*lanes, config.head_dim))
    size = sum(file.stat().st_size for file in (PACKAGED / weights_hash(path)).iterdir())
    for fmt in ("matryoshka", "cskv"):
        assert shapes[fmt] == dict.fromkeys(("keys", "values"), (*lanes, config.head_dim, config.head_dim // 2))
    assert size < 1 << 21
