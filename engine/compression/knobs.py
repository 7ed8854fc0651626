"""Objects of a request that name one of several methods, whose own knobs stand flat beside the common ones.

    {"policy": "snapkv", "budget": 0.25, "window": 32}

Each method has its own model, and the object is the union of them, told apart by the field that holds the name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, Field, create_model

M = TypeVar("M", bound=BaseModel)


def method_model(common: type[M], name: str, method: Any, tag: str = "policy", **fields: Any) -> type[M]:
    """The model of one method.

    Args:
        common: the knobs that all methods of its kind have, and the field `tag` that holds the name
        method: whose `Params` are its own knobs, which may narrow common ones, and whose docstring is the model's
        fields: further ones that differ for this method, as `create_model` takes them
    """
    doc = (method.__doc__ or name).strip()
    fields = {tag: (Literal[name], Field(description=doc)), **fields}
    bases: Any = (method.Params, common)
    return cast(type[M], create_model(f"{common.__name__}_{name}", __base__=bases, __doc__=doc, **fields))


def any_method(model: Callable[[str], type[M]], names: Iterable[str], tag: str = "policy") -> Any:
    """The type of a field that holds the knobs of any of these methods."""
    return Annotated[reduce(or_, map(model, names)), Field(discriminator=tag)]


def schemas(model: Callable[[str], type[M]], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """JSON schema of each method's model, by name."""
    return {name: model(name).model_json_schema() for name in names}
