"""What Triton's interpreter gets wrong, put right: arithmetic in bf16 and conversions to and from fp8. And what it does
again and again for nothing, left out.

It keeps bf16 as the 16 bits of an integer, on which it then adds and compares, and rounds both formats toward zero.
Here bf16 is computed in f32 and rounded to nearest even, as GPUs do, and fp8 (e4m3) is what torch makes of it,
saturated.

For every call of a function within a kernel it looks through the language for what to replace, for every sum and
product of integers it computes whether they overflow and passes over the answer, and for every tensor it writes down
anew which type of numpy's is which of its own: together more than half of its time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

Array = NDArray[Any]
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
FP8_MAX = 448.0


@functools.cache
def install() -> None:
    """Changes the interpreter of this process for good."""
    for name, make in _REPLACED.items():
        setattr(InterpreterBuilder, name, make(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.get_bf16 = _get_bf16
    ReduceScanOpInterface.check_tensor = _refuse_bf16(ReduceScanOpInterface.check_tensor)
    interpreter.GridExecutor.__call__ = _quietly(interpreter.GridExecutor.__call__)
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    builder = interpreter.interpreter_builder
    assert not builder.options.debug, "an overflow would be told"
    builder.options = replace(builder.options, sanitize_overflow=False)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Array:
    """The f32 numbers of a bf16 handle."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _rounded(numbers: Array) -> Any:
    """A bf16 handle of f32 numbers, to nearest even."""
    numbers = np.ascontiguousarray(numbers, np.float32)
    bits = numbers.view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(numbers), np.uint16(0x7FC0), nearest), tl.bfloat16)


def _get_bf16(self: Any, value: float) -> Any:
    return _rounded(np.array([value]))


def _binary_op(before: Callable[..., Any]) -> Callable[..., Any]:
    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not _is_bf16(lhs) or op in BITWISE:
            return before(self, lhs, rhs, op)
        out = op(_widened(lhs), _widened(rhs))
        return TensorHandle(out, tl.int1) if out.dtype == bool else _rounded(out)

    return binary_op


def _unary_op(before: Callable[..., Any]) -> Callable[..., Any]:
    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        return _rounded(op(_widened(arg))) if _is_bf16(arg) else before(self, arg, op)

    return unary_op


def _ternary_op(before: Callable[..., Any]) -> Callable[..., Any]:
    def ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        if op is np.clip and _is_bf16(lhs):
            return _rounded(np.clip(*map(_widened, (lhs, rhs, other))))
        return before(self, lhs, rhs, other, op)

    return ternary_op


def _create_fma(before: Callable[..., Any]) -> Callable[..., Any]:
    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return _rounded(_widened(x) * _widened(y) + _widened(z)) if _is_bf16(x) else before(self, x, y, z)

    return create_fma


def _create_dot(before: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if _is_bf16(a):
            a, b = (TensorHandle(_widened(part), tl.float32) for part in (a, b))
        return before(self, a, b, d, *options)

    return create_dot


def _cast_impl(before: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        to = dst_type.scalar
        if _is_bf16(src) and to != tl.bfloat16:
            wide = TensorHandle(_widened(src), tl.float32)
            return wide if to == tl.float32 else before(self, wide, dst_type)
        if to == tl.bfloat16 and not _is_bf16(src):
            return _rounded(src.data)
        return before(self, src, dst_type)

    return cast_impl


def _create_fp_to_fp(before: Callable[..., Any]) -> Callable[..., Any]:
    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if src.dtype.scalar == tl.float8e4nv:
            bits = torch.from_numpy(np.ascontiguousarray(src.data)).view(torch.float8_e4m3fn)
            return self.cast_impl(TensorHandle(bits.float().numpy(), tl.float32), dst_type)
        if dst_type.scalar == tl.float8e4nv:
            wide = torch.from_numpy(np.ascontiguousarray(self.cast_impl(src, tl.float32).data))
            codes = wide.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
            return TensorHandle(codes.view(torch.uint8).numpy(), tl.float8e4nv)
        return before(self, src, dst_type, rounding_mode)

    return create_fp_to_fp


_REPLACED = {
    "binary_op": _binary_op,
    "unary_op": _unary_op,
    "ternary_op": _ternary_op,
    "create_fma": _create_fma,
    "create_dot": _create_dot,
    "cast_impl": _cast_impl,
    "create_fp_to_fp": _create_fp_to_fp,
}


def _refuse_bf16(before: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction would run over bits; kernels reduce in f32."""

    def check_tensor(self: Any, parts: Any) -> None:
        before(self, parts)
        if any(part.dtype.scalar == tl.bfloat16 for part in parts):
            raise TypeError("the interpreter cannot reduce bf16")

    return check_tensor


def _quietly(before: Callable[..., Any]) -> Callable[..., Any]:
    """Infinities are no warnings on a GPU."""

    def call(*args: Any, **kwargs: Any) -> Any:
        _met.clear()
        with np.errstate(all="ignore"):
            return before(*args, **kwargs)

    return call


_met: set[Any] = set()
"""Functions that the launch which runs has called"""


def _once_a_launch(before: Callable[..., Any]) -> Callable[..., Any]:
    """The first call is the kernel's own: it takes what that returns to undo everything after the launch."""

    def patch_lang(fn: Any) -> Any:
        if fn in _met:
            return None
        _met.add(fn)
        return before(fn)

    return patch_lang


def _remembered(before: Callable[..., Any]) -> Callable[..., Any]:
    of_numbers = functools.cache(before)

    def get_np_dtype(tt_dtype: Any) -> Any:
        scalar = tt_dtype.scalar
        return before(scalar) if isinstance(scalar, tl.pointer_type) else of_numbers(scalar)

    return get_np_dtype
