"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from winnow.engine.errors import RequestError
from winnow.server.protocol.common import INT32_MAX, GenerationRequest, Unsupported, at_most, one_or_more
from winnow.server.settings import Settings

DEFAULT_MAX_TOKENS = 16
"""OpenAI's"""
Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """One prompt or many, each a text or a list of token ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_token(value[0])):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of token ids, or a list of either that is not empty")
    for i, prompt in enumerate(value):
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, list) or not all(map(_is_token, prompt)):
            raise ValueError(f"prompt {i} is neither a string nor a list of token ids")
    return value


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value <= INT32_MAX


_TEXT = {"type": "string", "minLength": 1}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": INT32_MAX}, "minItems": 1}
Prompts = Annotated[
    list[Prompt],
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                _TOKENS,
                {"type": "array", "items": _TOKENS, "minItems": 1},
            ]
        }
    ),
]


def _forced(value: Any) -> Prompt:
    if not isinstance(value, str) and not (isinstance(value, list) and all(map(_is_token, value))):
        raise ValueError("must be a string or a list of token ids")
    return value


Forced = Annotated[
    Prompt, PlainValidator(_forced), WithJsonSchema({"anyOf": [{"type": "string"}, _TOKENS | {"minItems": 0}]})
]
Texts = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(one_or_more),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}),
]


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    context: Texts = Field(
        [],
        description="what compression.prompt may shorten, and to whose end the document of compression.kv.scope "
        "reaches: texts of the one prompt, each found in it exactly once",
    )
    logprobs: int | None = Field(None, ge=0, description="likeliest tokens at each position; 0: the chosen one only")
    echo: bool = Field(False, description="the text starts with the prompt, as it was read; not with logprobs")
    best_of: int | None = Field(None, ge=1, description="must equal n")
    forced: Forced | None = Field(
        None,
        description="what the output begins with, whatever the model would say: a text or token ids. It is read after "
        "the prompt's compression was carried out, counts as output, and is reported like it, logprobs included",
    )
    suffix: Annotated[Any, Unsupported("text cannot be inserted before a suffix", "")] = None
    add_special_tokens: bool = Field(True, description="put the model's start token before a text prompt")

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError("best_of", "best_of must equal n", "invalid_value")
        if self.context and (len(self.prompt) > 1 or not isinstance(self.prompt[0], str)):
            raise RequestError("context", "context needs one prompt that is a text", "invalid_value")
        if self.echo and self.logprobs is not None:
            raise RequestError("echo", "echo cannot be combined with logprobs", "invalid_value")
        if self.forced is not None and self.n != 1:
            raise RequestError("n", "n must be 1 with forced", "invalid_value")
        if self.forced is not None and self.echo:
            raise RequestError("echo", "echo cannot be combined with forced", "invalid_value")
        return self

    @property
    def logprobs_asked(self) -> int | None:
        return self.logprobs

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens

    def check_limits(self, limits: Settings) -> None:
        super().check_limits(limits)
        at_most("prompt", len(self.prompt), limits.max_prompts, "prompts")
        at_most("n", self.n * len(self.prompt), limits.max_choices, "choices of all prompts")
        at_most("context", len(self.context), limits.max_contexts, "texts")
        at_most("logprobs", self.logprobs or 0, limits.max_logprobs)

    def check_vocabulary(self, vocab_size: int) -> None:
        super().check_vocabulary(vocab_size)
        for prompt in self.prompt:
            if not isinstance(prompt, str) and prompt and max(prompt) >= vocab_size:
                raise RequestError("prompt", f"prompt: the vocabulary has {vocab_size} tokens", "invalid_value")
        if isinstance(self.forced, list) and self.forced and max(self.forced) >= vocab_size:
            raise RequestError("forced", f"forced: the vocabulary has {vocab_size} tokens", "invalid_value")
