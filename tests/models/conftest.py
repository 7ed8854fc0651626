"""One backend for the model tests: the kernels' own tests hold the backends together."""

import os

# Before torch loads its OpenMP: threads that spin between calls would fight over the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

from winnow.kernels.dispatch import Backend, backend


@pytest.fixture(scope="session")
def ops() -> Backend:
    return backend("cpu")
