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
    "snapkv:0.75:adaptive",
    "snapkv:0.75:adaptive+int8",
    "snapkv:0.5:adaptive",
    "snapkv:0.5:adaptive+int8",
    "snapkv:0.5:adaptive+int4",
    "snapkv:0.25:adaptive+int8",
    "snapkv:0.25:adaptive+int4",
    "snapkv:0.1:adaptive+int4",
    "streaming_llm:0.5+int8",
)
"""Written as for `winnow eval`: formats, and an eviction that is good at text with and without them"""

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
    plans = plans if plans is not None else {name: read_plan(name) for name in PLANS}
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
        plan = {} if name == OFF else plans[name]
        points.append(FrontierPoint(name, plan, agreement.value, agreement.error or 0.0, held.value))
    return points
