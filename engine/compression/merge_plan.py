"""`kv.evict.merge` of a plan: {"policy": "kv_merging", "threshold": 0.5}."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from winnow.engine.compression.knobs import any_method, method_model, schemas
from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.registry import MERGE, merge_method


class Merge(PolicyParams):
    """An instance is of `merge_model(policy)`: it has the method's own knobs, and is the `params` that it takes."""

    policy: str


@cache
def merge_model(name: str) -> type[Merge]:
    """The model of `merge` for one method."""
    return method_model(Merge, name, merge_method(name))


if TYPE_CHECKING:
    AnyMerge = Merge
else:
    AnyMerge = any_method(merge_model, MERGE)


def merge_schema() -> dict[str, dict[str, Any]]:
    """JSON schema of `kv.evict.merge` for each method, by name."""
    return schemas(merge_model, MERGE)
