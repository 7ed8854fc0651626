"""What the engine is asked for when a plan shortens a prompt."""

from __future__ import annotations

from uuid import uuid4

from winnow.engine.compression.prompt.plan import Prompt
from winnow.engine.compression.prompt.policy import PromptSignal
from winnow.engine.compression.registry import prompt_policy
from winnow.engine.errors import PlanNotSupported, PromptTooLong, RequestError
from winnow.engine.messages import EngineInfo, Shorten
from winnow.server.marks import HOW_TO_MARK, MarkedPrompt
from winnow.server.settings import Settings


def shorten_request(
    marked: MarkedPrompt, plan: Prompt, info: EngineInfo, settings: Settings, prompt_param: str, cache_salt: str
) -> Shorten:
    """
    Raises
        RequestError: nothing is marked, the policy cannot be had here, or the prompt is too long for it
    """
    signal = prompt_policy(plan.policy).signal
    if (why := info.missing_policies.get(plan.policy)) is not None:
        raise PlanNotSupported("compression.prompt.policy", f"compression.prompt.policy: {why}")
    if not marked.parts:
        raise RequestError("compression.prompt", f"compression.prompt has no context: {HOW_TO_MARK[prompt_param]}")
    if signal is PromptSignal.EMBEDDINGS and not marked.question:
        message = f"{prompt_param}: '{plan.policy}' ranks by the question, and there is no text beside the context"
        raise RequestError(prompt_param, message, "invalid_value")
    length, longest = len(marked.tokens), settings.max_unshortened_tokens
    if length > longest:
        message = f"{prompt_param}: {length} tokens, and this server shortens at most {longest}"
        raise PromptTooLong(prompt_param, message)
    reads = info.max_model_len if info.draft_max_len is None else info.draft_max_len
    if signal.reads_prompt and length > reads:
        model = "the model" if info.draft_max_len is None else "the draft model"
        message = f"'{plan.policy}' has {model} read the whole prompt: {length} tokens, of at most {reads}"
        raise PromptTooLong(prompt_param, message)
    return Shorten(
        request_id=uuid4().hex,
        prompt=marked.tokens,
        parts=marked.parts,
        plan=plan.model_dump(exclude_unset=True),
        question=marked.question,
        cache_salt=cache_salt,
    )
