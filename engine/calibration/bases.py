"""Bases in which a lane's keys and values need few coordinates, for the formats that store no more than these.

    keys, values    [layers, kv_heads, head_dim, rank] float16, orthonormal columns, rank = head_dim / 2

They span what the lane's tokens span best, by least squares: the leading eigenvectors of E[x xᵀ], or what is the same,
the leading right singular vectors of all tokens one below the other. x is a value, or a key

    after RoPE      matryoshka (MatryoshkaKV, Lin et al., 2024, arXiv:2410.14731): the basis also stands for positions
    before RoPE     cskv (CSKV, Wang et al., 2024, arXiv:2409.10593): turned back by RoPE's angles

The papers go on to train what they begin with here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from winnow.engine.calibration.store import Profile
from winnow.engine.calibration.text import excerpts
from winnow.engine.calibration.watch import Glimpse, unrotated
from winnow.engine.models.config import ModelConfig
from winnow.kernels.bases import Bases
from winnow.kernels.host import to_device
from winnow.kernels.layout import PageFormat

EXCERPTS, EXCERPT_TOKENS = 12, 2048


class BasesAfterRope:
    """Sums x xᵀ over excerpts of a text."""

    before_rope: ClassVar[bool] = False

    def __init__(self, config: ModelConfig):
        self._config = config
        shape = (config.layers, config.kv_heads, config.head_dim, config.head_dim)
        self._keys = torch.zeros(shape, dtype=torch.float64)
        self._values = torch.zeros_like(self._keys)

    def prompts(self, text: Sequence[int]) -> list[list[int]]:
        return excerpts(text, EXCERPTS, min(EXCERPT_TOKENS, self._config.max_position))

    def see(self, glimpse: Glimpse) -> None:
        keys = unrotated(glimpse.keys, self._config.inv_freq) if self.before_rope else glimpse.keys.double()
        values = glimpse.values.double()
        self._keys[glimpse.layer] += keys.mT @ keys
        self._values[glimpse.layer] += values.mT @ values

    def profile(self) -> Profile:
        return {"keys": leading(self._keys), "values": leading(self._values)}


class BasesBeforeRope(BasesAfterRope):
    """The same, of keys as they are before RoPE."""

    before_rope = True


def bases_of(profiles: Mapping[str, Profile], device: torch.device) -> dict[PageFormat, Bases]:
    """The bases of the page formats that have a profile, as kernels on that device read them."""

    def there(basis: Tensor) -> Tensor:
        return to_device(basis.float().contiguous(), device)

    return {
        fmt: Bases(there(profile["keys"]), there(profile["values"].mT))
        for fmt in PageFormat
        if fmt.has_bases and (profile := profiles.get(fmt.label)) is not None
    }


def leading(products: Tensor) -> Tensor:
    """Half of the eigenvectors of symmetric matrices [..., n, n], those of the largest eigenvalues first: [..., n, n/2]
    float16. Each one's largest component is positive."""
    vectors = torch.linalg.eigh(products).eigenvectors.flip(-1)[..., : products.shape[-1] // 2]
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return (vectors * largest.sign()).half()
