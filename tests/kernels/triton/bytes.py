"""What kernels touch, seen in Triton's interpreter.

Three things that the interpreter alone would not tell: how many bytes a kernel asks for; an access outside the memory
that it was given; and programs of one launch that touch what another writes, whose order is free on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from triton.runtime import interpreter

Range = tuple[int, int]
"""First address, and the first behind it"""

_addressed: dict[Range, StorageWeakRef] = {}
"""Memory whose address was asked for: a tensor may hold it from one launch to the next"""
_data_ptr = Tensor.data_ptr


@dataclass
class Access:
    """One load or store of one program."""

    program: tuple[int, int, int]
    addresses: np.ndarray
    """[n] int64: of the numbers that are not masked"""
    size: int
    """bytes of a number"""
    writes: bool

    @property
    def bytes(self) -> np.ndarray:
        """[n * size] int64: address of each byte."""
        return (self.addresses[:, None] + np.arange(self.size)).ravel()


@dataclass
class Launch:
    kernel: str
    given: list[Range]
    """What it may touch"""
    accesses: list[Access] = field(default_factory=list)
    has_atomics: bool = False

    def __post_init__(self) -> None:
        first, behind = np.array(sorted(self.given), np.int64).reshape(-1, 2).T
        self._first = first
        self._behind = np.maximum.accumulate(np.append(0, behind))
        """[ranges + 1]: where the memory ends of which so many ranges' beginnings lie before an address"""

    def may_touch(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """[n] bool: of numbers of so many bytes, which lie in one of the ranges."""
        return addresses + size <= self._behind[np.searchsorted(self._first, addresses, side="right")]

    def check_order(self) -> None:
        """AssertionError where one program touches what another one writes."""
        writes = [access for access in self.accesses if access.writes]
        if not writes or self.has_atomics:
            return
        where = np.concatenate([access.bytes for access in writes])
        who = np.concatenate([np.full(access.addresses.size * access.size, _flat(access.program)) for access in writes])
        order = np.lexsort((who, where))
        where, who = where[order], who[order]
        twice = (where[1:] == where[:-1]) & (who[1:] != who[:-1])
        assert not twice.any(), f"{self.kernel}: two programs write the same {int(twice.sum())} bytes"
        for access in self.accesses:
            touched = access.addresses[(access.addresses >= where[0]) & (access.addresses <= where[-1])]
            found = np.searchsorted(where, touched)
            found[found == where.size] = 0
            foreign = (where[found] == touched) & (who[found] != _flat(access.program))
            assert not foreign.any(), f"{self.kernel}: program {access.program} reads what another one writes"


@dataclass
class Watch:
    """What was launched while it watched."""

    launches: list[Launch] = field(default_factory=list)

    def read(self, tensor: Tensor, kernel: str | None = None) -> tuple[int, int]:
        """Bytes of a tensor that were asked for, and how many distinct ones by program, summed over programs."""
        first, behind = _extent(tensor)
        asked, distinct = 0, {}  # type: tuple[int, dict[tuple[int, tuple[int, int, int]], set[int]]]
        for i, launch in enumerate(self.launches):
            for access in launch.accesses if kernel in (None, launch.kernel) else ():
                if access.writes:
                    continue
                inside = access.bytes[(access.bytes >= first) & (access.bytes < behind)]
                asked += inside.size
                distinct.setdefault((i, access.program), set()).update(inside.tolist())
        return asked, sum(map(len, distinct.values()))

    def touched(self, tensor: Tensor, by_writes: bool) -> Tensor:
        """[bytes] bool: the bytes of a contiguous tensor that any kernel stored, or else loaded."""
        first, behind = _extent(tensor)
        seen = np.zeros(behind - first, dtype=bool)
        accesses = (access for launch in self.launches for access in launch.accesses if access.writes == by_writes)
        for access in accesses:
            inside = access.bytes[(access.bytes >= first) & (access.bytes < behind)]
            seen[inside - first] = True
        return torch.from_numpy(seen)


@contextmanager
def watching(remember: bool = True) -> Iterator[Watch]:
    """Watches every launch; AssertionError at the first access that no GPU should see.

    A kernel may touch the tensors that it is launched with, and those whose address somebody asked for: side state is
    found by addresses that lie in a tensor. Accesses are remembered beyond their launch if that is wanted.
    """
    watch = Watch()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    call, is_launching = executor.__call__, False

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_launching
        for span in [span for span, storage in _addressed.items() if storage.expired()]:
            del _addressed[span]
        given = [_extent(part) for part in _tensors((*args, *kwargs.values()))]
        watch.launches.append(Launch(self.fn.__name__, [*given, *_addressed]))
        is_launching = True
        try:
            result = call(self, *args, **kwargs)
        finally:
            is_launching = False
        watch.launches[-1].check_order()
        if not remember:
            watch.launches.clear()
        return result

    def addressed_ptr(tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if not is_launching:
            _addressed[storage.data_ptr(), storage.data_ptr() + storage.nbytes()] = StorageWeakRef(storage)
        return _data_ptr(tensor)

    def note(self: Any, pointers: Any, mask: Any, writes: bool) -> None:
        active = np.broadcast_to(mask.data, pointers.data.shape).astype(bool) if mask is not None else ...
        addresses = np.atleast_1d(pointers.data[active]).astype(np.int64).ravel()
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        now = watch.launches[-1]
        inside = now.may_touch(addresses, size)
        verb = "writes" if writes else "reads"
        assert inside.all(), (
            f"{now.kernel}: program {self.grid_idx} {verb} {int((~inside).sum())} numbers out of bounds"
        )
        aligned = not (addresses % size).any()
        assert aligned, f"{now.kernel}: program {self.grid_idx} {verb} numbers of {size} bytes that are not aligned"
        now.accesses.append(Access(self.grid_idx, addresses, size, writes))

    def seen(method: Callable[..., Any], writes: bool, mask_at: int) -> Callable[..., Any]:
        def access(self: Any, pointers: Any, *args: Any) -> Any:
            note(self, pointers, args[mask_at], writes)
            return method(self, pointers, *args)

        return access

    def atomic(method: Callable[..., Any]) -> Callable[..., Any]:
        def access(self: Any, *args: Any) -> Any:
            watch.launches[-1].has_atomics = True
            return method(self, *args)

        return access

    with (
        mock.patch.object(executor, "__call__", launch),
        mock.patch.object(Tensor, "data_ptr", addressed_ptr),
        mock.patch.object(builder, "create_masked_load", seen(builder.create_masked_load, False, 0)),
        mock.patch.object(builder, "create_masked_store", seen(builder.create_masked_store, True, 1)),
        mock.patch.object(builder, "create_atomic_rmw", atomic(builder.create_atomic_rmw)),
        mock.patch.object(builder, "create_atomic_cas", atomic(builder.create_atomic_cas)),
    ):
        yield watch


def _flat(program: tuple[int, int, int]) -> int:
    return (program[0] << 40) + (program[1] << 20) + program[2]


def _extent(tensor: Tensor) -> Range:
    first = _data_ptr(tensor)
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (0 if tensor.numel() == 0 else (steps + 1) * tensor.element_size())


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
