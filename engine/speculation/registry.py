"""The methods of speculative decoding by name. A new one is a file in `methods/` and a line here.

The request schema, the OpenAPI page and `/v1/models` follow from this table.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import cast

from winnow.engine.speculation.method import Drafter

METHODS: dict[str, str] = {
    "prompt_lookup": "winnow.engine.speculation.methods.prompt_lookup:PromptLookup",
    "draft": "winnow.engine.speculation.methods.draft:DraftModel",
    "token_recycling": "winnow.engine.speculation.methods.token_recycling:TokenRecycling",
}


@cache
def drafter_class(name: str) -> type[Drafter]:
    """The class of a method; KeyError if there is none of this name."""
    module, attribute = METHODS[name].split(":")
    return cast(type[Drafter], getattr(import_module(module), attribute))
