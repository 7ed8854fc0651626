"""One sequence with all of its attention laid out: what the policies' oracles look at, and the view made from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor

from winnow.engine.calibration.store import Profile
from winnow.engine.compression.plan import Evict
from winnow.engine.compression.policy import EvictionPolicy, LaneView, QueryMoments
from winnow.kernels.vote import Vote

SINKS = 2
"""First tokens that the plans of the policy tests protect"""


@dataclass
class Dense:
    """A sequence that has evicted nothing yet."""

    keys: Tensor
    """[layers, kv_heads, tokens, head_dim] float32, after RoPE"""
    values: Tensor
    """[layers, kv_heads, tokens, head_dim] float32"""
    queries: Tensor
    """[layers, q_heads, tokens, head_dim] float32, before RoPE"""
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

    def view(self, policy: EvictionPolicy, params: Evict, seed: int = 7) -> LaneView:
        layers, heads, tokens, _ = self.keys.shape
        voters = policy.voters(params, tokens)
        first = 0 if voters is None else tokens - voters
        newest, noise = params.newest_voters(tokens), noise_of(seed, layers, heads, tokens)

        def mass(start: int) -> Tensor:
            return mass_of(self.attention[:, :, start:], range(start, tokens), params.vote(tokens), noise).float()

        return LaneView(
            positions=torch.arange(tokens).expand(layers, heads, tokens).contiguous(),
            kept=torch.full((layers, heads), tokens),
            layers=torch.arange(layers),
            keys=self.keys,
            values=self.values,
            mass=mass(first),
            newest_mass=mass(tokens - newest) if newest else None,
            newest_votes=newest,
            queries=moments_of(self.queries[:, :, SINKS:]),
            votes=tokens - first,
            q_per_kv=self.q_per_kv,
            seen=tokens,
            seed=seed,
            sinks=SINKS,
            depth=layers,
            inv_freq=self.inv_freq,
            rope_factor=1.0,
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
    values = torch.randn(keys.shape, generator=generator)
    made = profiles(layers, kv_heads * q_per_kv, head_dim, generator)
    return Dense(keys, values, queries, attention, q_per_kv, inv_freq, made)


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


def mass_of(attention: Tensor, positions: Iterable[int], vote: Vote, noise: Tensor) -> Tensor:
    """What rows of attention [layers, q_heads, rows, tokens] float64 at these positions, counted one after the other,
    give to each token, [layers, kv_heads, tokens] float64: noise has this shape."""
    group = attention.shape[1] // noise.shape[1]
    mass = torch.zeros(noise.shape, dtype=torch.float64)
    for row, position in enumerate(positions):
        seen = attention[:, :, row]
        if not vote.is_attention:
            heat = vote.temperature + vote.heating * max(0, position - vote.warm_from)
            logits = seen.log()  # but for a constant, which no softmax knows
            disturbed = logits + noise.repeat_interleave(group, 1) if vote.is_noisy else logits
            seen = (disturbed / heat).softmax(-1)
        heads = seen.unflatten(1, (-1, group))
        if vote.reduce == "max":
            mass = torch.maximum(mass, heads.amax(2))
        else:
            mass = vote.decay * mass + heads.sum(2)
    return mass


def moments_of(queries: Tensor) -> QueryMoments:
    """queries [layers, q_heads, n, head_dim]"""
    mean = queries.double().mean(2)
    apart = queries.double() - mean[:, :, None]
    return QueryMoments(mean, apart.mT @ apart / queries.shape[2])


def noise_of(seed: int, layers: int, heads: int, tokens: int) -> Tensor:
    """[layers, heads, tokens] float64: Gumbel's, from a hash of the place."""
    places = product(range(layers), range(heads), range(tokens))
    even = torch.tensor([hashed(seed, *place) for place in places], dtype=torch.float64)
    return -(-(even + 2.0**-25).log()).log().view(layers, heads, tokens)


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def hashed(seed: int, layer: int, head: int, position: int) -> float:
    state = seed
    for part in (0, layer, head, position):
        state = mix((state + (part + 1) * 0x9E3779B97F4A7C15) % 2**64)
    return (state >> 40) / 2**24


def cut(view: LaneView, index: Tensor, count: Tensor) -> LaneView:
    """The view after the lanes were cut to `index` (padded with -1), as the engine would show it."""
    is_padding = index < 0
    at = index.clamp_min(0)
    positions = view.positions.gather(2, at).masked_fill(is_padding, -1)
    assert view.keys is not None
    assert view.values is not None
    assert view.mass is not None
    keys, values = (
        side.gather(2, at[..., None].expand(*at.shape, side.shape[-1])).masked_fill(is_padding[..., None], 0.0)
        for side in (view.keys, view.values)
    )
    mass = view.mass.gather(2, at).masked_fill(is_padding, torch.nan)  # padding says nothing
    newest = None if view.newest_mass is None else view.newest_mass.gather(2, at).masked_fill(is_padding, torch.nan)
    return replace(view, positions=positions, kept=count, keys=keys, values=values, mass=mass, newest_mass=newest)
