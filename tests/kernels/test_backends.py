"""Every backend has every operation, with the signature that `Backend` gives."""

from __future__ import annotations

import inspect

import pytest

from winnow.kernels.dispatch import Backend, backend

OPERATIONS = [name for name, member in vars(Backend).items() if inspect.isfunction(member) and not name.startswith("_")]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_take_the_same_arguments(ops: Backend, operation: str) -> None:
    declared = list(inspect.signature(getattr(Backend, operation)).parameters.values())[1:]
    defined = list(inspect.signature(getattr(ops, operation)).parameters.values())
    assert [(p.name, p.default) for p in defined] == [(p.name, p.default) for p in declared]


def test_a_backend_is_loaded_once() -> None:
    assert backend("reference") is backend("reference")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="cuda"):
        backend("cuda")  # type: ignore[arg-type]
