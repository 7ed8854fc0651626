"""What the parts of a plan share."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FormatName = Literal["f32", "bf16", "int8", "int4", "int2", "fp8"]
"""Labels of `PageFormat`"""


class Part(BaseModel):
    """Base of the plan's parts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
