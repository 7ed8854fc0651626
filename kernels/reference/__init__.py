"""The reference backend: every operation in plain torch, exact and slow. Other backends are tested against it."""

from winnow.kernels.host import device, page_formats
from winnow.kernels.reference.attention import attention
from winnow.kernels.reference.energy import query_energy
from winnow.kernels.reference.linear import embed, linear, pack
from winnow.kernels.reference.moments import query_moments
from winnow.kernels.reference.norm import rms_norm, silu_mul
from winnow.kernels.reference.pages import copy_pages, read_lanes, repack, write_lanes
from winnow.kernels.reference.reading import choose_reads
from winnow.kernels.reference.rope_write import rope_write
from winnow.kernels.reference.rows import nearest_rows, sum_rows

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
