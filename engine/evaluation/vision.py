"""What was measured of image tokens, summed up by policy: for tables, plots and METHODS.md."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from winnow.engine.evaluation.harness import IMAGE, PREFILL
from winnow.engine.evaluation.measures import Mean
from winnow.engine.evaluation.plans import BLIND, OFF, VISION_CONTROLS, family
from winnow.engine.evaluation.result import Cell, Result

RIVALS = ("random", "downsample")
"""Controls that a policy must not lose to, if it is to be recommended"""


@dataclass(frozen=True)
class Seen:
    """One plan."""

    kept: Mean
    """Tokens of an image that the language model reads"""
    held: Mean
    """Bytes at the end of a request, as a share of those under no plan"""
    score: Mean
    """Share of the questions that are answered rightly"""
    prefill_s: float | None
    """Median time to the first token of a request alone; None where it was not measured"""


def kinds(result: Result) -> list[str]:
    """Of questions."""
    return list(dict.fromkeys(cell.part for cell in result.values if cell.protocol == IMAGE and cell.part != PREFILL))


def seen(result: Result, plan: str) -> Seen | None:
    """None where nothing was measured."""
    kept, held, score = (result.mean(plan, measure, protocol=IMAGE) for measure in ("kept", "held", "score"))
    seconds = result.values.get(Cell(plan, PREFILL, 0, IMAGE), {}).get("seconds")
    if kept is None or held is None or score is None:
        return None
    return Seen(kept, held, score, median(seconds) if seconds else None)


def image_tokens(result: Result) -> float | None:
    """Of one image, unpruned."""
    whole = seen(result, OFF)
    return None if whole is None else whole.kept.value


def keeps(result: Result) -> list[float | int]:
    """What plans of one vision policy and nothing else keep, most first."""
    found = {plan["vision"]["keep"] for plan in result.plans.values() if plan.keys() == {"vision"}}
    return sorted(found, reverse=True)


def families(result: Result) -> dict[str, list[str]]:
    """Measured plans with image tokens pruned, by their names without what they keep: the controls first."""
    found: dict[str, list[str]] = {}
    for name in result.measured_plans:
        if name not in (OFF, BLIND) and seen(result, name) is not None:
            found.setdefault(family(name), []).append(name)
    return found


def policy_of(name: str) -> str:
    """The vision policy of a family of plans, with what stands beside it."""
    return name.removeprefix("vision:")


def losses(result: Result, policy: str) -> dict[str, Mean]:
    """How much worse a policy answers than those of `RIVALS` that it loses to: the mean over all that both kept, on the
    same questions. Empty if it holds its own, or nothing was measured."""
    found = {}
    for rival in RIVALS:
        behind = _behind(result, policy, rival)
        if policy not in VISION_CONTROLS and behind and sum(behind) > 0:
            found[rival] = Mean.of(behind)
    return found


def _behind(result: Result, policy: str, rival: str) -> list[float]:
    """Scores of the rival less those of the policy, one for each question at each keep."""
    return [
        theirs - ours
        for keep in keeps(result)
        for kind in kinds(result)
        for theirs, ours in zip(
            *(
                result.values.get(Cell(f"vision:{one}:{keep}", kind, 0, IMAGE), {}).get("score", ())
                for one in (rival, policy)
            ),
            strict=False,
        )
    ]
