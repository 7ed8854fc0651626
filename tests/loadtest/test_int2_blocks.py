"""The cache that int2's blocks are tried on is rounded as pages are."""

from __future__ import annotations

import int2_blocks
import torch

from winnow.kernels.formats import PageFormat
from winnow.kernels.layout import BLOCK, PageLayout
from winnow.kernels.reference.codec import decode_pages, encode_pages


def test_blocks_of_the_size_that_is_served_are_those_of_pages() -> None:
    layout = PageLayout(head_dim=64)
    keys, values = torch.randn(2, layout.capacity(PageFormat.INT2), 64, generator=torch.Generator().manual_seed(0))
    stored = decode_pages(encode_pages(keys, values, layout, PageFormat.INT2), layout, PageFormat.INT2)
    assert torch.equal(int2_blocks.rounded(keys.T, BLOCK).T, stored[0])
    assert torch.equal(int2_blocks.rounded(values, BLOCK), stored[1])


def test_what_fills_no_block_stays() -> None:
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(1))
    rounded = int2_blocks.rounded(x, 32)
    assert torch.equal(rounded[:, 64:], x[:, 64:])
    assert all(len(block.unique()) <= 4 for block in rounded[:, :64].reshape(-1, 32))
