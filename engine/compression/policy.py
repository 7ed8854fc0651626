"""What an eviction policy is, and what it is shown.

A policy scores tokens and does nothing else: it moves no page, keeps no state and knows no budget. The engine turns
scores into keep sets (`select.keep_sets`). Policies import torch for type checkers only, since the server reads their
knobs and must not load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from winnow.engine.compression.signals import Signal
from winnow.kernels.layer_merge import LayerMerge
from winnow.kernels.vote import Vote

if TYPE_CHECKING:
    from torch import Tensor


class PolicyParams(BaseModel):
    """Base of a policy's own knobs. Strict: `"0.5"` is no number, and neither is `true`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True)
class QueryMoments:
    """Of the queries that voted, before RoPE."""

    mean: Tensor
    """[layers, q_heads, head_dim] float64"""
    covariance: Tensor
    """[layers, q_heads, head_dim, head_dim] float64"""


@dataclass(frozen=True, kw_only=True)
class LaneView:
    """The lanes of some layers of one sequence, at the moment when tokens are to be chosen.

    Lanes are ragged: what lies at and beyond a lane's kept length is padding and says nothing.
    """

    positions: Tensor
    """[layers, kv_heads, tokens] int64: logical positions, ascending; -1 beyond kept"""
    kept: Tensor
    """[layers, kv_heads] int64: tokens that each lane holds"""
    layers: Tensor
    """[layers] int64: which layers of the model these are"""
    keys: Tensor | None
    """[layers, kv_heads, tokens, head_dim] float32, after RoPE, zeros beyond kept (`Signal.KEYS`)"""
    values: Tensor | None
    """[layers, kv_heads, tokens, head_dim] float32, zeros beyond kept (`Signal.VALUES`)"""
    mass: Tensor | None
    """[layers, kv_heads, tokens] float32: softmax probability, summed over the voting queries and over the query
    heads of the KV group, or counted as `Voting.vote` says (`Signal.ATTENTION`)"""
    queries: QueryMoments | None
    """Moments of the queries that voted (`Signal.QUERIES`)"""
    votes: int
    """How many queries voted: those of the sequence's newest `votes` tokens"""
    q_per_kv: int
    seen: int
    """Tokens of the sequence so far, evicted ones included"""
    seed: int
    """The request's own seed, or that of its document; 64 bits"""
    sinks: int
    """First tokens that the plan protects"""
    depth: int
    """Layers of the model"""
    inv_freq: Tensor
    """[head_dim / 2] float32: the model's RoPE frequencies, scaling included. Channel f of a key at position p was
    turned together with channel f + head_dim / 2 by the angle p * inv_freq[f]"""
    rope_factor: float
    """What RoPE multiplied the turned keys by; 1 but for yarn"""
    newest_mass: Tensor | None = None
    """The part of `mass` that the newest `newest_votes` of the queries gave, for policies that are `HearsNewest`"""
    newest_votes: int = 0
    ahead: int = 0
    """Places by which RoPE has the newest token ahead of `seen` - 1, and those to come likewise: not 0 behind pictures
    that were pruned or have three axes"""
    profile: Mapping[str, Tensor] | None = None
    """What `winnow calibrate` has measured of the whole model, for policies in `calibration.registry.CALIBRATED`"""

    @property
    def age(self) -> Tensor:
        """[layers, kv_heads, tokens] int64: how many tokens of the lane are newer; negative beyond kept."""
        indices = self.positions.new_ones(self.positions.shape[-1]).cumsum(0)  # 1, 2, ...
        return self.kept.unsqueeze(-1) - indices

    def taken(self, index: Tensor) -> LaneView:
        """The same tokens in another order: index [layers, kv_heads, tokens] int64, padding last."""
        sides = {name: getattr(self, name) for name in ("positions", "keys", "values", "mass", "newest_mass")}
        taken = {
            name: side.gather(2, index if side.dim() == 3 else index[..., None].expand_as(side))
            for name, side in sides.items()
            if side is not None
        }
        return replace(self, **taken)

    @property
    def is_held(self) -> Tensor:
        """[layers, kv_heads, tokens] bool: false for padding."""
        return self.age >= 0


class EvictionPolicy(Protocol):
    """One named method. Stateless; the registry makes one instance for the process."""

    signals: ClassVar[frozenset[Signal]]
    """What `score` reads of the view beside positions and kept lengths"""

    query_agnostic: ClassVar[bool]
    """Whether what it keeps is meant for any question: false if it goes by what later tokens attend to, so that it
    must have read the question. If true, a document may be compressed before it (`kv.scope`)"""

    Params: ClassVar[type[PolicyParams]]
    """The method's own knobs; the request's `evict` object holds them beside the common ones"""

    def voters(self, params: Any, seen: int) -> int | None:
        """How many of the newest queries vote: 0 without `Signal.ATTENTION` and `Signal.QUERIES`, None for all since
        the request began (for `Signal.QUERIES`: but those of the sinks, which are like no other)."""

    def default_recent(self, params: Any, budget: int) -> int:
        """Newest tokens to protect out of `budget` when the caller names no number."""

    def score(self, view: LaneView, params: Any) -> Tensor:
        """[layers, kv_heads, tokens] float32: higher is kept. Values beyond a lane's kept length are ignored."""


@runtime_checkable
class SetsBudgets(Protocol):
    """A policy that says itself how many tokens each lane keeps; `head_budget` and `layer_budget` are refused."""

    def lane_budgets(self, view: LaneView, params: Any) -> Tensor:
        """[layers, kv_heads] int64: tokens that the view's lanes keep; more than kept means all. At least one, unless
        the others are only held in another format."""


@runtime_checkable
class MergesLayers(Protocol):
    """A method of `kv.mix` whose other tokens lie in pages that lanes of two layers share: `score` is shown these two
    together, and keys and values of no other layers."""

    def layer_merge(self, params: Any, layers: int) -> LayerMerge:
        """Which layers of a model of so many these are."""


@runtime_checkable
class Reciting(Protocol):
    """A policy that is told by the rows of a recital (engine/recital.py): they vote instead of the prompt's newest."""

    def recital_chunk(self, params: Any) -> int:
        """Tokens of the prompt that the model repeats at a time."""


@runtime_checkable
class LooksAhead(Protocol):
    """A policy that hears the prompt's newest queries, and behind them those of what a draft model goes on with: the
    model reads them like a recital (engine/recital.py)."""

    def lookahead(self, params: Any) -> int:
        """Tokens that the draft model says, at most."""


@runtime_checkable
class StagedPolicy(EvictionPolicy, Protocol):
    """An eviction policy that acts amid the prefill: the layers above the one that chooses read only what it chose."""

    def choosing_layer(self, params: Any, layers: int) -> int:
        """The layer whose view `score` is shown, once it has read the whole prompt."""

    def truncates(self, params: Any) -> bool:
        """Whether the layers up to that one forget the others too, once the prompt is read."""


@runtime_checkable
class HearsNewest(Protocol):
    """A policy with `Signal.ATTENTION` that hears the newest of the queries that vote apart from the others."""

    def newest_voters(self, params: Any, seen: int) -> int:
        """How many they are, if as many have come since the last eviction."""


@runtime_checkable
class Voting(Protocol):
    """A policy with `Signal.ATTENTION` whose mass is not a plain sum."""

    def vote(self, params: Any, prompt_tokens: int) -> Vote:
        """How a request's queries are counted."""
