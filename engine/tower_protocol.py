"""What the engine asks of a vision tower and its projector, whichever model they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from winnow.engine.compression.vision.features import Features
from winnow.engine.errors import RequestError
from winnow.engine.messages import Array, Picture

if TYPE_CHECKING:
    from winnow.engine.compression.vision.plan import Vision
    from winnow.engine.compression.vision.policy import View
    from winnow.engine.pages import Ints

TYPES = ("float32", "int64", "int32", "uint8", "bool")
"""Of numbers that a tower reads"""

Inputs = Mapping[str, NDArray[Any]]
"""What a tower reads of one picture, as the model's image processor names it"""


class Eyes(Protocol):
    """A loaded tower. What it makes of a picture depends on that picture alone; so do the bits."""

    @property
    def sees(self) -> Mapping[str, int]:
        """`EngineInfo.sees`"""

    def encode(self, inputs: Inputs) -> Features:
        """What it sees, in host memory.

        Raises
            RequestError: these are not the inputs that it reads
        """

    def reduced(self, inputs: Inputs, vision: Vision) -> View:
        """What a policy that acts within the tower (`EncoderPolicy`) leaves of it, in host memory.

        Raises
            RequestError: these are not the inputs that it reads
            PlanNotSupported: the policy cannot act in this tower
        """

    def positions(self, tokens: Ints, pictures: Sequence[Picture]) -> Ints | None:
        """[3, n] int32 time, row and column of each token of a whole prompt (M-RoPE); None where the model's positions
        have one axis."""


def inputs_of(picture: Picture, *names: str) -> Inputs:
    """Those of some names, or all if none is given. RequestError where sizes or types are wrong."""
    return {name: _array(name, array) for name, array in picture.inputs.items() if name in names or not names}


def _array(name: str, array: Array) -> NDArray[Any]:
    if array.dtype not in TYPES:
        raise RequestError("pictures", f"pictures: '{name}' holds {array.dtype}, and towers read {', '.join(TYPES)}")
    dtype = np.dtype(array.dtype).newbyteorder("<")
    if any(size < 0 for size in array.shape) or len(array.data) != dtype.itemsize * prod(array.shape):
        raise RequestError("pictures", f"pictures: '{name}' has {len(array.data)} bytes, which is not {array.shape}")
    return np.frombuffer(array.data, dtype).reshape(array.shape).copy()
