"""Which parts of a prompt are context, and where they lie among its tokens.

In a chat these are the text parts marked {"type": "text", "text": …, "context": true} of any message that is no system
prompt; in a completion the texts of `context`. `compression.prompt` may shorten them; everything else is left as it is,
to the token: a token that is only partly marked is not. For `compression.kv.scope` the document ends with the last of
them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count, pairwise
from typing import TYPE_CHECKING

from winnow.engine.compression.vision.policy import Kind
from winnow.engine.errors import RequestError
from winnow.engine.messages import ContextPart, EngineInfo
from winnow.server.admission import Flight
from winnow.server.pictures import PicturedPrompt
from winnow.server.protocol.chat import ChatPrompt, Message
from winnow.server.templates import chat_text

if TYPE_CHECKING:
    from winnow.engine.models.tokenizer import Tokenizer

HOW_TO_MARK = {
    "messages": 'mark text parts as context: {"type": "text", "text": …, "context": true}',
    "prompt": 'give texts of the prompt in "context"',
}
Span = tuple[int, int]
"""Characters of a text"""
Tokenize = Callable[[], list[int]]
"""Makes one text's tokens; takes its time and is called in a thread"""


@dataclass(frozen=True)
class MarkedPrompt:
    tokens: list[int]
    parts: list[ContextPart]
    question: str
    """What the request asks: the unmarked text of the last user message, or of the prompt"""

    @property
    def document(self) -> int:
        """Tokens up to the last marked one, but for the last of all, which the answer begins from; 0 if none is."""
        ends = (part.first + len(part.ends) for part in self.parts)
        return min(max(ends, default=0), len(self.tokens) - 1)


@dataclass(frozen=True)
class PromptSource:
    """A request's prompt before it is tokenized."""

    tokens: Tokenize
    marked: Callable[[], MarkedPrompt]
    """As slow as `tokens`"""
    is_marked: bool
    pictured: Callable[[EngineInfo, Flight], Awaitable[PicturedPrompt]] | None = None
    """Instead of all that, of a prompt with images or videos"""
    kinds: frozenset[Kind] = frozenset()
    """Which of the two"""


def marked_chat(tokenizer: Tokenizer, chat: ChatPrompt) -> MarkedPrompt:
    """
    Raises
        RequestError: the template refuses the messages, or changes what is marked
    """
    opening, closing = _absent_from("".join(message.text for message in chat.messages))
    # Inside the space around it: templates may strip a message.
    wrapped = [
        "\n".join(_wrapped(part.text, opening, closing) if part.is_context else part.text for part in message.texts)
        for message in chat.messages
    ]
    text, spans = _unwrapped(chat_text(tokenizer, chat, wrapped), opening, closing)
    if text != chat_text(tokenizer, chat, [message.text for message in chat.messages]):
        raise RequestError("messages", "messages: the model's chat template changes text that is marked as context")
    tokens, parts = _located(tokenizer, text, spans, add_special_tokens=False)
    return MarkedPrompt(tokens, parts, _question(chat.messages))


def marked_text(tokenizer: Tokenizer, prompt: str, contexts: list[str], add_special_tokens: bool) -> MarkedPrompt:
    """
    Raises
        RequestError: a context is not in the prompt just once, or overlaps another
    """
    spans = []
    for i, context in enumerate(contexts):
        start = prompt.find(context)
        if start < 0 or prompt.find(context, start + 1) >= 0:
            how = "is not in the prompt" if start < 0 else "is in the prompt more than once"
            raise RequestError("context", f"context: text {i} {how}", "invalid_value")
        spans.append((start, start + len(context)))
    spans.sort()
    if any(last > following for (_, last), (following, _) in pairwise(spans)):
        raise RequestError("context", "context: its texts overlap in the prompt", "invalid_value")
    tokens, parts = _located(tokenizer, prompt, spans, add_special_tokens)
    bounds = [0, *(bound for span in spans for bound in span), len(prompt)]
    rest = [prompt[first:last].strip() for first, last in zip(bounds[::2], bounds[1::2], strict=True)]
    return MarkedPrompt(tokens, parts, "\n".join(filter(None, rest)))


def _absent_from(text: str) -> tuple[str, str]:
    """Two strings of private characters that a text does not hold."""
    number = next(i for i in count() if f"\ue000{i}" not in text)
    return f"\ue000{number}\ue001", f"\ue000{number}\ue002"


def _wrapped(text: str, opening: str, closing: str) -> str:
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    return f"{text[:start]}{opening}{core}{closing}{text[start + len(core) :]}"


def _unwrapped(text: str, opening: str, closing: str) -> tuple[str, list[Span]]:
    """The text without its marks, and what was between them."""
    plain, spans = "", []
    for i, piece in enumerate(text.split(opening)):
        inside, found, outside = piece.partition(closing)
        if bool(found) is (i == 0):
            raise RequestError("messages", "messages: the model's chat template cuts text that is marked as context")
        if found:
            spans.append((len(plain), len(plain) + len(inside)))
        plain += inside + outside
    return plain, spans


def _located(
    tokenizer: Tokenizer, text: str, spans: list[Span], add_special_tokens: bool
) -> tuple[list[int], list[ContextPart]]:
    """Tokens of a text, and the parts made of the tokens that lie in each span."""
    tokens, bounds = tokenizer.encode_with_bounds(text, add_special_tokens)
    parts, at = [], 0
    for start, end in spans:
        # A token that ends with the one before it holds the rest of the same character.
        while at < len(tokens) and (bounds[at][0] < start or (at and bounds[at][1] == bounds[at - 1][1])):
            at += 1
        first = at
        while at < len(tokens) and bounds[at][1] <= end:
            at += 1
        parts.append(ContextPart(text[start:end], first, [bound - start for _, bound in bounds[first:at]]))
    return tokens, [part for part in parts if part.ends]


def _question(messages: list[Message]) -> str:
    for message in reversed(messages):
        if message.role == "user":
            return "\n".join(part.text for part in message.texts if not part.is_context).strip()
    return ""
