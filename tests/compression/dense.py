"""One sequence with all of its attention laid out: what the policies' oracles look at, and the view made from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from winnow.engine.calibration.store import Profile
from winnow.engine.compression.plan import Evict
from winnow.engine.compression.policy import EvictionPolicy, LaneView


@dataclass
class Dense:
    """A sequence that has evicted nothing yet."""

    keys: Tensor
    """[layers, kv_heads, tokens, head_dim] float32"""
    attention: Tensor
    """[layers, q_heads, queries, tokens] float64: causal softmax; query head h reads kv head h // q_per_kv"""
    q_per_kv: int
    inv_freq: Tensor
    """[head_dim / 2] float32"""
    profiles: dict[str, Profile] = field(default_factory=dict)
    """By method"""

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    def mass(self, votes: int) -> Tensor:
        """[layers, kv_heads, tokens] float32, as the kernels sum it up."""
        layers, heads, tokens, _ = self.keys.shape
        newest = self.attention[:, :, tokens - votes :].sum(2)
        return newest.view(layers, heads, self.q_per_kv, tokens).sum(2).float()

    def view(self, policy: EvictionPolicy, params: Evict, seed: int = 7) -> LaneView:
        layers, heads, tokens, _ = self.keys.shape
        voters = policy.voters(params, tokens)
        votes = tokens if voters is None else voters
        return LaneView(
            positions=torch.arange(tokens).expand(layers, heads, tokens).contiguous(),
            kept=torch.full((layers, heads), tokens),
            layers=torch.arange(layers),
            keys=self.keys,
            mass=self.mass(votes),
            votes=votes,
            q_per_kv=self.q_per_kv,
            seen=tokens,
            seed=seed,
            inv_freq=self.inv_freq,
            profile=self.profiles.get(params.policy),
        )


def dense(
    tokens: int, layers: int = 2, kv_heads: int = 2, q_per_kv: int = 3, head_dim: int = 16, seed: int = 0
) -> Dense:
    """Random queries and keys, a little peaked, and their attention in float64."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(layers, kv_heads, tokens, head_dim, generator=generator) * 1.5
    queries = torch.randn(layers, kv_heads * q_per_kv, tokens, head_dim, generator=generator)
    spread = keys.repeat_interleave(q_per_kv, dim=1)
    logits = (queries.double() @ spread.double().transpose(-1, -2)) * head_dim**-0.5
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    attention = logits.masked_fill(future, -torch.inf).softmax(-1)
    inv_freq = 100.0 ** -(torch.arange(head_dim // 2) * 2 / head_dim)
    return Dense(keys, attention, q_per_kv, inv_freq, profiles(layers, kv_heads * q_per_kv, head_dim, generator))


def profiles(layers: int, q_heads: int, head_dim: int, generator: torch.Generator) -> dict[str, Profile]:
    """Random ones of the right shapes: queries whose mean is no longer than they are, scores from 0 to 1."""

    def random(*shape: int) -> Tensor:
        return torch.rand(layers, q_heads, *shape, generator=generator)

    mean = random(head_dim) - 0.5
    length = torch.hypot(*mean.chunk(2, dim=-1)) + 0.2 * random(head_dim // 2)
    return {
        "tri_attention": {"mean": mean, "length": length},
        "razor_attention": {"echo": random(), "induction": random()},
    }


def cut(view: LaneView, index: Tensor, count: Tensor) -> LaneView:
    """The view after the lanes were cut to `index` (padded with -1), as the engine would show it."""
    is_padding = index < 0
    at = index.clamp_min(0)
    positions = view.positions.gather(2, at).masked_fill(is_padding, -1)
    assert view.keys is not None
    assert view.mass is not None
    keys = view.keys.gather(2, at[..., None].expand(*at.shape, view.keys.shape[-1]))
    keys = keys.masked_fill(is_padding[..., None], 0.0)
    mass = view.mass.gather(2, at).masked_fill(is_padding, torch.nan)  # padding says nothing
    return replace(view, positions=positions, kept=count, keys=keys, mass=mass)
