"""Building a tokenizer from the vocabulary of a GGUF file. Torch-free.

transformers has such a conversion too. It is not used because it imports torch, takes seconds, and does not split
text as every vocabulary wants it: "smollm" makes each digit a token of its own, which changes how the spaces
before a number are cut.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from winnow.engine.errors import ModelError
from winnow.engine.models.gguf_file import GgufFile

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_from_gguf(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file describes, chat template included."""
    meta = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    kind = meta.get("model")
    if "tokens" not in meta:
        raise ModelError(f"{file.path}: the file has no vocabulary")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"{file.path}: vocabulary {kind!r} is not supported; supported: 'gpt2', 'llama'")
    if kind == "gpt2":
        backend, adds_bos = _byte_level(meta, file), meta.get("pre") in _LLAMA3_NAMES
    else:
        backend, adds_bos = _sentencepiece(meta, file), True
    _add_whole_tokens(backend, meta)
    special = {
        name: meta["tokens"][meta[key]]
        for name, key in _SPECIAL.items()
        if key in meta and 0 <= meta[key] < len(meta["tokens"])
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        add_bos_token=meta.get("add_bos_token", adds_bos) and "bos_token" in special,
        add_eos_token=meta.get("add_eos_token", False) and "eos_token" in special,
        clean_up_tokenization_spaces=False,
        **special,
    )


# ---- byte-level BPE: the vocabularies of GPT-2, Llama 3, Qwen and SmolLM ----

_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])


def _split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), behavior="isolated"), _BYTES])


_PRE_TOKENIZERS = {
    "smollm": _DIGITS,
    "gpt-2": _GPT2,
    "default": _GPT2,
    "qwen2": _split(_QWEN2),
    **dict.fromkeys(_LLAMA3_NAMES, _split(_LLAMA3)),
}
"""By `tokenizer.ggml.pre`, llama.cpp's names."""


def _byte_level(meta: dict[str, Any], file: GgufFile) -> Tokenizer:
    pre = meta.get("pre", "default")
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise ModelError(f"{file.path}: pre-tokenizer {pre!r} is not supported; supported: {known}")
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("merges", ())]
    vocab = {text: token for token, text in enumerate(meta["tokens"])}
    try:
        # Llama 3's words that are tokens are not built by merges.
        model = BPE(vocab=vocab, merges=merges, ignore_merges=pre in _LLAMA3_NAMES)
    except Exception as error:  # the library raises no narrower type
        raise ModelError(f"{file.path}: the vocabulary and its merges do not fit together: {error}") from error
    backend = Tokenizer(model)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    return backend


# ---- SentencePiece BPE: the vocabularies of Llama 2 and Mistral ----


def _sentencepiece(meta: dict[str, Any], file: GgufFile) -> Tokenizer:
    tokens, scores, types = meta["tokens"], meta.get("scores"), meta.get("token_type")
    if scores is None or types is None:
        raise ModelError(f"{file.path}: a 'llama' vocabulary needs scores and token types")
    vocab = {text: token for token, text in enumerate(tokens)}
    unknown = next((text for text, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    model = BPE(
        vocab=vocab, merges=_merges(tokens, scores, types), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if meta.get("add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        steps.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours whose union has the best score: every way to cut a token, best first."""
    rank = {
        text: (-score, token)
        for token, (text, score, kind) in enumerate(zip(tokens, scores, types, strict=True))
        if kind == _NORMAL
    }
    merges = []
    for text in sorted(rank, key=rank.__getitem__):
        cuts = ((text[:at], text[at:]) for at in range(1, len(text)))
        merges += [(left, right) for left, right in cuts if left in rank and right in rank]
    return merges


def _add_whole_tokens(backend: Tokenizer, meta: dict[str, Any]) -> None:
    """Control tokens and the user's own are matched whole in the text, before anything splits it."""
    kinds = zip(meta["tokens"], meta.get("token_type", ()), strict=False)
    whole = [(text, kind) for text, kind in kinds if kind in (_CONTROL, _USER_DEFINED) and text]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text, kind in whole if kind == _CONTROL])
    backend.add_tokens([AddedToken(text, normalized=False) for text, kind in whole if kind == _USER_DEFINED])
