"""The plan's part `prompt`: {"policy": "selective", "keep": 0.5, "unit": "sentence"}."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import Field

from winnow.engine.compression.budget import Budget, is_everything, tokens_of
from winnow.engine.compression.knobs import any_method, method_model, schemas
from winnow.engine.compression.prompt.policy import PromptParams
from winnow.engine.compression.registry import PROMPT, prompt_policy


class Prompt(PromptParams):
    """The knobs that all prompt policies have. An instance is of `prompt_model(policy)` and is itself the `params` of
    the policy's methods."""

    policy: str
    keep: Budget = Field(description="what stays of the context at most: a fraction (0.5) of its tokens, or a count")

    @property
    def keeps_all(self) -> bool:
        return is_everything(self.keep) and not self.drops_beyond_budget

    def budget_tokens(self, context_tokens: int) -> int:
        return tokens_of(self.keep, context_tokens)


@cache
def prompt_model(name: str) -> type[Prompt]:
    """The model of `prompt` for one policy: common knobs and its own, which therefore may not share a name."""
    return method_model(Prompt, name, prompt_policy(name))


if TYPE_CHECKING:
    AnyPrompt = Prompt
else:
    AnyPrompt = any_method(prompt_model, PROMPT)


def prompt_schema() -> dict[str, dict[str, Any]]:
    """JSON schema of `prompt` for each policy, by name."""
    return schemas(prompt_model, PROMPT)
