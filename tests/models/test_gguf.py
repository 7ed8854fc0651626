"""GGUF files: every supported quantization, every architecture, and files that are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant

from winnow.engine.errors import ModelError
from winnow.engine.models.config import config_from_gguf
from winnow.engine.models.gguf_file import GgufFile
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import Backend

from .checkpoints import SIZES, finish, logits_of, prompt_of, random_model, write_gguf
from .lanes import prefill

ROWS, COLS = 40, 512


def _random_blocks(quant: Quant, generator: np.random.Generator) -> np.ndarray:
    """Blocks of a K-quant from random bits, with half-precision scales of a sane size."""
    block, size = gguf.GGML_QUANT_SIZES[quant]
    blocks = generator.integers(0, 256, (ROWS * COLS // block, size), dtype=np.uint8)
    places = {Quant.Q4_K: (0, 2), Quant.Q5_K: (0, 2), Quant.Q6_K: (208,)}[quant]
    for place in places:
        scales = generator.uniform(0.001, 0.01, (len(blocks), 1)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8)
    return blocks.reshape(ROWS, -1)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"])
def test_quantizations(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("winnow.engine.models.gguf_file._CHUNK", 7 * COLS)  # 40 rows are five chunks and a rest
    quant, generator = Quant[name], np.random.default_rng(0)
    if name.endswith("_K"):
        stored = _random_blocks(quant, generator)
    else:
        stored = gguf.quantize(generator.standard_normal((ROWS, COLS), np.float32), quant)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("before", np.ones(3, np.float32))  # 12 bytes: what follows is aligned
    writer.add_tensor("matrix", stored, raw_dtype=quant)
    file = GgufFile(finish(writer, tmp_path / "x.gguf"))

    assert file.tensors["matrix"].shape == (ROWS, COLS)
    out = np.empty((ROWS, COLS), np.float32)
    file.read_into("matrix", out)
    expected = gguf.dequantize(stored, quant)
    assert np.isfinite(expected).all()
    assert expected.std() > 0.01
    assert np.array_equal(out, expected)


MODELS = [
    pytest.param("llama", "llama", {}, {}, id="llama"),
    pytest.param("llama", "llama", {"tie_word_embeddings": True, "head_dim": 32}, {}, id="llama tied"),
    pytest.param("llama", "llama", {"attention_bias": True, "mlp_bias": True}, {}, id="llama with biases"),
    pytest.param(
        "llama",
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        id="linear rope",
    ),
    pytest.param(
        "qwen2",
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 5e2,
                "original_max_position_embeddings": 32,
            }
        },
        {
            "qwen2.rope.scaling.type": "yarn",
            "qwen2.rope.scaling.factor": 4.0,
            "qwen2.rope.scaling.original_context_length": 32,
        },
        id="qwen2, yarn rope",
    ),
    pytest.param("mistral", "llama", {"sliding_window": None}, {}, id="mistral"),
    pytest.param("mistral", "llama", {"sliding_window": 9}, {"llama.attention.sliding_window": 9}, id="mistral window"),
    pytest.param("qwen3", "qwen3", {"head_dim": 32}, {}, id="qwen3"),
]


@pytest.mark.parametrize(("family", "arch", "changes", "metadata"), MODELS)
def test_logits_are_those_of_transformers(
    family: str, arch: str, changes: dict[str, Any], metadata: dict[str, Any], tmp_path: Path, ops: Backend
) -> None:
    model = random_model(family, **changes)
    path = write_gguf(tmp_path / "x.gguf", model, arch, metadata)
    prompt = prompt_of(45)
    logits = prefill(load_model(str(path), ops, "f32"), prompt)
    torch.testing.assert_close(logits, logits_of(model, prompt), atol=1e-4, rtol=0)


def test_llama3_rope_is_a_tensor_of_divisors(tmp_path: Path, ops: Backend) -> None:
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = random_model("llama", rope_parameters=rope | {"rope_type": "llama3", "rope_theta": 500.0})
    plain = random_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    divisors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    path = write_gguf(tmp_path / "x.gguf", model, "llama", tensors={"rope_freqs.weight": divisors.numpy()})
    prompt = prompt_of(45)
    logits = prefill(load_model(str(path), ops, "f32"), prompt)
    torch.testing.assert_close(logits, logits_of(model, prompt), atol=1e-4, rtol=0)


def test_yarn_attention_factor_multiplies(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 0.5}
    metadata = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    config = config_from_gguf(GgufFile(write_gguf(tmp_path / "x.gguf", random_model("llama"), "llama", metadata)))
    assert config.rope_factor == pytest.approx(0.5 * (0.1 * np.log(4) + 1))
    assert config.max_position == SIZES["max_position_embeddings"]


@pytest.mark.parametrize(
    ("metadata", "ids"),
    [
        ({"tokenizer.ggml.eos_token_id": 1}, (1,)),
        ({"tokenizer.ggml.eos_token_id": 1, "tokenizer.chat_template": "{{ x }}<|im_end|>"}, (1, 2)),
        ({"tokenizer.ggml.eos_token_id": 2, "tokenizer.chat_template": "{{ x }}<|im_end|>"}, (2,)),
        ({"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 3}, (1, 3)),
        ({"tokenizer.chat_template": "</s>"}, ()),  # there, but an ordinary token
        ({}, ()),
    ],
)
def test_end_tokens(metadata: dict[str, Any], ids: tuple[int, ...], tmp_path: Path) -> None:
    vocabulary: dict[str, Any] = {
        "tokenizer.ggml.tokens": ["a", "<|endoftext|>", "<|im_end|>", "b", "</s>"],
        "tokenizer.ggml.token_type": [1, 3, 3, 1, 1],
    }
    path = write_gguf(tmp_path / "x.gguf", random_model("llama"), "llama", vocabulary | metadata)
    assert config_from_gguf(GgufFile(path)).eos_token_ids == ids


@pytest.mark.parametrize(
    ("arch", "metadata", "message"),
    [
        ("gemma", {}, "architecture 'gemma' is not supported; supported: llama, qwen2, qwen3"),
        ("llama", {"llama.expert_count": 8}, "mixture-of-experts"),
        ("llama", {"llama.rope.dimension_count": 8}, "partial rotary"),
        ("llama", {"llama.attention.head_count_kv": [2, 1, 2]}, "differ by layer"),
        ("llama", {"llama.attention.value_length": 32}, "different sizes"),
        ("llama", {"llama.logit_scale": 2.0}, "llama.logit_scale is not supported"),
        ("llama", {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "longrope"),
        ("qwen2", {"qwen2.attention.sliding_window": 9}, "sliding window"),
        ("llama", {"split.count": 2}, "split into several files"),
    ],
)
def test_refused_metadata(arch: str, metadata: dict[str, Any], message: str, tmp_path: Path, ops: Backend) -> None:
    model = random_model("qwen2" if arch == "qwen2" else "llama")
    path = write_gguf(tmp_path / "x.gguf", model, arch, metadata)
    with pytest.raises(ModelError, match=message):
        load_model(str(path), ops, "f32")


@pytest.mark.parametrize("key", ["embedding_length", "block_count", "attention.layer_norm_rms_epsilon"])
def test_missing_metadata(key: str, tmp_path: Path) -> None:
    file = GgufFile(write_gguf(tmp_path / "x.gguf", random_model("llama"), "llama"))
    del file.metadata[f"llama.{key}"]
    with pytest.raises(ModelError, match=f"missing '{key}'"):
        config_from_gguf(file)


def test_tensors_that_do_not_fit(tmp_path: Path, ops: Backend) -> None:
    model = random_model("llama")
    path = write_gguf(
        tmp_path / "more.gguf", model, "llama", tensors={"blk.0.ffn_gate_inp.weight": np.ones(32, np.float32)}
    )
    with pytest.raises(ModelError, match=r"unexpected tensor blk\.0\.ffn_gate_inp\.weight"):
        load_model(str(path), ops, "f32")
    path = write_gguf(tmp_path / "fewer.gguf", model, "llama", {"llama.block_count": 4})
    with pytest.raises(ModelError, match=r"tensor model\.layers\.3\.input_layernorm\.weight is missing"):
        load_model(str(path), ops, "f32")


def test_a_quantization_that_is_not_supported(tmp_path: Path, ops: Backend) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("matrix", np.zeros((2, 22), np.uint8), raw_dtype=Quant.Q5_0)
    file = GgufFile(finish(writer, tmp_path / "x.gguf"))
    with pytest.raises(ModelError, match="tensor matrix is Q5_0; supported: BF16, F16"):
        file.read_into("matrix", np.empty((2, 32), np.float32))


def test_truncated_anywhere(tmp_path: Path) -> None:
    vocabulary = {"tokenizer.ggml.tokens": ["a", "bc"], "tokenizer.ggml.scores": [0.5, 1.5], "x.flag": True}
    path = write_gguf(tmp_path / "x.gguf", random_model("llama", num_hidden_layers=1), "llama", vocabulary)
    whole = path.read_bytes()
    header = min(tensor.start for tensor in GgufFile(path).tensors.values())
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, header, 13), header, len(whole) - 1000, len(whole) - 33]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            GgufFile(cut)


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04" * 20, b"GGUF\x01\0\0\0" + bytes(40), b"GGUF\0\0\0\x03" + bytes(40)]
)
def test_not_a_gguf_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"x\.gguf: not a readable GGUF file"):
        GgufFile(path)
