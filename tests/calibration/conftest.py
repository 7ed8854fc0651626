"""Environment of the calibration tests."""

import os

# Before torch loads its OpenMP: threads that spin between calls would fight over the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from ..engine.conftest import ops, tiny  # noqa: F401
