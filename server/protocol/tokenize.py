"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from winnow.engine.errors import RequestError
from winnow.server.protocol.chat import ChatPrompt, Message
from winnow.server.protocol.common import Body, Token


class TokenizeRequest(Body):
    """A text, or a conversation as its chat template writes it."""

    model: str | None = Field(None, max_length=512)
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(None, description="default: true for a prompt, false for messages")
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field({})
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _either(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("prompt", "give either prompt or messages", "invalid_value")
        if self.messages is not None and self.add_special_tokens:
            message = "add_special_tokens: the chat template writes them itself"
            raise RequestError("add_special_tokens", message, "invalid_value")
        return self

    def chat(self) -> ChatPrompt:
        fields = ("messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
        return ChatPrompt.model_validate({name: getattr(self, name) for name in fields})


class DetokenizeRequest(Body):
    model: str | None = Field(None, max_length=512)
    tokens: list[Token]
