"""What the engine asks of a vision tower and its projector, whichever model they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from winnow.engine.compression.vision.features import Features
from winnow.engine.errors import RequestError
from winnow.engine.messages import Picture

if TYPE_CHECKING:
    from winnow.engine.compression.vision.plan import Vision
    from winnow.engine.pages import Ints

TYPES = ("float32", "int64", "int32", "uint8", "bool")
"""Of numbers that a tower reads"""


class Eyes(Protocol):
    """A loaded tower. What it makes of a picture depends on that picture alone."""

    @property
    def sees(self) -> Mapping[str, int]:
        """`EngineInfo.sees`"""

    def encode(self, picture: Picture) -> Features:
        """What it sees; there are as many tokens as the picture has placeholders.

        Raises
            RequestError: the picture's inputs are not what it reads
        """

    def reduced(self, picture: Picture, vision: Vision) -> tuple[Features, Tensor]:
        """The same under a policy that acts within the tower: what is left, and [n] int64, ascending, the placeholders
        at whose places it stands."""

    def positions(self, tokens: Ints, pictures: Sequence[Picture]) -> Ints | None:
        """[3, n] time, row and column of each token of a whole prompt (M-RoPE); None where the model's positions have
        one axis."""


def inputs_of(picture: Picture) -> dict[str, Tensor]:
    """What the tower is to read, in memory of its own. RequestError where sizes or types are wrong."""
    return {name: _tensor(name, array) for name, array in picture.inputs.items()}


def _tensor(name: str, array: Any) -> Tensor:
    if array.dtype not in TYPES:
        raise RequestError("pictures", f"pictures: '{name}' holds {array.dtype}, and towers read {', '.join(TYPES)}")
    dtype = np.dtype(array.dtype).newbyteorder("<")
    if any(size < 0 for size in array.shape) or len(array.data) != dtype.itemsize * int(np.prod(array.shape)):
        raise RequestError("pictures", f"pictures: '{name}' has {len(array.data)} bytes, which is not {array.shape}")
    return torch.from_numpy(np.frombuffer(array.data, dtype).reshape(array.shape).copy())
