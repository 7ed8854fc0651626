"""From pydantic's errors to ours: the JSON path of the field and one short sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from winnow.engine.compression.registry import EVICTION
from winnow.engine.errors import RequestError

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

KNOWN_POLICIES = ", ".join(EVICTION)


def explain(
    error: ValidationError, at: str, fields: Callable[[tuple[str, ...], str | None], list[str]]
) -> RequestError:
    """RequestError for the first of pydantic's complaints.

    `fields(path, policy)` names what is allowed in the object at `path` below `at`.
    """
    first = error.errors(include_url=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    path = tuple(str(step) for step in first["loc"])
    policy = None
    if path[:2] == ("kv", "evict") and len(path) > 2:  # pydantic puts the union's tag here
        policy, path = path[2], (*path[:2], *path[3:])
    if kind == "unused":
        path = (*path, context["at"])

    if kind == "union_tag_not_found":
        path = (*path, "policy")
        text = f"is required; known policies: {KNOWN_POLICIES}"
    elif kind == "union_tag_invalid":
        path = (*path, "policy")
        text = f"must be one of {KNOWN_POLICIES}, not {_short(first['input'].get('policy'))}"
    elif kind == "extra_forbidden":
        known = ", ".join(fields(path[:-1], policy))
        where = f"a knob of '{policy}'" if policy else "a known field"
        text = f"is not {where}; known here: {known}"
    else:
        text = SENTENCES[kind].format(**context) if kind in SENTENCES else first["msg"]
        if kind not in ("missing", "unused", "invalid_key", "string_unicode"):
            text += f", not {_short(first['input'])}"
    # A field's name comes from the caller: it may be long, or hold what cannot be encoded.
    full = ".".join((at, *(ascii(step[:64])[1:-1] for step in path)))
    return RequestError(full, f"{full} {text}")


def _short(value: Any) -> str:
    """The value as JSON would show it, cut to a few characters."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
