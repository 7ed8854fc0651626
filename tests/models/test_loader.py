"""Files that are fine in several ways, and files that are not: the error names the tensor or the file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from winnow.engine.errors import ModelError
from winnow.engine.models.loader import load_model, resolve_model
from winnow.kernels.dispatch import Backend

from .checkpoints import logits_of, prompt_of, random_model
from .lanes import prefill

Tensors = Mapping[str, torch.Tensor | None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model("llama").save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Mapping[str, torch.Tensor | None]) -> None:
    """Replaces tensors of a checkpoint; None removes."""
    path = folder / "model.safetensors"
    tensors: dict[str, Any] = load_file(path) | dict(change)
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def test_shards(tmp_path: Path, ops: Backend) -> None:
    model = random_model("qwen2")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    prompt = prompt_of(10)
    logits = prefill(load_model(str(tmp_path), ops, "f32"), prompt)
    torch.testing.assert_close(logits, logits_of(model, prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_float_types_are_widened(dtype: torch.dtype, tmp_path: Path, ops: Backend) -> None:
    model = random_model("llama")
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in model.state_dict().items()})
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, {name: tensor.to(dtype) for name, tensor in model.state_dict().items()})
    prompt = prompt_of(10)
    logits = prefill(load_model(str(tmp_path), ops, "f32"), prompt)
    torch.testing.assert_close(logits, logits_of(model, prompt), atol=1e-4, rtol=0)


def test_tied_models_may_store_the_head_and_old_ones_their_frequencies(tmp_path: Path, ops: Backend) -> None:
    random_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    rewrite(
        tmp_path, {"lm_head.weight": torch.ones(160, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    )
    load_model(str(tmp_path), ops, "f32")


def test_progress_is_logged(folder: Path, ops: Backend, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="winnow.engine.models.loader"):
        load_model(str(folder), ops, "int8")
    assert "3 layers, weights in int8" in caplog.messages[0]
    assert "GiB" in caplog.messages[-1]


Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({Q: None}, f"tensor {Q} is missing", id="missing"),
        pytest.param({UP: torch.ones(96, 63)}, rf"tensor {UP} has shape \[96, 63\].*\[96, 64\]", id="misshapen"),
        pytest.param({"lm_head.bias": torch.ones(160)}, "unexpected tensor lm_head.bias", id="unexpected"),
        pytest.param({Q: torch.ones(64, 64).int()}, f"tensor {Q} holds torch.int32", id="not floats"),
    ],
)
def test_tensors_that_do_not_fit(change: Tensors, message: str, folder: Path, ops: Backend) -> None:
    rewrite(folder, change)
    with pytest.raises(ModelError, match=message):
        load_model(str(folder), ops, "f32")


@pytest.mark.parametrize("kept", [0, 4, 1000, -1], ids=["empty", "half a size", "in the header", "a byte less"])
def test_truncated_safetensors(kept: int, folder: Path, ops: Backend) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged or truncated"):
        load_model(str(folder), ops, "f32")


def test_no_safetensors(folder: Path, ops: Backend) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.safetensors: missing"):
        load_model(str(folder), ops, "f32")


def test_a_missing_shard_and_an_index_that_lies(tmp_path: Path, ops: Backend) -> None:
    random_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"]["model.extra"] = first
    index_path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=rf"tensor model\.extra is not in {first}"):
        load_model(str(tmp_path), ops, "f32")
    (tmp_path / first).unlink()
    with pytest.raises(ModelError, match=rf"{first}: missing"):
        load_model(str(tmp_path), ops, "f32")


def test_resolve_what_is_there(folder: Path) -> None:
    assert resolve_model(str(folder)) == folder
    gguf = folder / "x.gguf"
    gguf.touch()
    assert resolve_model(gguf) == gguf
    assert resolve_model("default").suffix == ".gguf"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "has no config.json"),
        ("file.bin", "a directory with a config.json or a .gguf file"),
        ("/no/such/model", "no such directory"),
        ("no spaces / here", "no such directory"),
    ],
)
def test_resolve_what_is_not(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").touch()
    with pytest.raises(ModelError, match=message):
        resolve_model(tmp_path / name if (tmp_path / name).exists() else name)


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="someone/model: not in the local cache, and cannot be downloaded"):
        resolve_model("someone/model")

    repo = tmp_path / "models--someone--model"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "tokenizer.json").write_text("{}")
    assert resolve_model("someone/model", weights=False) == snapshot
    (snapshot / "model.safetensors").touch()
    assert resolve_model("someone/model") == snapshot
