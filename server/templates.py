"""Conversations as tokens, by the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from winnow.server.protocol.chat import ChatPrompt

if TYPE_CHECKING:
    from winnow.engine.models.tokenizer import Tokenizer


def chat_tokens(tokenizer: Tokenizer, chat: ChatPrompt) -> list[int]:
    """The prompt. The template writes the special tokens that belong there, so none are added.

    Raises
        RequestError: the template refuses the messages
    """
    text = chat_text(tokenizer, chat, [message.text for message in chat.messages])
    return tokenizer.encode(text, add_special_tokens=False)


def chat_text(tokenizer: Tokenizer, chat: ChatPrompt, contents: Sequence[str | list[dict[str, str]]]) -> str:
    """The conversation as the template writes it, with these texts or parts in its messages.

    A developer's message stands for the system's where the template does not know developers (OpenAI's newer name).
    Some templates of models that see write parts only.
    """
    if not tokenizer.template_takes_text and tokenizer.template_takes_parts:
        contents = [[text_part(content)] if isinstance(content, str) else content for content in contents]
    messages = [message.for_template(content) for message, content in zip(chat.messages, contents, strict=True)]
    if "developer" not in (tokenizer.chat_template or ""):
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"
    return tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        variables=chat.chat_template_kwargs,
    )


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
