"""Measuring a frontier: each plan beside the uncompressed model on real text, with the harness of `winnow eval`."""

from __future__ import annotations

from collections.abc import Callable

from winnow.engine.evaluation.harness import Harness, Scope
from winnow.engine.evaluation.plans import OFF, Plans, read_plan
from winnow.engine.evaluation.result import Result
from winnow.engine.evaluation.targets import Target
from winnow.engine.messages import FrontierPoint

PLANS = (
    "int8",
    "int4",
    "fp8",
    "int2",
    *(f"snapkv:{budget}:adaptive+int8" for budget in (0.9, 0.75, 0.5, 0.25, 0.1)),
    "snapkv:0.5:adaptive+int4",
    "h2o:0.5+int8",
    "h2o:0.25+int8",
    "tri_attention:0.5+int8",
    "razor_attention:0.5+int8",
    "razor_attention:0.25+int8",
    "streaming_llm:0.5+int8",
    "streaming_llm:0.25+int8",
)
"""Written as for `winnow eval`: formats alone, and evictions in the one that costs least quality"""

CONTEXT, NEW = 1024, 64


def measure(
    target: Target,
    text: str,
    prompts: int,
    context: int = CONTEXT,
    new: int = NEW,
    plans: Plans | None = None,
    advance: Callable[[int, int], None] = lambda read, prompts: None,
) -> list[FrontierPoint]:
    """The points of the uncompressed model and of each plan, over `prompts` parts of a text: `context` tokens that are
    compressed, and the `new` ones behind them. EvalError if the model's context is too short.

    Args
        advance: told (prompts read, prompts in all) before each and after the last
    """
    plans = {OFF: {}} | (plans if plans is not None else {name: read_plan(name) for name in PLANS})
    result, begun = Result("frontier", {}, plans), 0

    def say(what: str) -> None:
        nonlocal begun
        advance(begun, prompts)
        begun += 1

    scope = Scope((), (), 0, text_prompts=prompts, text_context=context, text_new=new)
    Harness(target, text, plans, result).run(scope, say)
    advance(prompts, prompts)
    points = []
    for name in result.measured_plans:
        agreement, held = result.mean(name, "agreement"), result.mean(name, "held")
        assert agreement is not None and held is not None
        points.append(FrontierPoint(name, plans[name], agreement.value, agreement.error or 0.0, held.value))
    return points
