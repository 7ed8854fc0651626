"""A backend whose memory is another device's, called with tensors of this one: the same tests then serve all backends.

Every call moves what it is given, calls, and moves back what the operation may have changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend
from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.reading import ReadState

HOST = {"counts", "start", "dst_table", "dst_sealed", "positions", "src", "dst", "rest", "tokens"}
"""Arguments that are in host memory whatever the backend"""
SIDES = ("mass", "earlier_mass", "noise", "moments", "channels", "positions", "log_weights")


@dataclass(frozen=True)
class OnDevice:
    ops: Backend

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = getattr(self.ops, name)
        if not inspect.isfunction(operation):
            return operation
        signature, to = inspect.signature(operation), self.ops.device()

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            given = dict(bound.arguments)
            for key, value in given.items():
                if isinstance(value, PagedKV):
                    bound.arguments[key] = kv_to(value, to)
                elif isinstance(value, LaneBatch):
                    choices = {b: choice.to(to, copy=True) for b, choice in value.choices.items()}
                    bound.arguments[key] = replace(value, choices=choices, native=None)
                elif isinstance(value, Tensor) and key not in HOST:
                    bound.arguments[key] = value.to(to, copy=True)
            result = operation(*bound.args, **bound.kwargs)
            for key, value in given.items():
                there = bound.arguments[key]
                if isinstance(value, PagedKV):
                    _kv_back(there, value)
                elif isinstance(value, LaneBatch):
                    value.choices = {b: choice.cpu() for b, choice in there.choices.items()}
                elif key == "out" and value is not None:
                    value.copy_(there)
            return given["out"] if given.get("out") is not None else _home(result)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call


def _home(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_home(part) for part in result)
    return result.cpu() if isinstance(result, Tensor) else result


def kv_to(kv: PagedKV, to: torch.device) -> PagedKV:
    """A copy whose pages, and what slots hold beside them, are in the memory of `to`."""
    sides = {name: {slot: part.to(to, copy=True) for slot, part in getattr(kv, name).items()} for name in SIDES}
    reading = {slot: _state(state, lambda part: part.to(to, copy=True)) for slot, state in kv.reading.items()}
    energy = {slot: replace(part, sums=part.sums.to(to, copy=True)) for slot, part in kv.energy.items()}
    more = {"reading": reading, "energy": energy}
    return replace(kv, data=kv.data.to(to, copy=True), **sides, **more, native=None, stale=set())


def _kv_back(there: PagedKV, kv: PagedKV) -> None:
    kv.data.copy_(there.data)
    for name in SIDES:
        for slot, part in getattr(there, name).items():
            getattr(kv, name)[slot].copy_(part)
    for slot, energy in there.energy.items():
        kv.energy[slot].sums.copy_(energy.sums)
    for slot, state in there.reading.items():
        home = _state(state, Tensor.cpu)
        for part in fields(home):
            setattr(kv.reading[slot], part.name, getattr(home, part.name))


def _state(state: ReadState, move: Callable[[Tensor], Tensor]) -> ReadState:
    moved = {part.name: getattr(state, part.name) for part in fields(state) if part.name != "rule"}
    return ReadState(state.rule, **{name: part if part is None else move(part) for name, part in moved.items()})
