"""Text to tokens and back, and chat templates. Torch-free: the server uses it."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from inspect import signature
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from winnow.engine.errors import ModelError, RequestError
from winnow.engine.models.files import directory_eos_ids, gguf_eos_ids, read_json, resolve_model
from winnow.engine.models.gguf_file import GgufFile
from winnow.engine.models.gguf_tokenizer import tokenizer_from_gguf

_BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}
_RESERVED = frozenset(signature(PreTrainedTokenizerFast.apply_chat_template).parameters) | {"messages"}
"""Names that a request's template variables must not take: among them `chat_template` itself."""


def load_tokenizer(path_or_name: str) -> Tokenizer:
    """The tokenizer of a model, named as for `load_model`. Raises ModelError."""
    path = resolve_model(path_or_name, weights=False)
    if path.is_file():
        file = GgufFile(path)
        return Tokenizer(tokenizer_from_gguf(file), gguf_eos_ids(file))
    if not (path / "tokenizer.json").is_file():
        raise ModelError(f"{path}: no tokenizer.json; load and save the tokenizer with transformers to make one")
    try:
        hf = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the library raises no narrower type
        raise ModelError(f"{path}: the tokenizer cannot be loaded: {error}") from error
    if hf.chat_template is None:  # where processors of vision-language models once wrote it
        hf.chat_template = read_json(path / "chat_template.json").get("chat_template")
    return Tokenizer(hf, directory_eos_ids(path))


class Tokenizer:
    """A model's tokenizer. Stateless after it is made: threads may share it."""

    def __init__(self, hf: PreTrainedTokenizerFast, eos_token_ids: tuple[int, ...]):
        """Empty `eos_token_ids` stand for the tokenizer's own."""
        self.hf = hf
        self.vocab_size = len(hf)
        self.eos_token_ids = eos_token_ids or ((hf.eos_token_id,) if hf.eos_token_id is not None else ())
        self._backend = hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        decoder = self._backend.decoder
        self._decoder_kinds = _kinds(json.loads(decoder.__getstate__())) if decoder else frozenset()
        self._special = frozenset(token for token, added in hf.added_tokens_decoder.items() if added.special)

    def has_tokens_of(self, other: Tokenizer) -> bool:
        """Whether the same ids stand for the same tokens."""
        vocabulary: bool = self.hf.get_vocab() == other.hf.get_vocab()
        return vocabulary

    @property
    def chat_template(self) -> str | None:
        """The model's chat template; of several, the default one."""
        template = self.hf.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @cached_property
    def template_takes_text(self) -> bool:
        """Whether the chat template writes a message whose content is a text."""
        return "probe" in self._written("probe")

    @cached_property
    def template_takes_parts(self) -> bool:
        """Whether it writes the parts of a message: texts, and marks for images."""
        written = self._written([{"type": "text", "text": "probe"}])
        return "probe" in written and "'type'" not in written  # not the list as Python shows it

    def _written(self, content: str | list[dict[str, str]]) -> str:
        try:
            return self.apply_chat_template([{"role": "user", "content": content}])
        except RequestError:
            return ""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens in it become their own ids."""
        # The batch call lets other threads run meanwhile (`encode` holds the interpreter) and skips offsets.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_with_bounds(self, text: str, add_special_tokens: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """The same tokens, and the characters that each covers: begin and end.

        Between two tokens nothing is left out: a space belongs to the token after it. Tokens that hold parts of one
        character end with it; special tokens that were added have (-1, -1).
        """
        encoding = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        bounds, before = [], 0
        for (start, end), is_added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
            if is_added:
                bounds.append((-1, -1))
            else:
                bounds.append((before if end > before else start, end))
                before = max(before, end)
        return encoding.ids, bounds

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of tokens; U+FFFD where their bytes are not UTF-8."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Text of a conversation. The template is the model's, never the request's, and runs in jinja's sandbox.

        Args:
            tools: JSON schemas of functions, for templates that know them.
            variables: what else the template may read, e.g. {"enable_thinking": False}.

        Raises:
            RequestError: the template refuses the messages, or there is none.
        """
        if self.chat_template is None:
            raise RequestError("messages", "this model has no chat template; use the completions endpoint")
        variables = variables or {}
        if taken := sorted(_RESERVED & variables.keys()):
            raise RequestError("chat_template_kwargs", f"{taken[0]!r} is not a template variable")
        try:
            text: str = self.hf.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **variables,
            )
        except Exception as error:  # a template is a program: it may fail in any way on messages it did not expect
            raise RequestError("messages", f"the chat template refuses these messages: {error}") from error
        return text

    def stream(self, skip_special_tokens: bool = True, continues: bool = False) -> TextStream:
        """A decoder for tokens that arrive one by one.

        `continues`: they go on with a text, and their first space belongs to it; else it is the tokenizer's own.
        """
        return TextStream(self, skip_special_tokens, continues)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for, which may be a part of a character. Unknown ids have none."""
        text = self._backend.id_to_token(token)
        if text is None:
            return b""
        if "ByteLevel" in self._decoder_kinds:
            codes = [_BYTE_OF.get(char) for char in text]
            return text.encode() if None in codes else bytes(codes)  # type: ignore[arg-type]
        if "ByteFallback" in self._decoder_kinds and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes.fromhex(text[3:5])
        if self._decoder_kinds & {"Metaspace", "Replace"}:
            return text.replace("▁", " ").encode()
        return self._backend.decode([token], skip_special_tokens=False).encode()

    def token_text(self, token: int) -> str:
        """A token as text; U+FFFD for a part of a character."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def is_special(self, token: int) -> bool:
        return token in self._special

    @property
    def strips_first_space(self) -> bool:
        """Whether a text's first space is the tokenizer's own (SentencePiece)."""
        return bool(self._decoder_kinds & {"Strip", "Metaspace"})


class TextStream:
    """Turns tokens into text as they come, holding back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, continues: bool):
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._strips = tokenizer.strips_first_space and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Iterable[int]) -> str:
        """The text that these tokens complete; "" if none."""
        kept = (token for token in tokens if not (self._skips and self._tokenizer.is_special(token)))
        data = b"".join(map(self._tokenizer.token_bytes, kept))
        if self._strips and data:
            data = data.removeprefix(b" ")
            self._strips = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._utf8.decode(b"", final=True)


def _kinds(decoder: dict[str, Any]) -> frozenset[str]:
    """Types of a serialized decoder and of those it is made of."""
    parts = [_kinds(part) for part in decoder.get("decoders", ())]
    return frozenset({decoder["type"]}).union(*parts)
