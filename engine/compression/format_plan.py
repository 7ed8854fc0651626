"""What page formats do not go with, in `kv.format` and in `on_pressure.format` of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from winnow.kernels.layout import PageFormat

if TYPE_CHECKING:
    from winnow.engine.compression.evict_plan import Evict


def check_compact(fmt: PageFormat, evict: Evict | None, at: str) -> None:
    """PydanticCustomError where pages of a format hold too little of keys that compact positions turn."""
    if evict is None or not evict.is_compact:
        return
    why = None
    if fmt.drops_channels:
        why = f"'{fmt.label}' chooses channels at the end of the prompt, and compact positions seal pages before"
    elif fmt.has_bases:
        why = f"compact positions turn keys at every eviction, and each time '{fmt.label}' loses what leaves its basis"
    if why is not None:
        raise PydanticCustomError("combination", "{why}", {"at": at, "why": why})
