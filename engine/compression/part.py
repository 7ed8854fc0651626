"""What the parts of a plan share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from winnow.kernels.formats import PageFormat

FORMATS = {fmt.label: fmt.what for fmt in PageFormat if not fmt.spans_layers}
"""What each page format does, by the name that a request writes"""


def described(formats: Mapping[str, str]) -> str:
    """One line of text on some of them."""
    return "; ".join(f"{label}: {what}" for label, what in formats.items())


if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]


class Part(BaseModel):
    """Base of the plan's parts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
