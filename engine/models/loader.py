"""Loading weights from safetensors or GGUF files, one layer at a time.

Peak memory is the packed weights and one fused tensor, on the backend's device: files are mapped, not read, and every
part is brought to its place in a fused matrix of float32, or of the type of 16 bits that it becomes, which is then
packed.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from winnow.engine.errors import ModelError
from winnow.engine.models.config import ModelConfig, config_from_gguf, read_config
from winnow.engine.models.decoder import Block, Decoder
from winnow.engine.models.files import read_json, resolve_model
from winnow.engine.models.gguf_file import GgufFile
from winnow.engine.models.shard import Shard, sharded_config
from winnow.engine.models.vision.names import Part, vision_type
from winnow.engine.ranks import ALONE, Ranks
from winnow.kernels.dispatch import Backend, Weight, WeightKind

__all__ = ["build_model", "load_model", "resolve_model"]

log = logging.getLogger(__name__)

_NARROW = {"bf16": torch.bfloat16, "f16": torch.float16}
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens", "model.norm.weight", "lm_head"


class Source(Protocol):
    """A model's tensors under their Hugging Face names."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read_into(self, name: str, out: Tensor) -> None:
        """Writes a tensor to `out`, which is contiguous, of its shape, of any float type and on any device."""


class Matrix(NamedTuple):
    """Matrices that become one, stacked by rows."""

    parts: tuple[tuple[str, int], ...]
    """(name without ".weight", rows)"""
    cols: int
    has_bias: bool

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.parts)


def load_model(path_or_name: str, ops: Backend, weights: WeightKind, ranks: Ranks = ALONE) -> Decoder:
    """Loads a model for a backend.

    Args:
        path_or_name: a directory with a config.json and safetensors, a .gguf file, a name on the Hugging Face hub,
            or "default".
        weights: how matrices are held; "int8" holds for the embedding and the LM head too.
        ranks: who shares the model; only this process' part of it is loaded.

    Raises:
        ModelError: files missing or damaged, or a model that the decoder cannot run; names the file and the tensor.
    """
    path = resolve_model(path_or_name)
    began = time.monotonic()
    source: Source
    if path.is_dir():
        config = read_config(path)
        source = SafetensorsSource(path)
        if vision_type(path):
            source = Part(source, is_text=True)
    else:
        file = GgufFile(path)
        config = config_from_gguf(file)
        source = GgufSource(file, config)
    _check(config, source)
    log.info("loading %s: %s, %d layers, weights in %s", path, config.architecture, config.layers, weights)
    if ranks.size > 1:
        config, source = sharded_config(config, ranks), Shard(source, ranks)
    decoder = build_model(config, source, ops, weights, ranks)
    log.info("loaded %s: %.2f GiB in %.1f s", path, decoder.nbytes / 2**30, time.monotonic() - began)
    return decoder


def build_model(config: ModelConfig, source: Source, ops: Backend, kind: WeightKind, ranks: Ranks = ALONE) -> Decoder:
    """A model of a source's tensors, which must be those that the config asks for."""
    tokens = -(-config.vocab_size // ranks.size)
    vocabulary = Matrix(((_EMBEDDING, tokens),), config.hidden_size, False)
    specs = [*_matrices(config, "").values(), vocabulary]
    device, dtype = ops.device(), _NARROW.get(kind, torch.float32)
    # One buffer for every matrix: buffers of their own, between packed ones, leave the heap full of holes.
    buffer = torch.empty(max(spec.rows * spec.cols for spec in specs), dtype=dtype, device=device)

    def matrix(spec: Matrix) -> Weight:
        weight = buffer[: spec.rows * spec.cols].view(spec.rows, spec.cols)
        bias = torch.empty(spec.rows, device=device) if spec.has_bias else None
        start = 0
        for name, size in spec.parts:
            source.read_into(f"{name}.weight", weight[start : start + size])
            if bias is not None:
                source.read_into(f"{name}.bias", bias[start : start + size])
            start += size
        return ops.pack(weight, kind, bias)

    def vector(name: str, size: int) -> Tensor:
        out = torch.empty(size, device=device)
        source.read_into(name, out)
        return out

    blocks = []
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}"
        matrices = _matrices(config, prefix)
        heads = [f"{prefix}.self_attn.{name}_norm.weight" for name in "qk"] if config.qk_norm else []
        q_norm, k_norm = [vector(name, config.head_dim) for name in heads] or (None, None)
        blocks.append(
            Block(
                attention_norm=vector(f"{prefix}.input_layernorm.weight", config.hidden_size),
                qkv=matrix(matrices["qkv"]),
                q_norm=q_norm,
                k_norm=k_norm,
                out=matrix(matrices["out"]),
                mlp_norm=vector(f"{prefix}.post_attention_layernorm.weight", config.hidden_size),
                gate_up=matrix(matrices["gate_up"]),
                down=matrix(matrices["down"]),
                window=config.windows[layer],
            )
        )
        if (layer + 1) % max(1, config.layers // 4) == 0:
            log.info("loaded %d of %d layers", layer + 1, config.layers)
    embedding = matrix(vocabulary)
    head = embedding if config.tied_embeddings else matrix(vocabulary._replace(parts=((_HEAD, tokens),)))
    return Decoder(config, ops, embedding, blocks, vector(_NORM, config.hidden_size), head, ranks)


def _matrices(config: ModelConfig, prefix: str) -> dict[str, Matrix]:
    """A layer's matrices, as `Block` holds them."""
    hidden, wide = config.hidden_size, config.intermediate_size
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    qkv = ((f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv))
    gate_up = ((f"{mlp}.gate_proj", wide), (f"{mlp}.up_proj", wide))
    return {
        "qkv": Matrix(qkv, hidden, config.qkv_bias),
        "out": Matrix(((f"{attention}.o_proj", hidden),), q, config.out_bias),
        "gate_up": Matrix(gate_up, hidden, config.mlp_bias),
        "down": Matrix(((f"{mlp}.down_proj", hidden),), wide, config.mlp_bias),
    }


def _expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the decoder needs."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {f"{_EMBEDDING}.weight": table, _NORM: (config.hidden_size,)}
    if not config.tied_embeddings:
        shapes[f"{_HEAD}.weight"] = table
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (config.hidden_size,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (config.hidden_size,)
        if config.qk_norm:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (config.head_dim,)
        for spec in _matrices(config, prefix).values():
            for name, rows in spec.parts:
                shapes[f"{name}.weight"] = (rows, spec.cols)
                if spec.has_bias:
                    shapes[f"{name}.bias"] = (rows,)
    return shapes


def _check(config: ModelConfig, source: Source) -> None:
    """Compares the tensors there are with those the config asks for, before any is read."""
    expected = _expected(config)
    for name, shape in expected.items():
        if name not in source.shapes:
            raise ModelError(f"{source.path}: tensor {name} is missing")
        if source.shapes[name] != shape:
            found = list(source.shapes[name])
            raise ModelError(f"{source.path}: tensor {name} has shape {found}; the config asks for {list(shape)}")
    ignored = {f"{_HEAD}.weight"} if config.tied_embeddings else set()
    for name in source.shapes:
        # Old checkpoints store the rope frequencies, which the config determines.
        if name not in expected and name not in ignored and not name.endswith("rotary_emb.inv_freq"):
            raise ModelError(f"{source.path}: unexpected tensor {name}; the model has parts that the config does not")


class SafetensorsSource:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` lists."""

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, safe_open] = {}
        self._paths: dict[str, Path] = {}
        index = read_json(path / "model.safetensors.index.json").get("weight_map", {})
        for shard in sorted(set(index.values())) or ["model.safetensors"]:
            self._open(path / shard)
        for name, shard in index.items():
            if name not in self.shapes:
                raise ModelError(f"{path}: tensor {name} is not in {shard}, where the index says it is")

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise ModelError(f"{path}: missing; weights must be in safetensors files")
        try:
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 - not a dict
                self.shapes[name] = tuple(file.get_slice(name).get_shape())
                self._files[name] = file
                self._paths[name] = path
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: damaged or truncated: {error}") from error

    def read_into(self, name: str, out: Tensor) -> None:
        try:
            tensor = self._files[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self._paths[name]}: tensor {name} cannot be read: {error}") from error
        if not tensor.is_floating_point():
            raise ModelError(f"{self._paths[name]}: tensor {name} holds {tensor.dtype}, which is not a float type")
        out.copy_(tensor.to(out.device))  # widened or narrowed there


_GGUF_NAMES = {
    "token_embd.weight": f"{_EMBEDDING}.weight",
    "output_norm.weight": _NORM,
    "output.weight": "lm_head.weight",
}
_GGUF_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GgufSource:
    """A GGUF file's tensors, dequantized; rows of q and k in Hugging Face's order."""

    def __init__(self, file: GgufFile, config: ModelConfig):
        self.path = file.path
        self._file = file
        self._config = config
        self._names = {_hugging_face_name(name): name for name in file.tensors if name != "rope_freqs.weight"}
        self.shapes = {name: file.tensors[stored].shape for name, stored in self._names.items()}

    def read_into(self, name: str, out: Tensor) -> None:
        is_here = out.dtype == torch.float32 and out.device.type == "cpu"
        here = out if is_here else torch.empty(out.shape)
        self._file.read_into(self._names[name], here.numpy())
        if self._file.architecture == "llama" and re.search(r"\.[qk]_proj\.", name):
            # Files of this architecture interleave the halves that rope rotates: within a head, rows 0 and D/2
            # of the original are neighbours.
            paired = here.view(-1, self._config.head_dim // 2, 2, *here.shape[1:])
            here.copy_(paired.transpose(1, 2).reshape(here.shape))
        if not is_here:
            out.copy_(here.to(out.dtype))


def _hugging_face_name(name: str) -> str:
    """A tensor that no supported model has keeps its name, and is reported by it."""
    layer = _GGUF_LAYER.fullmatch(name)
    if layer and layer[2] in _GGUF_PARTS:
        return f"model.layers.{layer[1]}.{_GGUF_PARTS[layer[2]]}.{layer[3]}"
    return _GGUF_NAMES.get(name, name)
