"""Between the server and the engine process: frames of a four-byte length and msgpack, and an exit status."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

from winnow.engine.messages import FromEngine, ToEngine

LENGTH = struct.Struct("<I")
MAX_FRAME = 256 * 2**20
EXIT_MODEL_ERROR = 3
"""The engine's exit status when its model cannot be loaded: trying again would not help"""

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(list[ToEngine])
_from_engine = msgspec.msgpack.Decoder(list[FromEngine])


def encode(messages: Sequence[ToEngine]) -> bytes:
    return _encoder.encode(messages)


def frame(messages: Sequence[ToEngine] | Sequence[FromEngine]) -> bytes:
    body = _encoder.encode(messages)
    return LENGTH.pack(len(body)) + body


def decode_to_engine(body: bytes) -> list[ToEngine]:
    return _to_engine.decode(body)


def decode_from_engine(body: bytes) -> list[FromEngine]:
    return _from_engine.decode(body)
