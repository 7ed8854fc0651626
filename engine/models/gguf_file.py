"""Reading GGUF files: metadata and the tensor table, without torch.

The `gguf` package's own reader takes seconds for a vocabulary of fifty thousand tokens and trusts the sizes
that a file states; this one takes a tenth of a second and checks them. Dequantization is the package's, which is not
looked for until there is such a file.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from winnow.engine.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_QUANTS = frozenset(("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"))
_CHUNK = 1 << 20
"""Numbers dequantized at a time, which bounds numpy's temporaries."""


@dataclass(frozen=True)
class GgufTensor:
    shape: tuple[int, ...]
    """Outermost dimension first, as torch has it; the file has it the other way round"""
    quant: GGMLQuantizationType
    start: int
    """Byte offset in the file"""
    nbytes: int


class GgufFile:
    """A GGUF file's metadata and tensors. Raises ModelError for a file that is damaged or of an unknown kind."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            reader = _Reader(self._bytes)
            self.metadata, self.tensors = _read_header(reader)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (_Damaged, struct.error, UnicodeDecodeError, ValueError) as error:
            raise ModelError(f"{path}: not a readable GGUF file: {error}") from error
        if self.metadata.get("split.count", 0) > 1:
            raise ModelError(f"{path}: a GGUF split into several files is not supported; merge it with gguf-split")
        for name, tensor in self.tensors.items():
            if tensor.start + tensor.nbytes > len(self._bytes):
                raise ModelError(f"{path}: truncated: tensor {name} ends beyond the end of the file")

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "?"))

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Dequantizes a tensor into `out`, a C-contiguous float32 array of the tensor's shape."""
        from gguf import dequantize

        tensor = self.tensors[name]
        if tensor.quant.name not in _QUANTS:
            known = ", ".join(sorted(_QUANTS))
            raise ModelError(f"{self.path}: tensor {name} is {tensor.quant.name}; supported: {known}")
        cols = tensor.shape[-1]
        rows = math.prod(tensor.shape[:-1])
        raw = np.frombuffer(self._bytes, np.uint8, tensor.nbytes, tensor.start).reshape(rows, -1)
        flat = out.reshape(rows, cols)
        step = max(1, _CHUNK // cols)
        for row in range(0, rows, step):
            flat[row : row + step] = dequantize(raw[row : row + step], tensor.quant)


class _Damaged(Exception):
    """What is wrong with the bytes; becomes a ModelError that names the file."""


class _Reader:
    """A cursor over the file that never reads past its end."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 0

    def skip(self, size: int) -> int:
        start = self.at
        if size > len(self.data) - start:
            raise _Damaged("it ends in the middle of its header")
        self.at = start + size
        return start

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize("<" + code)
        return struct.unpack_from(f"<{count}{code}", self.data, self.skip(size * count))

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def string(self) -> str:
        size = self.number("Q")
        start = self.skip(size)
        return self.data[start : start + size].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _Damaged(f"metadata of unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            return list(self.numbers(_SCALARS[kind], count))
        return [self.value(kind) for _ in range(count)]


def _read_header(reader: _Reader) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if reader.data[:4] != b"GGUF":
        raise _Damaged("it does not begin with the letters GGUF")
    reader.skip(4)
    version, tensor_count, metadata_count = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version not in (2, 3):
        raise _Damaged(f"version {version} is not supported (2 and 3 are)")
    metadata = {reader.string(): reader.value(reader.number("I")) for _ in range(metadata_count)}

    table = []
    for _ in range(tensor_count):
        name, dims = reader.string(), reader.number("I")
        shape = tuple(reversed(reader.numbers("Q", dims)))
        table.append((name, shape, GGMLQuantizationType(reader.number("I")), reader.number("Q")))
    alignment = metadata.get("general.alignment") or 32
    first = -(-reader.at // alignment) * alignment

    tensors = {}
    for name, shape, quant, offset in table:
        block, block_bytes = GGML_QUANT_SIZES[quant]
        if not shape or shape[-1] % block or 0 in shape:
            raise _Damaged(f"tensor {name} has shape {list(shape)}, which {quant.name} cannot have")
        tensors[name] = GgufTensor(shape, quant, first + offset, math.prod(shape) // block * block_bytes)
    return metadata, tensors
