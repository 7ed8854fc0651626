"""Backends as fixtures: `ops` is each in turn, `native` each that is compared with `reference`.

Where there is a GPU the Triton backend is among them. Where there is none its kernels run in Triton's interpreter,
which is slow: the tests under tests/kernels/triton ask for `triton` themselves, with small cases.
"""

import os

import torch

# Before torch loads its OpenMP: threads that spin between calls would fight over the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not torch.cuda.is_available():  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

from winnow.kernels.dispatch import Backend, backend

from .build import formats_in
from .on_device import OnDevice

GPU = ["triton"] if torch.cuda.is_available() else []


def _backend(name: str) -> Backend:
    if name == "cpu":
        pytest.importorskip("winnow.kernels._cpu", reason="the native module is not built here")
    return OnDevice(backend("triton")) if name == "triton" else backend(name)


def _one_of(request: pytest.FixtureRequest) -> Backend:
    params = request.node.callspec.params
    if request.param == "triton" and params.get("kind") == "int8":
        pytest.skip("the triton backend has no int8 weights")
    ops = _backend(request.param)
    if missing := formats_in(list(params.values())).difference(ops.page_formats()):
        pytest.skip(f"the {request.param} backend has no pages in {missing.pop().label}")
    return ops


@pytest.fixture(params=["reference", "cpu", *GPU])
def ops(request: pytest.FixtureRequest) -> Backend:
    return _one_of(request)


@pytest.fixture(params=["cpu", *GPU])
def native(request: pytest.FixtureRequest) -> Backend:
    return _one_of(request)


@pytest.fixture
def cpu() -> Backend:
    return _backend("cpu")


@pytest.fixture
def triton() -> Backend:
    return _backend("triton")


@pytest.fixture
def reference() -> Backend:
    return backend("reference")
