"""The GPU backend: the operations of `winnow.kernels.dispatch.Backend` in Triton.

Where there is no GPU its kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is how they are checked.
"""

from winnow.kernels.triton.device import device
from winnow.kernels.triton.moments import query_moments
from winnow.kernels.triton.rope_write import rope_write
from winnow.kernels.triton.rows import rms_norm, silu_mul

__all__ = [
    "device",
    "query_moments",
    "rms_norm",
    "rope_write",
    "silu_mul",
]
