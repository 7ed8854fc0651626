"""A CUDA graph that is not there: what is launched in Triton's interpreter is noted, and launched again with the very
same arguments. As in a graph's replay, nothing of what Python would decide by then is seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

ASKS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
"""Operations whose result, or its size, the host must know: no graph can hold them"""


class Tape(TorchDispatchMode):
    """Notes operations while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert op.overloadpacket.__name__ not in ASKS, f"{op} asks the device"
        made = op(*args, **(kwargs or {}))
        self._calls.append(partial(_again, op, args, kwargs or {}, made))
        return made

    def note(self, launch: Callable[[], object]) -> None:
        self._calls.append(launch)

    def play(self) -> None:
        for call in self._calls:
            call()


def _again(op: Any, args: Any, kwargs: Any, made: Any) -> None:
    """To where the results were the first time."""
    for old, new in zip(tree_leaves(made), tree_leaves(op(*args, **kwargs)), strict=True):
        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


def capture(launch: Callable[[], None]) -> Callable[[], object]:
    """What does again what `launch` does."""
    tape, execute = Tape(), GridExecutor.__call__

    def noted(executor: Any, *args: Any, **kwargs: Any) -> None:
        again = partial(execute, executor, *args, **kwargs)
        with _disable_current_modes():
            again()
        tape.note(again)

    with pytest.MonkeyPatch.context() as patch, tape:
        patch.setattr(GridExecutor, "__call__", noted)
        launch()
    return tape.play
