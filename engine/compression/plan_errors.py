"""From pydantic's errors to ours: the JSON path of the field and one short sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from winnow.engine.compression.registry import EVICTION, MERGE, MIX, PROMPT, READ
from winnow.engine.compression.vision.registry import VISION
from winnow.engine.errors import PlanNotSupported, RequestError

SENTENCES = {
    "missing": "is required",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "dict_type": "must be an object",
    "invalid_key": "has a key that is no text",
    "string_unicode": "has a key that is no text",
}

UNIONS: dict[tuple[str, ...], str] = {
    ("kv", "evict"): ", ".join(EVICTION),
    ("kv", "evict", "merge"): ", ".join(MERGE),
    ("kv", "mix"): ", ".join(MIX),
    ("vision",): ", ".join(VISION),
    ("prompt",): ", ".join(PROMPT),
    ("kv", "read"): ", ".join(READ),
    ("on_pressure", "evict"): ", ".join(EVICTION),
    ("on_pressure", "evict", "merge"): ", ".join(MERGE),
}
"""Objects whose "policy" says what else they hold, and its known values. Pydantic names the policy in its paths."""


def explain(
    error: ValidationError, at: str, fields: Callable[[tuple[str, ...], str | None], list[str]]
) -> RequestError:
    """RequestError for the first of pydantic's complaints.

    `fields(path, policy)` names what is allowed in the object at `path` below `at`. A combination that cannot be
    honoured is a PlanNotSupported.
    """
    first = error.errors(include_url=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    path, policy = _without_tags(tuple(str(step) for step in first["loc"]))
    if "at" in context:
        path = (*path, context["at"])

    if kind == "union_tag_not_found":
        text = f"is required; known policies: {UNIONS[path]}"
        path = (*path, "policy")
    elif kind == "union_tag_invalid":
        text = f"must be one of {UNIONS[path]}, not {_short(first['input'].get('policy'))}"
        path = (*path, "policy")
    elif kind == "extra_forbidden":
        known = ", ".join(fields(path[:-1], policy))
        where = f"a knob of '{policy}'" if policy else "a known field"
        text = f"is not {where}; known here: {known}"
    else:
        text = SENTENCES[kind].format(**context) if kind in SENTENCES else first["msg"]
        if "at" not in context and kind not in ("missing", "invalid_key", "string_unicode"):
            text += f", not {_short(first['input'])}"
    # A field's name comes from the caller: it may be long, or hold what cannot be encoded.
    full = ".".join((at, *(ascii(step[:64])[1:-1] for step in path)))
    if kind == "combination":
        return PlanNotSupported(full, f"{full}: {text}")
    return RequestError(full, f"{full} {text}")


def _without_tags(steps: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
    """The path that the caller wrote, and the policy of the innermost object on the way that has one."""
    path: tuple[str, ...] = ()
    policy = None
    for step in steps:
        if path in UNIONS and policy is None:
            policy = step
        else:
            path = (*path, step)
            policy = None if path in UNIONS else policy
    return path, policy


def _short(value: Any) -> str:
    """The value as JSON would show it, cut to a few characters."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
