"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from winnow.server.answers import CompletionAnswer
from winnow.server.body import body_docs, json_body
from winnow.server.generation import Generation, Tokenize
from winnow.server.protocol.completions import DEFAULT_MAX_TOKENS, CompletionRequest, Prompt
from winnow.server.protocol.responses import Completion
from winnow.server.respond import respond
from winnow.server.service import Service, service_of

router = APIRouter()


@router.post(
    "/v1/completions",
    summary="Continue one text or several",
    openapi_extra=body_docs(CompletionRequest),
    responses={200: {"model": Completion}},
)
async def completions(
    request: Request,
    service: Annotated[Service, Depends(service_of)],
    body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))],
) -> Response:
    def tokens_of(prompt: Prompt) -> Tokenize:
        if isinstance(prompt, str):
            return lambda: service.tokenizer.encode(prompt, body.add_special_tokens)
        return lambda: prompt

    name = service.model_name(body.model)
    generation = Generation(
        service,
        body,
        [tokens_of(prompt) for prompt in body.prompt],
        prompt_param="prompt",
        default_output=DEFAULT_MAX_TOKENS,
        prefixes=[prompt if isinstance(prompt, str) else None for prompt in body.prompt] if body.echo else None,
    )
    if body.forced is not None:
        forced = body.forced
        generation.forced = lambda: service.tokenizer.encode(forced, False) if isinstance(forced, str) else forced
    return await respond(request, generation, CompletionAnswer(name, service.tokenizer, body.logprobs_asked))
