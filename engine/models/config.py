"""What the decoder must know of a model, from a Hugging Face directory or a GGUF file.

Both become a transformers config first, so that defaults, rope scaling and attention windows have one reading.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from winnow.engine.errors import ModelError
from winnow.engine.models.files import directory_eos_ids, gguf_eos_ids, read_json
from winnow.engine.models.gguf_file import GgufFile
from winnow.engine.models.vision.names import VISION_MODELS
from winnow.kernels.layout import PageLayout

_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_MROPE_FAMILIES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2"}
"""Types of language models inside vision-language ones that are a family's but for their positions"""
_GGUF_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""GGUF calls Mistral's models "llama" too."""
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
_TRANSFORMERS_ERRORS = (ValueError, KeyError, TypeError, OSError, StrictDataclassError)


@dataclass(frozen=True)
class ModelConfig:
    architecture: str
    """llama, mistral, qwen2 or qwen3"""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_position: int
    """Positions the model is made for, rope scaling included"""
    rms_eps: float
    windows: tuple[int, ...]
    """Sliding window of each layer in tokens; 0: none"""
    tied_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    inv_freq: tuple[float, ...]
    """[head_dim / 2] rope frequencies, scaling included; exact float32 values"""
    rope_factor: float
    """What cos and sin are multiplied by (yarn's attention factor)"""
    eos_token_ids: tuple[int, ...]
    rope_sections: tuple[int, ...] = ()
    """Frequencies that are turned by each of a position's three axes (M-RoPE); empty where it has one"""


def read_config(path: Path) -> ModelConfig:
    """The config of a directory with a config.json, or of a .gguf file."""
    if path.is_dir():
        return _from_directory(path)
    return config_from_gguf(GgufFile(path))


def _from_directory(path: Path) -> ModelConfig:
    stated = read_json(path / "config.json")
    names = stated.get("architectures") or []
    known = _FAMILIES | VISION_MODELS
    model_type = known.get(names[0]) if names else None
    if model_type is None:
        what = f"architecture {names[0]}" if names else "a config.json without architectures"
        raise ModelError(f"{path}: {what} is not supported; supported: {', '.join(known)}")
    if "quantization_config" in stated:
        method = stated["quantization_config"].get("quant_method", "?")
        raise ModelError(f"{path}: weights quantized by {method} are not supported; use float weights or a GGUF file")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if config.model_type != model_type:
            raise ModelError(f"{path}: architecture {names[0]} does not go with model type {config.model_type}")
        eos = directory_eos_ids(path)
        if names[0] in VISION_MODELS:
            return _of_language_model(config, str(path), eos)
        return _from_transformers(config, model_type, str(path), eos, config.tie_word_embeddings)
    except _TRANSFORMERS_ERRORS as error:
        raise ModelError(f"{path}: config.json cannot be used: {_one_line(error)}") from error


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """The config that a GGUF file's metadata and tensor names describe."""
    family = _GGUF_FAMILIES.get(file.architecture)
    if family is None:
        known = ", ".join(_GGUF_FAMILIES)
        raise ModelError(f"{file.path}: GGUF architecture {file.architecture!r} is not supported; supported: {known}")
    try:
        stated = gguf_to_transformers(file)
        if "sliding_window" in stated:
            if family != "llama":
                raise ModelError(f"{file.path}: a sliding window is not supported for GGUF architecture {family!r}")
            family = "mistral"
        config = AutoConfig.for_model(family, **stated)
        eos, tied = gguf_eos_ids(file), config.tie_word_embeddings
        return _from_transformers(config, family, str(file.path), eos, tied, _gguf_rope_divisors(file))
    except _TRANSFORMERS_ERRORS as error:
        raise ModelError(f"{file.path}: the metadata cannot be used: {_one_line(error)}") from error


def gguf_to_transformers(file: GgufFile) -> dict[str, Any]:
    """Keyword arguments of the family's transformers config."""
    meta = {key.removeprefix(f"{file.architecture}."): value for key, value in file.metadata.items()}
    hidden, heads = meta["embedding_length"], meta["attention.head_count"]
    kv_heads = meta.get("attention.head_count_kv", heads)
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise ModelError(f"{file.path}: numbers of heads that differ by layer are not supported")
    if meta.get("expert_count", 0):
        raise ModelError(f"{file.path}: mixture-of-experts models are not supported")
    head_dim = meta.get("attention.key_length", hidden // heads)
    if meta.get("attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{file.path}: keys and values of different sizes are not supported")
    if meta.get("rope.dimension_count", head_dim) != head_dim:
        raise ModelError(f"{file.path}: partial rotary embeddings are not supported")
    for key in ("attention.scale", "logit_scale", "residual_scale", "embedding_scale"):
        if key in meta:
            raise ModelError(f"{file.path}: {file.architecture}.{key} is not supported")
    windowed = {"sliding_window": window} if (window := meta.get("attention.sliding_window")) else {}
    return windowed | {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": meta["feed_forward_length"],
        "num_hidden_layers": meta["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": meta["context_length"],
        "rms_norm_eps": meta["attention.layer_norm_rms_epsilon"],
        "rope_parameters": _gguf_rope(meta),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def _gguf_rope(meta: dict[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(meta.get("rope.freq_base", 10000.0))}
    kind = meta.get("rope.scaling.type", "none")
    if kind == "none":
        return rope
    factor = meta.get("rope.scaling.factor") or 1.0
    rope |= {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = meta.get("rope.scaling.original_context_length")
        rope["beta_fast"] = meta.get("rope.scaling.yarn_beta_fast")
        rope["beta_slow"] = meta.get("rope.scaling.yarn_beta_slow")
        if "rope.scaling.attn_factor" in meta:
            # llama.cpp multiplies the file's factor with yarn's own; transformers replaces yarn's by it.
            rope["attention_factor"] = meta["rope.scaling.attn_factor"] * (0.1 * float(np.log(factor)) + 1.0)
    return {key: value for key, value in rope.items() if value is not None}


def _gguf_rope_divisors(file: GgufFile) -> torch.Tensor | None:
    """What llama3 scaling divides each frequency by, which GGUF files state as a tensor."""
    if any(name.startswith("rope_factors_") for name in file.tensors):
        raise ModelError(f"{file.path}: rope scaling 'longrope' changes with the context and is not supported")
    if "rope_freqs.weight" not in file.tensors:
        return None
    divisors = np.empty(file.tensors["rope_freqs.weight"].shape, np.float32)
    file.read_into("rope_freqs.weight", divisors)
    return torch.from_numpy(divisors)


def _of_language_model(config: PreTrainedConfig, source: str, eos: tuple[int, ...]) -> ModelConfig:
    """That of the decoder inside a vision-language model."""
    text = config.text_config
    family = _MROPE_FAMILIES.get(text.model_type, text.model_type)
    if family not in _FAMILIES.values():
        raise ModelError(f"{source}: a language model of type {text.model_type!r} is not supported")
    made = _from_transformers(text, family, source, eos, config.tie_word_embeddings)
    section: tuple[int, ...] = ()
    if text.model_type in _MROPE_FAMILIES:
        section = tuple(text.rope_parameters.get("mrope_section", (16, 24, 24)))
        if len(section) != 3 or sum(section) != made.head_dim // 2:
            wanted = made.head_dim // 2
            raise ModelError(f"{source}: mrope_section {list(section)} must be three numbers that add up to {wanted}")
    return replace(made, rope_sections=section)


def _from_transformers(
    config: PreTrainedConfig,
    family: str,
    source: str,
    eos: tuple[int, ...],
    tied: bool,
    rope_divisors: torch.Tensor | None = None,
) -> ModelConfig:
    """The parts of a transformers config that matter; what the decoder cannot do is an error."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    if config.hidden_act != "silu":
        raise ModelError(f"{source}: activation {config.hidden_act!r} is not supported; 'silu' is")
    if heads % kv_heads:
        raise ModelError(f"{source}: {heads} attention heads cannot share {kv_heads} KV heads")
    if config.hidden_size % 8 or config.intermediate_size % 8:
        raise ModelError(f"{source}: hidden and intermediate sizes must be multiples of 8")
    try:
        PageLayout(head_dim)
    except ValueError as error:
        raise ModelError(f"{source}: {error}") from error
    inv_freq, rope_factor = _rope(config, head_dim, source)
    if rope_divisors is not None:
        if rope_divisors.shape != inv_freq.shape:
            raise ModelError(f"{source}: tensor rope_freqs.weight should have shape {list(inv_freq.shape)}")
        inv_freq = inv_freq / rope_divisors
    # Llama's and Qwen3's flag covers q, k, v and o; Qwen2 always has q, k and v; Mistral has none.
    flag = bool(getattr(config, "attention_bias", False)) and family in ("llama", "qwen3")
    return ModelConfig(
        architecture=family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=_max_position(config),
        rms_eps=config.rms_norm_eps,
        windows=_windows(config, family),
        tied_embeddings=bool(tied),
        qk_norm=family == "qwen3",
        qkv_bias=flag or family == "qwen2",
        out_bias=flag,
        mlp_bias=family == "llama" and bool(config.mlp_bias),
        inv_freq=tuple(inv_freq.tolist()),
        rope_factor=float(rope_factor),
        eos_token_ids=eos,
    )


def _rope(config: PreTrainedConfig, head_dim: int, source: str) -> tuple[torch.Tensor, float]:
    """Frequencies [head_dim / 2] float32 and the factor of cos and sin, computed as transformers does."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ModelError(f"{source}: rope scaling {kind!r} changes with the context and is not supported")
    if kind not in _STATIC_ROPE:
        raise ModelError(f"{source}: rope scaling {kind!r} is not supported; supported: {', '.join(_STATIC_ROPE)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{source}: partial rotary embeddings are not supported")
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](config)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    return 1.0 / (rope["rope_theta"] ** exponents), 1.0


def _windows(config: PreTrainedConfig, family: str) -> tuple[int, ...]:
    layers: int = config.num_hidden_layers
    if family == "mistral":
        return (config.sliding_window or 0,) * layers
    kinds = getattr(config, "layer_types", None) if family in ("qwen2", "qwen3") else None
    window = getattr(config, "sliding_window", None) or 0
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds or [""] * layers)


def _max_position(config: PreTrainedConfig) -> int:
    # Qwen's yarn recipe leaves max_position_embeddings at the length before scaling.
    rope = config.rope_parameters
    if rope.get("rope_type") != "yarn":
        return int(config.max_position_embeddings)
    return max(config.max_position_embeddings, int(rope["original_max_position_embeddings"] * rope["factor"]))


def _one_line(error: BaseException) -> str:
    return f"missing {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
