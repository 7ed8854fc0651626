"""Backends as fixtures: `ops` is each in turn, `native` each that is compared with `reference`."""

import os

# Before torch loads its OpenMP: threads that spin between calls would fight over the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

from winnow.kernels.dispatch import Backend, backend


@pytest.fixture(params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> Backend:
    return backend(request.param)


@pytest.fixture(params=["cpu"])
def native(request: pytest.FixtureRequest) -> Backend:
    return backend(request.param)


@pytest.fixture
def reference() -> Backend:
    return backend("reference")
