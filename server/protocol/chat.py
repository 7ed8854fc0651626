"""POST /v1/chat/completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from winnow.engine.errors import RequestError
from winnow.server.protocol.common import INT32_MAX, Body, GenerationRequest, Unsupported, at_most
from winnow.server.settings import Settings

NO_TOOLS = "tool calls are not supported"
DETAILS = ("auto", "low", "high")
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


_DETAIL = {
    "enum": [*DETAILS],
    "default": "auto",
    "description": "low: shrunk to fit in 512x512 pixels before the model's own processor sees it, which takes fewer "
    "tokens where these grow with the image; auto and high: as the processor takes it",
}
_URL = {
    "type": "string",
    "description": "data:image/png;base64,… (or jpeg, webp, gif), or http(s) where the server allows the domain",
}
_FRAMES = {
    "type": "string",
    "description": "data:video/jpeg;base64,FRAME,FRAME,… (each frame's base64 by itself), or an animated GIF: "
    "data:image/gif;base64,… or http(s) where the server allows the domain",
}


def _object(kind: str, **fields: dict[str, Any]) -> dict[str, Any]:
    """Schema of a part with a type, of whose fields only `detail` may be left out."""
    properties = ({"type": {"type": "string", "const": kind}} if kind else {}) | fields
    required = [name for name in properties if name != "detail"]
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


IMAGE_PART = _object("image_url", image_url=_object("", url=_URL, detail=_DETAIL))
INPUT_IMAGE_PART = _object("input_image", image_url=_URL, detail=_DETAIL)
VIDEO_PART = _object("video_url", video_url=_object("", url=_FRAMES))
PARTS = {"anyOf": [TEXT_PART, IMAGE_PART, INPUT_IMAGE_PART, VIDEO_PART]}


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str
    is_context: bool = False
    """Whether its sender lets it be shortened"""


@dataclass(frozen=True, slots=True)
class MediaPart:
    """An image or a video, not read yet."""

    kind: Literal["image", "video"]
    url: str
    is_low: bool = False
    """Asked for in low detail"""

    @property
    def field(self) -> str:
        """Where a part has its URL."""
        return f"{self.kind}_url"


def _parts(content: Any) -> tuple[TextPart | MediaPart, ...]:
    """A text, or parts; others are named and refused."""
    if isinstance(content, str):
        return (TextPart(content),)
    if not isinstance(content, list):
        raise ValueError("must be a string or a list of parts")
    return tuple(_part(i, part) for i, part in enumerate(content))


def _part(i: int, part: Any) -> TextPart | MediaPart:
    fields = part if isinstance(part, dict) else {}
    match fields.get("type"):
        case "text":
            return _text_part(i, fields)
        case "image_url" | "input_image" | "video_url":
            return _media_part(i, fields)
        case "input_audio" | "audio_url" | "file" | "input_file":
            raise ValueError(f"part {i} is neither text nor image, and the model reads nothing else")
    raise ValueError(f'part {i} must have the "type" text, image_url or video_url')


def _text_part(i: int, part: dict[str, Any]) -> TextPart:
    is_context = part.get("context")
    is_whole = {"type", "text"} <= set(part) <= {"type", "text", "context"}
    if is_whole and isinstance(part["text"], str) and (is_context is None or isinstance(is_context, bool)):
        return TextPart(part["text"], bool(is_context))
    raise ValueError(f'part {i} must be {{"type": "text", "text": string}}, with "context": true or false if it is one')


def _media_part(i: int, part: dict[str, Any]) -> MediaPart:
    """OpenAI's `image_url` of chats and `input_image` of responses, and vLLM's `video_url`."""
    kind = part["type"]
    is_video = kind == "video_url"
    if kind == "input_image":
        inner = {"url": part.get("image_url")} | {name: part[name] for name in part.keys() - {"type", "image_url"}}
    elif part.keys() == {"type", kind} and isinstance(part[kind], dict):
        inner = part[kind]
    else:
        raise ValueError(f'part {i} must be {{"type": "{kind}", "{kind}": {{"url": string}}}}')
    known = {"url"} if is_video else {"url", "detail"}
    if unknown := sorted(inner.keys() - known):
        raise ValueError(
            f"part {i} ({kind}): of its fields only {' and '.join(sorted(known))} are known, not {unknown[0][:40]!r}"
        )
    detail = inner.get("detail")
    if detail is not None and detail not in DETAILS:
        raise ValueError(f"part {i} ({kind}): detail must be one of {', '.join(DETAILS)}")
    url = inner.get("url")
    if not isinstance(url, str):
        raise ValueError(f"part {i} ({kind}) must have a URL, as a string")
    return MediaPart("video" if is_video else "image", url, detail == "low")


Content = Annotated[
    tuple[TextPart | MediaPart, ...],
    PlainValidator(_parts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": PARTS}]}),
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

    @model_validator(mode="after")
    def _users_show(self) -> Message:
        if self.media and self.role != "user":
            raise ValueError("images and videos stand in messages of the role user")
        return self

    @property
    def texts(self) -> list[TextPart]:
        return [part for part in self.content if isinstance(part, TextPart)]

    @property
    def media(self) -> list[tuple[int, MediaPart]]:
        """Images and videos, each with its place among the parts."""
        return [(i, part) for i, part in enumerate(self.content) if isinstance(part, MediaPart)]

    @property
    def text(self) -> str:
        """The texts, a line each."""
        return "\n".join(part.text for part in self.texts)

    @property
    def has_context(self) -> bool:
        return any(part.is_context for part in self.texts)

    def for_template(self, content: str | list[dict[str, str]]) -> dict[str, Any]:
        """The turn with this text, or with these parts."""
        turn: dict[str, Any] = {"role": self.role, "content": content}
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

    @property
    def media(self) -> list[tuple[str, int, MediaPart]]:
        """Its images and videos in order, each with its JSON path and its message."""
        return [
            (f"messages[{i}].content[{j}].{part.field}", i, part)
            for i, message in enumerate(self.messages)
            for j, part in message.media
        ]

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
