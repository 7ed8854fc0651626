"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from winnow.engine.errors import RequestError
from winnow.server.body import body_docs, json_body
from winnow.server.models import Models, models_of
from winnow.server.pictures import pictured_chat
from winnow.server.protocol.common import at_most
from winnow.server.protocol.responses import Text, Tokens
from winnow.server.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from winnow.server.templates import chat_tokens

router = APIRouter()


@router.post("/tokenize", summary="Token ids of a text", openapi_extra=body_docs(TokenizeRequest))
async def tokenize(
    models: Annotated[Models, Depends(models_of)],
    body: Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))],
) -> Tokens:
    chat = None if body.messages is None else body.chat()
    service, _ = models.choose(body.model, with_images=chat is not None and bool(chat.media))
    info = service.engine()
    at_most("messages", len(body.messages or ()), service.settings.max_messages)

    def work() -> list[int]:
        if chat is not None:
            return chat_tokens(service.tokenizer, chat)
        return service.tokenizer.encode(body.prompt or "", body.add_special_tokens is not False)

    with service.admission.board(1) as flight:
        if chat is not None and chat.media:
            tokens = (await pictured_chat(service, chat, info, flight)).tokens
        else:
            tokens = await flight.wait(service.in_thread(work))
    shown: Any = [service.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
    return Tokens(count=len(tokens), max_model_len=info.max_model_len, tokens=tokens, token_strs=shown)


@router.post("/detokenize", summary="Text of token ids", openapi_extra=body_docs(DetokenizeRequest))
async def detokenize(
    models: Annotated[Models, Depends(models_of)],
    body: Annotated[DetokenizeRequest, Depends(json_body(DetokenizeRequest))],
) -> Text:
    service, _ = models.choose(body.model)
    size = service.engine().vocab_size
    if body.tokens and max(body.tokens) >= size:
        raise RequestError("tokens", f"tokens: the vocabulary has {size} tokens", "invalid_value")
    with service.admission.board(1) as flight:
        work = service.in_thread(lambda: service.tokenizer.decode(body.tokens, skip_special_tokens=False))
        text = await flight.wait(work)
    return Text(prompt=text)
