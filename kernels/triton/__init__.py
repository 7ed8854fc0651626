"""The GPU backend: the operations of `winnow.kernels.dispatch.Backend` in Triton.

Where there is no GPU its kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is how they are checked.
"""

from winnow.kernels.reference.energy import query_energy
from winnow.kernels.triton.attention import attention
from winnow.kernels.triton.device import device, page_formats
from winnow.kernels.triton.linear import embed, linear, pack
from winnow.kernels.triton.moments import query_moments
from winnow.kernels.triton.norm import rms_norm, silu_mul
from winnow.kernels.triton.pages import copy_pages, read_lanes, repack, write_lanes
from winnow.kernels.triton.reading import choose_reads
from winnow.kernels.triton.rope_write import rope_write
from winnow.kernels.triton.rows import nearest_rows, sum_rows

__all__ = [
    "attention",
    "choose_reads",
    "copy_pages",
    "device",
    "embed",
    "linear",
    "nearest_rows",
    "pack",
    "page_formats",
    "query_energy",
    "query_moments",
    "read_lanes",
    "repack",
    "rms_norm",
    "rope_write",
    "silu_mul",
    "sum_rows",
    "write_lanes",
]
