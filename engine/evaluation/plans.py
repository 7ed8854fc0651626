"""The plans that are compared, written briefly: `snapkv:0.25:adaptive+int4`.

plan    part+part…
part    a page format (int4), an eviction or prompt policy with its budget (h2o:0.5), another policy of `kv`
        (quest:tokens=256), or "vision:" and a policy for images with what it keeps (vision:div_prune:0.25)
budget  as in a request: 0.25 is a fraction of the tokens, 512 a count
option  adaptive, pyramid, decode, both, merge=method, or knob=value (window=32)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import yaml

from winnow.engine.compression.mix import mix_model
from winnow.engine.compression.plan import FormatName, Plan
from winnow.engine.compression.registry import EVICTION, MERGE, MIX, PROMPT, READ
from winnow.engine.compression.vision.registry import VISION, vision_policy
from winnow.engine.errors import EvalError, RequestError
from winnow.kernels.formats import PageFormat

Plans = dict[str, dict[str, Any]]
"""What a request writes under "compression", by name"""

OFF = "off"
"""The uncompressed model, to which all others are compared"""
WEIGHTS = "off, against f32 weights"
"""The uncompressed model, compared with itself in exact weights"""
CONTROLS = ("random", "streaming_llm")
"""What any other eviction has to beat; they stand beside it at its budget"""
BLIND = "blind"
"""The uncompressed model, shown a grey image instead of each one"""
VISION_CONTROLS = ("random", "uniform", "avg_pool", "downsample")
"""What any other vision policy has to beat, at what it keeps"""
BUDGETS = (0.5, 0.25)
KEEPS = (0.5, 0.25, 0.125, 0.0625)
"""Of the tokens of an image"""
MERGED = "h2o:0.25"
FORMATS = tuple(
    fmt.label for fmt in PageFormat if fmt not in (PageFormat.F32, PageFormat.BF16) and not fmt.spans_layers
)
OTHERS = dict.fromkeys(READ, "read") | dict.fromkeys(MIX, "mix")
"""The part of `kv` that a policy belongs to"""
COMPOSED = ("snapkv:0.25:adaptive", "snapkv:0.25:pyramid", "snapkv:0.5+int8", "snapkv:0.25+int4")

_OPTIONS = {
    "adaptive": ("head_budget", "adaptive"),
    "pyramid": ("layer_budget", "pyramid"),
    "decode": ("during", "decode"),
    "both": ("during", "both"),
}


def default_plans(budgets: Iterable[float] = BUDGETS) -> list[str]:
    """Every method of `kv` and every policy of prompts at these budgets, and some of these together."""
    budgets = tuple(budgets)
    return [*kv_plans(budgets), *COMPOSED, *(f"{policy}:{budget}" for policy in PROMPT for budget in budgets)]


def kv_plans(budgets: Iterable[float]) -> list[str]:
    """The formats, every policy of eviction and of reading at these budgets, mixes, and the merging of what was
    evicted."""
    budgets = tuple(budgets)
    evictions = [f"{policy}:{budget}" for policy in EVICTION for budget in budgets]
    merges = [f"{MERGED}:merge={method}" for method in MERGE]
    reads = [f"{policy}:tokens={budget}" for policy in READ for budget in budgets]
    mixes = [f"{MERGED}+{name}" if _needs_eviction(name) else name for name in MIX]
    return [*FORMATS, *evictions, *reads, *mixes, *merges]


def default_vision_plans(keeps: Iterable[float] = KEEPS) -> list[str]:
    """Every policy for images."""
    policies = [policy for policy in VISION if "image" in vision_policy(policy).kinds]
    return [f"vision:{policy}:{keep}" for policy in policies for keep in keeps]


def read_plans(text: str, default: Iterable[str] = ()) -> Plans:
    """Plans of a command line: brief ones, files of full ones, and "default", separated by commas.

    A file is YAML or JSON: names, and under each what a request writes. `default`: brief plans that this word stands
    for.
    """
    plans: Plans = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        if item == "default":
            plans |= {name: read_plan(name) for name in default}
        elif item.endswith((".yaml", ".yml", ".json")):
            plans |= _read_file(Path(item))
        elif item != OFF:
            plans[item] = read_plan(item)
    if not plans:
        raise EvalError("there are no plans to compare")
    return {OFF: {}} | with_controls(plans)


def read_plan(text: str) -> dict[str, Any]:
    plan: dict[str, Any] = {}
    kv: dict[str, Any] = {}
    for part in text.split("+"):
        name, *options = part.split(":")
        if name == "vision" and len(options) > 1 and options[0] in VISION:
            policy, keep, *knobs = options
            _set(plan, "vision", {"policy": policy, "keep": _number(keep), **dict(map(_option, knobs))}, text)
        elif name == "vision":
            raise EvalError(f"{text}: vision needs a policy and what it keeps, as in vision:random:0.25")
        elif name in get_args(FormatName) and not options:
            _set(kv, "format", name, text)
        elif name in EVICTION and options:
            _set(kv, "evict", {"policy": name, "budget": _number(options[0]), **dict(map(_option, options[1:]))}, text)
        elif name in PROMPT and options:
            _set(plan, "prompt", {"policy": name, "keep": _number(options[0]), **dict(map(_option, options[1:]))}, text)
        elif name in EVICTION or name in PROMPT:
            raise EvalError(f"{text}: {name} needs a budget, as in {name}:0.5")
        elif name in OTHERS:
            _set(kv, OTHERS[name], {"policy": name, **dict(map(_option, options))}, text)
        else:
            raise EvalError(f"{text}: {part!r} is no page format and no policy")
    return ({"kv": kv} if kv else {}) | plan


def with_controls(plans: Plans) -> Plans:
    """The plans, and for each budget among them the controls."""
    evicts = [evict["budget"] for plan in plans.values() if (evict := (plan.get("kv") or {}).get("evict"))]
    shortens = [prompt["keep"] for plan in plans.values() if (prompt := plan.get("prompt"))]
    budgets = dict.fromkeys(evicts + shortens)
    controls = [f"{policy}:{budget}" for policy in CONTROLS for budget in budgets]
    keeps = dict.fromkeys(vision["keep"] for plan in plans.values() if (vision := plan.get("vision")))
    controls += [f"vision:{policy}:{keep}" for policy in VISION_CONTROLS for keep in keeps]
    return plans | {name: read_plan(name) for name in controls if name not in plans}


def is_control(name: str) -> bool:
    match name.split(":"):
        case [policy, budget]:
            return policy in CONTROLS and "+" not in budget
        case ["vision", policy, keep]:
            return policy in VISION_CONTROLS and "+" not in keep
    return name == BLIND


def family(name: str) -> str:
    """A plan's name without its budgets: plans of one family make one line of a plot."""
    parts = (part.split(":") for part in name.split("+"))
    return "+".join(
        ":".join(piece for i, piece in enumerate(part) if i != (2 if part[0] == "vision" else 1)) for part in parts
    )


def check(plans: Plans) -> dict[str, str]:
    """Why the plans that no request could name are refused, by name."""
    refused = {}
    for name, plan in plans.items():
        try:
            Plan.parse(plan)
        except RequestError as error:
            refused[name] = error.message
    return refused


def _needs_eviction(name: str) -> bool:
    """A method that mixes formats by the choice of an eviction policy."""
    return mix_model(name)(policy=name).choice is None


def _set(kv: dict[str, Any], key: str, value: Any, text: str) -> None:
    if key in kv:
        raise EvalError(f"{text}: two parts say what {key} is")
    kv[key] = value


def _option(text: str) -> tuple[str, Any]:
    if text in _OPTIONS:
        return _OPTIONS[text]
    name, equals, value = text.partition("=")
    if name == "merge" and value:
        return name, {"policy": value}
    if not equals:
        raise EvalError(f"{text!r} is no option; known: {', '.join(_OPTIONS)}, merge=method and knob=value")
    return name, yaml.safe_load(value)


def _number(text: str) -> float | int:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise EvalError(f"{text!r} is no budget: a fraction such as 0.25, or a count of tokens") from None


def _read_file(path: Path) -> Plans:
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise EvalError(f"{path}: {error}") from error
    if not isinstance(data, dict) or not all(isinstance(plan, dict) for plan in data.values()):
        raise EvalError(f"{path}: must hold names, and a plan under each")
    return {str(name): plan for name, plan in data.items() if name not in (OFF, False)}  # YAML reads "off" as false
