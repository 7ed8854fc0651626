"""The GPU backend: the operations of `winnow.kernels.dispatch.Backend` in Triton.

Where there is no GPU its kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is how they are checked.
"""

from winnow.kernels.triton.device import device
from winnow.kernels.triton.rows import rms_norm, silu_mul

__all__ = ["device", "rms_norm", "silu_mul"]
