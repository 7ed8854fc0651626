"""What a caller writes under "speculative", validated and immutable.

    {"method": "prompt_lookup", "tokens": 8, "ngram_max": 3}

A method's own knobs stand flat beside the common ones. `{}` is none: a request may so turn the server's default off.
Nothing here changes an answer, only how fast it comes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from winnow.engine.compression.knobs import any_method, method_model, schemas
from winnow.engine.compression.plan import Plan
from winnow.engine.compression.plan_errors import explain
from winnow.engine.config import NO_DRAFT
from winnow.engine.errors import PlanNotSupported, RequestError
from winnow.engine.speculation.method import MethodParams
from winnow.engine.speculation.registry import METHODS, drafter_class


class Speculation(MethodParams):
    """The knobs that all methods have. An instance is of `speculation_model(method)` and has the method's own too."""

    method: str


@cache
def speculation_model(name: str) -> type[Speculation]:
    """The model of "speculative" for one method."""
    return method_model(Speculation, name, drafter_class(name), tag="method")


if TYPE_CHECKING:
    AnySpeculation = Speculation
else:
    AnySpeculation = any_method(speculation_model, METHODS, tag="method")

SPECULATION: TypeAdapter[Speculation] = TypeAdapter(AnySpeculation)


def parse_speculation(data: Any, at: str = "speculative") -> Speculation | None:
    """What JSON data describes; RequestError names what is wrong, as a path below `at`."""
    if not isinstance(data, dict):
        raise RequestError(at, f"{at} must be an object")
    if not data:
        return None
    method = data.get("method")
    if not isinstance(method, str) or method not in METHODS:
        path = f"{at}.method"
        raise RequestError(path, f"{path} must be one of {', '.join(METHODS)}")
    model = speculation_model(method)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise explain(error, at, lambda path, policy: list(model.model_fields)) from None


def check_draft(speculation: Speculation | None, has_draft: bool, at: str = "speculative") -> None:
    """PlanNotSupported where the method needs a draft model and the server has none."""
    if speculation is not None and drafter_class(speculation.method).needs_draft and not has_draft:
        path = f"{at}.method"
        raise PlanNotSupported(path, f"{path}: '{speculation.method}' {NO_DRAFT}")


def check_combination(speculation: Speculation | None, plan: Plan, at: str = "speculative") -> None:
    """PlanNotSupported where a plan leaves no room for guesses."""
    if speculation is not None and (why := obstacle(plan)) is not None:
        raise PlanNotSupported(at, f"{at}: {why}")


def obstacle(plan: Plan) -> str | None:
    """Why nothing can be guessed ahead under this plan; None if it can.

    A query's vote counts for good, so a guess is read only where queries do not vote. So does what it chose to
    read, where the next query may read the same.
    """
    if plan.read is not None and plan.read.keeps_choices:
        return f"under '{plan.read.policy}' a token may read what the one before it chose, which a guess would change"
    evict = plan.evict
    if evict is None or not plan.evicts_in_decode:
        return None
    voters = evict.voters(1 << 40)
    if voters is None or voters >= plan.interval:
        return f"under '{evict.policy}', evicting during decode, every new token votes; use during: 'prefill'"
    return None


def speculation_schema() -> dict[str, dict[str, Any]]:
    """JSON schema of "speculative" for each method, by name."""
    return schemas(speculation_model, METHODS)
