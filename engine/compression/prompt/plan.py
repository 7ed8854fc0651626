"""The plan's part `prompt`: {"policy": "selective", "keep": 0.5, "unit": "sentence"}."""

from __future__ import annotations

from functools import cache, reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field, create_model

from winnow.engine.compression.budget import Budget, is_everything, tokens_of
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
    policy = prompt_policy(name)
    doc = (type(policy).__doc__ or name).strip()
    fields: dict[str, Any] = {"policy": (Literal[name], Field(description=doc))}
    bases: Any = (Prompt, policy.Params)
    return cast(type[Prompt], create_model(f"Prompt_{name}", __base__=bases, __doc__=doc, **fields))


if TYPE_CHECKING:
    AnyPrompt = Prompt
else:
    AnyPrompt = Annotated[reduce(or_, (prompt_model(name) for name in PROMPT)), Field(discriminator="policy")]


def prompt_schema() -> dict[str, dict[str, Any]]:
    """JSON schema of `prompt` for each policy, by name."""
    return {name: prompt_model(name).model_json_schema() for name in PROMPT}
