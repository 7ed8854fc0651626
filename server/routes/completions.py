"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from winnow.server.answers import CompletionAnswer
from winnow.server.body import body_docs, json_body
from winnow.server.generation import Generation
from winnow.server.marks import MarkedPrompt, PromptSource, marked_text
from winnow.server.models import Models, models_of
from winnow.server.protocol.completions import DEFAULT_MAX_TOKENS, CompletionRequest, Prompt
from winnow.server.protocol.responses import Completion
from winnow.server.respond import respond

router = APIRouter()


@router.post(
    "/v1/completions",
    summary="Continue one text or several",
    openapi_extra=body_docs(CompletionRequest),
    responses={200: {"model": Completion}},
)
async def completions(
    request: Request,
    models: Annotated[Models, Depends(models_of)],
    body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))],
) -> Response:
    service, name = models.choose(body.model)

    def source_of(prompt: Prompt) -> PromptSource:
        if not isinstance(prompt, str):
            return PromptSource(lambda: prompt, lambda: MarkedPrompt(prompt, [], ""), is_marked=False)
        return PromptSource(
            tokens=lambda: service.tokenizer.encode(prompt, body.add_special_tokens),
            marked=lambda: marked_text(service.tokenizer, prompt, body.context, body.add_special_tokens),
            is_marked=bool(body.context),
        )

    generation = Generation(
        service,
        body,
        [source_of(prompt) for prompt in body.prompt],
        prompt_param="prompt",
        default_output=DEFAULT_MAX_TOKENS,
        prefixes=[prompt if isinstance(prompt, str) else None for prompt in body.prompt] if body.echo else None,
    )
    if body.forced is not None:
        forced = body.forced
        generation.forced = lambda: service.tokenizer.encode(forced, False) if isinstance(forced, str) else forced
    return await respond(request, generation, CompletionAnswer(name, service.tokenizer, body.logprobs_asked))
