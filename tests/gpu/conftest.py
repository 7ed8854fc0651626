"""Tests of the GPU backend on a GPU, at sizes that Triton's interpreter would take hours for. Where there is none they
are skipped: there tests/kernels/triton checks the same kernels on small cases."""

import pytest
import torch

from winnow.kernels.dispatch import Backend, backend


@pytest.fixture(scope="session", autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture
def gpu() -> Backend:
    return backend("triton")


@pytest.fixture
def reference() -> Backend:
    return backend("reference")
