"""Tiny checkpoints of the models that read text, with random weights, in the layout of published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForTokenClassification,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "initializer_range": 0.5,
    "pad_token_id": 1,
}
LONGEST = 64
"""Tokens that either classifier reads at a time, the two around a text included"""


def _word_piece(path: Path) -> int:
    vocab = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocab += ["the", "light", "##house", "harbour", "code"]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    _save(tokenizer, path, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]")
    return len(vocab)


def _unigram(path: Path) -> int:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, *LETTERS.upper(), "▁the", "▁light", "house", "▁code"]
    scores = [(piece, 0.0 if i < 4 else -1.0 if len(piece) > 2 else -4.0) for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    _save(tokenizer, path, cls_token="<s>", sep_token="</s>", unk_token="<unk>", pad_token="<pad>")
    return len(pieces)


def _save(tokenizer: Tokenizer, path: Path, **special: str) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)


def random_sentence_encoder(path: Path) -> Path:
    """As sentence-transformers saves one: all-MiniLM-L6-v2 is such a directory."""
    path.mkdir(exist_ok=True)
    size = _word_piece(path)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=size, **SIZES)).save_pretrained(path)
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    (path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return path


def random_classifier(family: str, path: Path) -> Path:
    path.mkdir(exist_ok=True)
    torch.manual_seed(1)
    if family == "bert":
        sizes = SIZES | {"max_position_embeddings": LONGEST}
        model: Any = BertForTokenClassification(BertConfig(vocab_size=_word_piece(path), **sizes, num_labels=2))
    else:
        model = XLMRobertaForTokenClassification(XLMRobertaConfig(vocab_size=_unigram(path), **SIZES, num_labels=2))
    model.save_pretrained(path)
    return path
