"""`kv.evict.merge` of a plan: {"policy": "kv_merging", "threshold": 0.5}."""

from __future__ import annotations

from functools import cache, reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field, create_model

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.registry import MERGE, merge_method


class Merge(PolicyParams):
    """An instance is of `merge_model(policy)`: it has the method's own knobs, and is the `params` that it takes."""

    policy: str


@cache
def merge_model(name: str) -> type[Merge]:
    """The model of `merge` for one method."""
    method = merge_method(name)
    doc = (type(method).__doc__ or name).strip()
    fields: dict[str, Any] = {"policy": (Literal[name], Field(description=doc))}
    bases: Any = (Merge, method.Params)
    return cast(type[Merge], create_model(f"Merge_{name}", __base__=bases, __doc__=doc, **fields))


if TYPE_CHECKING:
    AnyMerge = Merge
else:
    AnyMerge = Annotated[reduce(or_, (merge_model(name) for name in MERGE)), Field(discriminator="policy")]


def merge_schema() -> dict[str, dict[str, Any]]:
    """JSON schema of `kv.evict.merge` for each method, by name."""
    return {name: merge_model(name).model_json_schema() for name in MERGE}
