"""Prompts with images: a chat as tokens, with placeholders where the model reads images and videos.

The chat template writes the model's mark for each of them, the model's processor says what stands there instead, and
the whole is tokenized at once. Text of the caller cannot make a mark or a placeholder: it is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from winnow.engine.errors import RequestError
from winnow.engine.messages import Array, EngineInfo, Picture
from winnow.engine.wire import MAX_FRAME
from winnow.server.admission import Flight
from winnow.server.images.bad import BadImage
from winnow.server.images.reader import Processed
from winnow.server.protocol.chat import ChatPrompt, MediaPart, Message
from winnow.server.service import Service
from winnow.server.templates import chat_text, text_part

if TYPE_CHECKING:
    from winnow.engine.models.tokenizer import Tokenizer

MAX_INPUT_BYTES = MAX_FRAME // 2
"""What the images of a request may have as the model takes them: it goes to the engine in one message"""


@dataclass(frozen=True)
class PicturedPrompt:
    tokens: list[int]
    pictures: list[Picture]


@dataclass(frozen=True)
class Seen:
    """An image or a video of a chat, read."""

    kind: str
    message: int
    """Whose it is"""
    inputs: dict[str, Array]
    text: str
    """What stands for it in the prompt"""

    @property
    def input_bytes(self) -> int:
        return sum(len(array.data) for array in self.inputs.values())

    @property
    def key(self) -> bytes:
        """Of what the tower reads, which the processor's settings have made what it is."""
        digest = blake2b(self.kind.encode(), digest_size=16)
        for name, array in sorted(self.inputs.items()):
            digest.update(repr((name, array.dtype, array.shape)).encode())
            digest.update(array.data)
        return digest.digest()


async def pictured_chat(service: Service, chat: ChatPrompt, info: EngineInfo, flight: Flight) -> PicturedPrompt:
    """
    Raises
        RequestError: an image cannot be read, or the model does not see it
        Overloaded
    """
    media, most = chat.media, service.settings.max_images
    if len(media) > most:
        message = f"messages: {len(media)} images and videos, and this server takes at most {most}"
        raise RequestError("messages", message, "limit_exceeded")
    for path, _, part in media:
        if part.kind not in info.sees or service.images is None:
            raise RequestError(path, f"{path}: this model reads no {part.kind}s", "unsupported_value")
    assert service.images is not None
    marks = service.images.processor.marks
    is_alone = sum(part.kind == "image" for *_, part in media) == 1
    flight.hold(sum(len(part.url) for *_, part in media))
    seen: list[Seen] = []
    for path, message_index, part in media:
        try:
            processed = await flight.wait(service.images.read(part, is_alone))
        except BadImage as error:
            raise RequestError(path, f"{path}: {error}", error.code) from error
        seen.append(seen_as(part, message_index, processed))
        flight.hold(seen[-1].input_bytes)
        if sum(one.input_bytes for one in seen) > MAX_INPUT_BYTES:
            message = f"{path}: with this one, the images are more than the model can be given at once"
            raise RequestError(path, message, "image_too_large")
    return await flight.wait(service.in_thread(lambda: assemble(service.tokenizer, chat, marks, info.sees, seen)))


def seen_as(part: MediaPart, message: int, processed: Processed) -> Seen:
    """What a model's processor has made of a message's part."""
    return Seen(part.kind, message, {name: _array(value) for name, value in processed.inputs.items()}, processed.text)


def _array(value: np.ndarray) -> Array:
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return Array(value.dtype.name, list(value.shape), little.tobytes())


def check_unmarked(tokens: Sequence[int], sees: Mapping[str, int], param: str) -> None:
    """That a prompt without images holds no placeholder.

    Raises
        RequestError
    """
    if not set(sees.values()).isdisjoint(tokens):
        message = f"{param}: the prompt holds a token that stands for an image; images are sent as parts of a chat"
        raise RequestError(param, message, "invalid_value")


def assemble(
    tokenizer: Tokenizer, chat: ChatPrompt, marks: Mapping[str, str], sees: Mapping[str, int], seen: Sequence[Seen]
) -> PicturedPrompt:
    """The prompt of a chat whose images and videos are `seen`, in its order.

    Args
        marks: what the template writes for a kind
        sees: the token that a kind's placeholders are
    Raises
        RequestError: the template refuses the messages, or text in them would be read as an image
    """
    reserved = {*marks.values(), *(tokenizer.token_text(token) for token in sees.values())}
    for i, message in enumerate(chat.messages):
        if found := next((word for word in reserved if word in message.text), None):
            path = f"messages[{i}].content"
            raise RequestError(path, f"{path}: the model reads {found!r} as an image; leave it out", "invalid_value")
    written = chat_text(tokenizer, chat, [_content(tokenizer, message, marks) for message in chat.messages])
    places = _places(written, marks, seen)
    text, spans = _expanded(written, places, marks)
    tokens, bounds = tokenizer.encode_with_bounds(text, add_special_tokens=False)
    ids, ends = np.asarray(tokens), np.asarray([end for _, end in bounds])
    placeholders = 0
    pictures = []
    for (_, one), (start, end) in zip(places, spans, strict=True):
        where = np.flatnonzero((ids == sees[one.kind]) & (ends > start) & (ends <= end))
        placeholders += len(where)
        if not len(where):
            raise _unwritten()
        turn = _turn_end(tokenizer, chat, marks, written, one.message)
        shift = sum(len(other.text) - len(marks[other.kind]) for at, other in places if at < turn)
        behind = int(where[-1]) + 1
        pictures.append(
            Picture(
                key=one.key,
                first=int(where[0]),
                span=behind - int(where[0]),
                inputs=one.inputs,
                text=tokenizer.encode(chat.messages[one.message].text, add_special_tokens=False),
                turn_end=max(behind, int(np.searchsorted(ends, turn + shift, side="right"))),
                kind="video" if one.kind == "video" else "image",
            )
        )
    if placeholders != int(np.isin(ids, list(sees.values())).sum()):
        raise _unwritten()
    return PicturedPrompt(tokens, pictures)


def _content(tokenizer: Tokenizer, message: Message, marks: Mapping[str, str]) -> str | list[dict[str, str]]:
    if not message.media:
        return message.text
    if tokenizer.template_takes_parts:
        return [{"type": p.kind} if isinstance(p, MediaPart) else text_part(p.text) for p in message.content]
    return "\n".join(marks[part.kind] if isinstance(part, MediaPart) else part.text for part in message.content)


def _places(written: str, marks: Mapping[str, str], seen: Sequence[Seen]) -> list[tuple[int, Seen]]:
    """Where each mark stands in the template's text, and what for: those of a kind come in the chat's order."""
    waiting: dict[str, deque[Seen]] = defaultdict(deque)
    for one in seen:
        waiting[marks[one.kind]].append(one)
    either = "|".join(re.escape(mark) for mark in sorted(set(marks.values()), key=len, reverse=True))
    places = []
    for match in re.finditer(either, written):
        if not waiting[match[0]]:
            raise _unwritten()
        places.append((match.start(), waiting[match[0]].popleft()))
    if any(waiting.values()):
        raise _unwritten()
    return places


def _expanded(
    written: str, places: Sequence[tuple[int, Seen]], marks: Mapping[str, str]
) -> tuple[str, list[tuple[int, int]]]:
    """The text with what stands for each image, and the characters of it."""
    text, spans, at = "", [], 0
    for start, one in places:
        text += written[at:start]
        spans.append((len(text), len(text) + len(one.text)))
        text += one.text
        at = start + len(marks[one.kind])
    return text + written[at:], spans


def _turn_end(tokenizer: Tokenizer, chat: ChatPrompt, marks: Mapping[str, str], written: str, message: int) -> int:
    """How far the template's text is the same whatever follows a message: to the end of its turn."""
    past = chat.messages[: message + 1]
    cut = {"messages": past, "add_generation_prompt": False, "continue_final_message": False}
    alone = chat_text(tokenizer, chat.model_copy(update=cut), [_content(tokenizer, turn, marks) for turn in past])
    same = min(len(written), len(alone))
    return next((i for i in range(same) if written[i] != alone[i]), same)


def _unwritten() -> RequestError:
    message = "messages: the model's chat template does not write one mark for each image"
    return RequestError("messages", message, "invalid_value")
