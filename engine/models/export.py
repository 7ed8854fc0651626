"""A model as a Hugging Face directory, for programs that read nothing else."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from winnow.engine.errors import ModelError
from winnow.engine.models.config import config_from_gguf, gguf_to_transformers
from winnow.engine.models.files import resolve_model
from winnow.engine.models.gguf_file import GgufFile
from winnow.engine.models.loader import GgufSource

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def export_directory(path_or_name: str, folder: Path) -> Path:
    """A directory with config.json and float32 safetensors of a model, named as for `load_model`.

    A model that is such a directory is returned as it is; of a GGUF file one is written to `folder`, once, without the
    tokenizer.

    Raises:
        ModelError: the model cannot be read, or scales its rotary frequencies by a tensor, which no config states.
    """
    path = resolve_model(path_or_name)
    if path.is_dir():
        return path
    if (folder / "model.safetensors").is_file():
        return folder
    file = GgufFile(path)
    if "rope_freqs.weight" in file.tensors:
        raise ModelError(f"{path}: rotary frequencies in a tensor cannot be written to a config.json")
    config = config_from_gguf(file)
    source = GgufSource(file, config)
    tensors = {}
    for name, shape in source.shapes.items():
        tensors[name] = torch.empty(shape)
        source.read_into(name, tensors[name])
    folder.mkdir(parents=True, exist_ok=True)
    stated = AutoConfig.for_model(config.architecture, **gguf_to_transformers(file))
    stated.architectures = [_CLASSES[config.architecture]]
    stated.save_pretrained(folder)
    draft = folder / "model.safetensors.tmp"
    save_file(tensors, draft, metadata={"format": "pt"})
    draft.replace(folder / "model.safetensors")
    return folder
