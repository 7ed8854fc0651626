"""POST /v1/chat/completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from winnow.engine.errors import RequestError
from winnow.server.protocol.common import INT32_MAX, Body, GenerationRequest, Unsupported, at_most
from winnow.server.settings import Settings

NO_TOOLS = "tool calls are not supported"
TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "additionalProperties": False,
    "properties": {
        "type": {"type": "string", "const": "text"},
        "text": {"type": "string"},
        "context": {
            "type": "boolean",
            "description": "whether compression.prompt may shorten this part, and the document of compression.kv.scope "
            "reaches to its end; not in system messages",
        },
    },
}


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str
    is_context: bool = False
    """Whether its sender lets it be shortened"""


def _parts(content: Any) -> tuple[TextPart, ...]:
    """A text, or text parts; other parts are named and refused."""
    if isinstance(content, str):
        return (TextPart(content),)
    if not isinstance(content, list):
        raise ValueError("must be a string or a list of text parts")
    return tuple(_text_part(i, part) for i, part in enumerate(content))


def _text_part(i: int, part: Any) -> TextPart:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and {"type", "text"} <= set(part) <= {"type", "text", "context"}:
        is_context = part.get("context")
        if isinstance(part["text"], str) and (is_context is None or isinstance(is_context, bool)):
            return TextPart(part["text"], bool(is_context))
    if kind in ("image_url", "image", "input_image"):
        raise ValueError(f"part {i} is an image, and the loaded model reads no images")
    if kind in ("input_audio", "audio_url", "video_url", "file"):
        raise ValueError(f"part {i} is not text, and the loaded model reads nothing else")
    raise ValueError(f'part {i} must be {{"type": "text", "text": string}}, with "context": true or false if it is one')


Content = Annotated[
    tuple[TextPart, ...],
    PlainValidator(_parts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": TEXT_PART}]}),
]


class Message(Body):
    """One turn. What a client gets as an answer can be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = Field(None, max_length=64)
    tool_call_id: str | None = Field(None, max_length=256)

    annotations: Any = None
    tool_calls: Annotated[Any, Unsupported(NO_TOOLS, [])] = None
    function_call: Annotated[Any, Unsupported(NO_TOOLS)] = None
    audio: Annotated[Any, Unsupported("the loaded model has no audio")] = None
    refusal: Annotated[Any, Unsupported("refusals are not part of a prompt", "")] = None
    reasoning_content: Annotated[Any, Unsupported("reasoning is not part of a prompt", "")] = None

    @model_validator(mode="after")
    def _system_stays(self) -> Message:
        if self.role in ("system", "developer") and self.has_context:
            raise ValueError("a system prompt is never shortened: mark context in other messages")
        return self

    @property
    def parts(self) -> tuple[TextPart, ...]:
        return self.content

    @property
    def text(self) -> str:
        """The parts, a line each."""
        return "\n".join(part.text for part in self.parts)

    @property
    def has_context(self) -> bool:
        return any(part.is_context for part in self.parts)

    def for_template(self, content: str) -> dict[str, str]:
        """The turn with this text."""
        turn: dict[str, str] = {"role": self.role, "content": content}
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn


class ChatPrompt(Body):
    """A conversation, and how the model's template writes it."""

    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool = Field(True, description="open the assistant's turn at the end of the prompt")
    continue_final_message: bool = Field(False, description="leave the last message open, to be continued")
    chat_template_kwargs: dict[str, Any] = Field({}, description="variables of the model's chat template")

    @model_validator(mode="after")
    def _one_end(self) -> ChatPrompt:
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message needs add_generation_prompt: false"
            raise RequestError("continue_final_message", message, "invalid_value")
        return self


class ChatRequest(ChatPrompt, GenerationRequest):
    max_completion_tokens: int | None = Field(
        None, ge=1, le=INT32_MAX, description="replaces max_tokens; default: what the context leaves"
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, description="likeliest tokens at each position; needs logprobs: true")

    tools: Annotated[Any, Unsupported(NO_TOOLS, [])] = None
    tool_choice: Annotated[Any, Unsupported(NO_TOOLS, "none", "auto")] = None
    functions: Annotated[Any, Unsupported(NO_TOOLS, [])] = None
    function_call: Annotated[Any, Unsupported(NO_TOOLS, "none", "auto")] = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[Any, Unsupported('only {"type": "text"} is supported', {"type": "text"})] = None
    modalities: Annotated[Any, Unsupported('only ["text"] is supported', ["text"])] = None
    audio: Annotated[Any, Unsupported("the loaded model has no audio")] = None
    reasoning_effort: Annotated[Any, Unsupported("the loaded model has no such control", "none")] = None
    verbosity: Annotated[Any, Unsupported("the loaded model has no such control")] = None
    web_search_options: Annotated[Any, Unsupported("there is no web search")] = None
    prediction: Any = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise RequestError(
                "max_tokens", "max_tokens and max_completion_tokens contradict each other", "invalid_value"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs", "top_logprobs needs logprobs: true", "invalid_value")
        return self

    @property
    def logprobs_asked(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check_limits(self, limits: Settings) -> None:
        super().check_limits(limits)
        at_most("messages", len(self.messages), limits.max_messages)
        at_most("n", self.n, limits.max_choices)
        at_most("top_logprobs", self.top_logprobs or 0, limits.max_logprobs)
