"""What the server answers, for OpenAPI and for tests. The answers themselves are built as plain data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Error(Part):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Part):
    error: Error


class TokensKept(Part):
    """Tokens kept, over the lanes of a sequence."""

    min: int
    mean: float
    max: int


class ShortenedPrompt(Part):
    """Tokens of the prompts before and after compression.prompt, and of the context in them."""

    tokens_before: int
    tokens_after: int
    context_before: int
    context_after: int


class DocumentTokens(Part):
    """Tokens of documents that were compressed before the rest of their prompts was read, and how many of them in an
    earlier request."""

    tokens: int
    reused: int


class Compression(Part):
    """What was kept, measured from pages. Each number is the sum over the request's sequences (prompts times n), of
    which `squeezed` were compressed as `plan.on_pressure` says."""

    plan: dict[str, Any] | None
    sequences: int
    squeezed: int
    tokens_seen: int
    tokens_kept: TokensKept
    bytes_uncompressed: int
    bytes_held: int
    document: DocumentTokens | None = None
    tokens_by_format: dict[str, float] | None = None
    prompt: ShortenedPrompt | None = None


class PromptTokensDetails(Part):
    """Of a prompt with images or videos also the tokens that stand for them, and those of them that the model read."""

    cached_tokens: int
    image_tokens: int | None = None
    image_tokens_kept: int | None = None


class CompletionTokensDetails(Part):
    """Of speculative decoding: guesses that are part of the completion, and others, which are not."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Part):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None
    compression: Compression | None = None


FinishReason = Literal["stop", "length"]


class ChatTokenLogprob(Part):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(ChatTokenLogprob):
    top_logprobs: list[ChatTokenLogprob]


class ChatLogprobs(Part):
    content: list[ChatLogprob]
    refusal: None


class ChatMessage(Part):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Part):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Part):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: str
    usage: Usage


class Delta(Part):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Part):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Part):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | None = None
    compression: Compression | None = None


class CompletionLogprobs(Part):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Part):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(Part):
    """A text completion, and each event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | None = None
    compression: Compression | None = None


class Tokens(Part):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Part):
    prompt: str


class Status(Part):
    status: str


class Version(Part):
    version: str
