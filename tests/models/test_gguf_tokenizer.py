"""Tokenizers built from GGUF vocabularies, against the same vocabulary in Hugging Face's form."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from winnow.engine.errors import ModelError
from winnow.engine.models.gguf_tokenizer import _PRE_TOKENIZERS
from winnow.engine.models.tokenizer import load_tokenizer

from .checkpoints import add_metadata, finish

CORPUS = [
    "the cat sat on the mat and the dog sat on the log in 2024 and 2025",
    "hello hello there, they're here!  What's that?\n\n  100 1000 10000\n",
    "naïve café über straße 你好世界 你好",
]
TEXT = "Hello  the café's 12345 logs,\n\n  they'LL sit 你好世界🙂 <|end|><think>ok</think>"


def write(path: Path, **meta: Any) -> str:
    writer = gguf.GGUFWriter(path, "llama")
    template = {"tokenizer.chat_template": meta.pop("chat_template")} if "chat_template" in meta else {}
    add_metadata(writer, template | {f"tokenizer.ggml.{key}": value for key, value in meta.items()})
    return str(finish(writer, path))


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REGEXES = {
    "gpt-2": [GPT2],
    "default": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "qwen2": [QWEN2],
}
"""As llama.cpp lists them for each name."""


def trained(regexes: list[str]) -> Tokenizer:
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def as_meta(backend: Tokenizer) -> dict[str, Any]:
    """A trained byte-level vocabulary as GGUF has it, with a control token and two of the user's at its end."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "model": "gpt2",
        "tokens": [*tokens, "<|end|>", "<think>", "</think>", "<|bos｜▁|>"],
        "token_type": [*[1] * len(tokens), 3, 4, 4, 3],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "eos_token_id": len(tokens),
        "bos_token_id": len(tokens) + 3,
    }


@pytest.mark.parametrize("pre", REGEXES)
def test_byte_level(pre: str, tmp_path: Path) -> None:
    backend = trained(REGEXES[pre])
    meta = as_meta(backend)
    tokenizer = load_tokenizer(write(tmp_path / "x.gguf", pre=pre, **meta))
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens(["<think>", "</think>"])
    for text in (TEXT, *CORPUS):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == backend.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT.replace("<|end|>", "")
    assert tokenizer.eos_token_ids == (meta["eos_token_id"],)
    assert tokenizer.hf.convert_ids_to_tokens(range(tokenizer.vocab_size)) == meta["tokens"]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "a  12 b", ["a", "ĠĠ", "1", "2", "Ġb"]),
        ("gpt-2", "a  12 b", ["a", "Ġ", "Ġ12", "Ġb"]),
        ("llama-bpe", "a  1234 I'LL", ["a", "Ġ", "Ġ", "123", "4", "ĠI", "'LL"]),
        ("qwen2", "a  12 b!\n\nc", ["a", "Ġ", "Ġ", "1", "2", "Ġb", "!ĊĊ", "c"]),
    ],
)
def test_what_the_pre_tokenizers_do(pre: str, text: str, pieces: list[str]) -> None:
    assert [piece for piece, _ in _PRE_TOKENIZERS[pre].pre_tokenize_str(text)] == pieces


def test_llama3_words_need_no_merges_and_texts_begin(tmp_path: Path) -> None:
    meta = as_meta(trained(REGEXES["llama-bpe"]))
    whole = len(meta["tokens"])
    meta["tokens"].append("Ġzebra")
    meta["token_type"].append(1)
    path = write(tmp_path / "x.gguf", pre="llama-bpe", **meta)
    assert load_tokenizer(path).encode(" zebra") == [meta["bos_token_id"], whole]
    path = write(tmp_path / "y.gguf", pre="llama-bpe", add_bos_token=False, add_eos_token=True, **meta)
    assert load_tokenizer(path).encode(" zebra") == [whole, meta["eos_token_id"]]
    path = write(tmp_path / "z.gguf", pre="qwen2", **meta)
    assert load_tokenizer(path).encode(" zebra")[0] not in (whole, meta["bos_token_id"])


def test_qwen2_composes_accents(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "x.gguf", pre="qwen2", **as_meta(trained([QWEN2]))))
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("café")


def test_chat_template_and_end_of_turn(tmp_path: Path) -> None:
    meta = as_meta(trained([GPT2]))
    meta["tokens"].append("<|eot_id|>")
    meta["token_type"].append(3)
    template = "{{ bos_token }}{{ messages[0].content }}<|eot_id|>"
    tokenizer = load_tokenizer(write(tmp_path / "x.gguf", pre="gpt-2", chat_template=template, **meta))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]) == "<|bos｜▁|>Hi<|eot_id|>"
    assert tokenizer.eos_token_ids == (meta["eos_token_id"], len(meta["tokens"]) - 1)
    assert tokenizer.encode("<|bos｜▁|>", add_special_tokens=False) == [meta["bos_token_id"]]


# ---- SentencePiece ----


def sentencepiece_meta() -> dict[str, Any]:
    """Random pieces over a few letters, with the scores of a trained vocabulary: the earlier, the better."""
    rng = random.Random(0)
    letters = "▁abcdeé"
    pieces = list(letters)
    while len(pieces) < 120:
        piece = rng.choice(pieces) + rng.choice(pieces)
        if piece not in pieces and len(piece) < 9:
            pieces.append(piece)
    learned = pieces[len(letters) :]
    control = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    ordered = [*learned, *letters]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [*control, *byte_tokens, *ordered, "<tool>"],
        "scores": [0.0] * 259 + [-float(rank) for rank in range(len(ordered))] + [0.0],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(ordered), 4],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def sentencepiece(text: str, meta: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE, word for word: merge the neighbours with the best score, the leftmost among equals."""
    ids = {piece: token for token, piece in enumerate(meta["tokens"])}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(left + right, at) for at, (left, right) in enumerate(pairwise(parts))]
        found = [(-meta["scores"][ids[pair]], at) for pair, at in pairs if pair in ids]
        if not found:
            break
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    out = []
    for part in parts:
        out += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return out


def test_sentencepiece(tmp_path: Path) -> None:
    meta = sentencepiece_meta()
    tokenizer = load_tokenizer(write(tmp_path / "x.gguf", **meta))
    rng = random.Random(1)
    texts = ["".join(rng.choices(" abcdeéxyz你🙂", [3, 5, 5, 5, 5, 5, 2, 1, 1, 1, 1, 1], k=40)) for _ in range(50)]
    for text in ["a", " a", "  ", "ab  cd ", *texts]:
        ids = tokenizer.encode(text)
        assert ids == [1, *sentencepiece(text, meta)], text
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        assert "".join(stream.push([token]) for token in ids) + stream.finish() == text
    assert tokenizer.encode("<tool></s>", add_special_tokens=False) == [len(meta["tokens"]) - 1, 2]


def test_sentencepiece_without_a_prefix_space(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", add_space_prefix=False, add_bos_token=False, **sentencepiece_meta())
    tokenizer = load_tokenizer(path)
    assert tokenizer.token_text(tokenizer.encode("x")[0]) == "x"
    for text in (" ab", "ab"):
        stream = tokenizer.stream()
        assert stream.push(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "vocabulary 'bert' is not supported"),
        ({"model": "gpt2", "pre": "tekken"}, "pre-tokenizer 'tekken' is not supported; supported: default, gpt-2"),
        ({"model": "gpt2", "merges": ["no such"]}, "do not fit together"),
        ({"tokens": None}, "no vocabulary"),
        ({"scores": None}, "needs scores"),
    ],
)
def test_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    meta = {key: value for key, value in (sentencepiece_meta() | change).items() if value is not None}
    with pytest.raises(ModelError, match=message):
        load_tokenizer(write(tmp_path / "x.gguf", **meta))
