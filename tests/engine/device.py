"""A device that is not there: tensors of its own, as a GPU's are, though this machine's memory holds them.

What PyTorch refuses or waits for on a GPU is refused or counted here: an operation on tensors of both memories, a
device's tensor as a numpy array, and a number that the host asks of the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from winnow.kernels.bases import Bases
from winnow.kernels.dispatch import Backend
from winnow.kernels.kv import PagedKV
from winnow.kernels.reading import ReadState

from ..kernels.on_device import HOST, SIDES

_setup_privateuseone_for_python_backend()
DEVICE = torch.device("privateuseone", 0)

_COPIES = {"to", "_to_copy", "copy_", "_copy_from"}
_ASKS = {
    "item",
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
}
"""Operations whose result, or its size, the host must know"""
_waits: list[str] = []


class There(Tensor):
    """A tensor of the device; `here` is where its numbers really are."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        with torch.inference_mode(False):  # views of what was made outside of it can be taken within
            made: There = Tensor._make_wrapper_subclass(
                cls,
                here.shape,
                strides=here.stride(),
                storage_offset=here.storage_offset(),
                dtype=here.dtype,
                device=DEVICE,
            )
        made.here = here
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, *args, **(kwargs or {}))

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.here.data_ptr()


def here(x: Any) -> Any:
    return x.here if isinstance(x, There) else x


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    name = op.overloadpacket.__name__
    if name == "to":  # which in inference mode may come with its device by place
        kwargs = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
        args = (kwargs.pop("self"),)
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    theirs = {id(x.here): x for x in given if isinstance(x, There)}
    if name not in _COPIES:
        strangers = [list(x.shape) for x in given if not isinstance(x, There) and x.dim()]
        if theirs and strangers:
            raise RuntimeError(f"{name} of the device's tensors and of the host's {strangers}")
    is_there = bool(theirs) if (to := kwargs.get("device")) is None else to.type != "cpu"
    _count_waits(name, args, kwargs, is_there, bool(theirs))
    if name == "_copy_from":  # what `torch.tensor` does on a device
        op, args = torch.ops.aten.copy_.default, (args[1], args[0])
    if to is not None:
        kwargs["device"] = torch.device("cpu")
    if name in ("to", "_to_copy") and is_there and not theirs:  # the host may change its own
        kwargs["non_blocking"] = False
    made = op(*tree_map(here, args), **tree_map(here, kwargs))
    assert all(x.shape == x.here.shape for x in theirs.values()), f"{name} changed the size of what it was given"
    if not is_there:
        return made
    return tree_map(lambda x: theirs[id(x)] if id(x) in theirs else _there(x), made)  # changed in place, or new


def _count_waits(name: str, args: Any, kwargs: Any, is_there: bool, was_there: bool) -> None:
    if name in ("to", "_to_copy") and is_there != was_there:
        waits = not (is_there and kwargs.get("non_blocking"))
    elif name in ("copy_", "_copy_from"):
        waits = isinstance(args[0], There) != isinstance(args[1], There) and not (len(args) > 2 and args[2])
    elif name in ("index", "index_put", "index_put_"):  # by a mask: how many are true?
        waits = was_there and any(index is not None and index.dtype == torch.bool for index in args[1])
    else:
        waits = was_there and (name in _ASKS or (name == "repeat_interleave" and kwargs.get("output_size") is None))
    if waits:
        _waits.append(name)


def _directly(op: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _run(op, *args, **kwargs)


_rest = torch.library.Library("_", "IMPL")
_rest.fallback(_run, "PrivateUse1")
_aten = torch.library.Library("aten", "IMPL")
for _op in (
    torch.ops.aten.empty_strided.default,  # called where Python's other ways in are closed
    torch.ops.aten._copy_from.default,
    torch.ops.aten.arange.default,  # otherwise made empty and then enlarged, unseen by its owner
    torch.ops.aten.arange.start,
    torch.ops.aten.arange.start_step,
):
    _aten.impl(_op.name(), _directly(_op), "PrivateUse1")


@contextmanager
def waiting() -> Iterator[list[str]]:
    """What the host waits for meanwhile, by the names of the operations."""
    _waits.clear()
    yield _waits
    _waits.clear()


# A backend on it -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpsThere:
    """The operations of a backend of the host, as the device's own; what is to be here is checked to be."""

    ops: Backend

    def device(self) -> torch.device:
        return DEVICE

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = getattr(self.ops, name)
        signature = inspect.signature(operation)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            given = dict(bound.arguments)
            for key, value in given.items():
                if isinstance(value, Tensor) and key != "tokens" and isinstance(value, There) is (key in HOST):
                    raise RuntimeError(f"{name}: {key} is not where it must be")
                bound.arguments[key] = _kv_here(value) if isinstance(value, PagedKV) else here(value)
            made = operation(*bound.args, **bound.kwargs)
            for key, value in given.items():
                if isinstance(value, PagedKV):
                    value.native = bound.arguments[key].native
            return given["out"] if given.get("out") is not None else tree_map(_there, made)

        return call


def _there(x: Any) -> Any:
    return There(x) if isinstance(x, Tensor) else x


def _kv_here(kv: PagedKV) -> PagedKV:
    """The same memory as the host's; AssertionError unless all of it is the device's."""
    sides = {name: {slot: _taken(part) for slot, part in getattr(kv, name).items()} for name in SIDES}
    reading = {}
    for slot, state in kv.reading.items():
        parts = {part.name: getattr(state, part.name) for part in fields(state) if part.name != "rule"}
        taken = {name: None if part is None else _taken(part) for name, part in parts.items()}
        reading[slot] = ReadState(state.rule, **taken)
    energy = {slot: replace(part, sums=_taken(part.sums)) for slot, part in kv.energy.items()}
    bases = {fmt: Bases(_taken(part.keys), _taken(part.values)) for fmt, part in kv.bases.items()}
    rope = None if kv.rope is None else replace(kv.rope, cos=_taken(kv.rope.cos), sin=_taken(kv.rope.sin))
    return replace(kv, data=_taken(kv.data), **sides, reading=reading, energy=energy, bases=bases, rope=rope)


def _taken(part: Tensor) -> Tensor:
    assert isinstance(part, There), "what kernels read beside tables must be on the device"
    return part.here
