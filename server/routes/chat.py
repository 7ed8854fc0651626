"""POST /v1/chat/completions."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from winnow.server.answers import ChatAnswer
from winnow.server.body import body_docs, json_body
from winnow.server.generation import Generation
from winnow.server.marks import PromptSource, marked_chat
from winnow.server.models import Models, models_of
from winnow.server.pictures import pictured_chat
from winnow.server.protocol.chat import ChatRequest
from winnow.server.protocol.responses import ChatCompletion
from winnow.server.respond import respond
from winnow.server.templates import chat_tokens

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    openapi_extra=body_docs(ChatRequest),
    responses={200: {"model": ChatCompletion}},
)
async def chat_completions(
    request: Request,
    models: Annotated[Models, Depends(models_of)],
    body: Annotated[ChatRequest, Depends(json_body(ChatRequest))],
) -> Response:
    service, name = models.choose(body.model, with_images=bool(body.media))
    prompt = PromptSource(
        tokens=lambda: chat_tokens(service.tokenizer, body),
        marked=lambda: marked_chat(service.tokenizer, body),
        is_marked=any(message.has_context for message in body.messages),
        pictured=partial(pictured_chat, service, body) if body.media else None,
        kinds=frozenset(part.kind for *_, part in body.media),
    )
    generation = Generation(service, body, [prompt], "messages")
    return await respond(request, generation, ChatAnswer(name, service.tokenizer, body.logprobs_asked))
