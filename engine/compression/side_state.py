"""What plans hold of a sequence beside its pages, and what it costs. Of those that evict, token by token of each lane:

    positions   where lane tokens stand in the text
    mass        what the attention of voting queries gave them; noise is what it is disturbed by (see kernels/vote.py)
    moments     of the queries that voted, which do not grow
    channels    that stay in keys, for formats that drop some; before, the energy of the queries that choose them
    log weights of tokens that stand for several
    hidden      states of a prompt that is read in stages, and queries of those who choose what later stages read; the
                sequence has them, here they are counted

Of those that read a part, what `Reader` keeps of pages and choices. It lies outside the arena and counts as its memory:
the arena's ballast. Kernels read and add to it in place, so it has room for a step's tokens before the step begins. Its
size follows from the plan and the lanes' lengths alone.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from winnow.engine.compression.hashing import uniform
from winnow.engine.compression.plan import Evict, Plan
from winnow.engine.compression.policy import QueryMoments
from winnow.engine.compression.reader import NO_GROWTH, Reader
from winnow.engine.compression.signals import Signal
from winnow.engine.compression.timeline import NEVER, Timeline
from winnow.engine.errors import PromptTooLong
from winnow.engine.lanes import room
from winnow.engine.models.config import ModelConfig
from winnow.engine.pages import Ints, PageArena
from winnow.engine.sequence import Sequence
from winnow.engine.staging import Stages
from winnow.kernels.host import to_device
from winnow.kernels.kv import Energy

LATER = ("log_weights", "earlier_mass")
"""Parts that come when there is something to put in them; they have their place before"""


class SideState:
    """The side state of all sequences; their plans' events move it along with the tokens."""

    def __init__(self, arena: PageArena, config: ModelConfig, reader: Reader):
        self._arena = arena
        self._device = arena.kv.device
        self._reader = reader
        self._lanes = (config.layers, config.kv_heads)
        self._first_head = arena.ranks.rank * config.kv_heads
        self._moments = (config.layers, config.heads, 1 + config.head_dim, config.head_dim)
        self._head_dim = config.head_dim
        self._hidden_size = config.hidden_size
        self._query_size = config.heads * config.head_dim
        self._has_windows = any(config.windows)

    # Steps -----------------------------------------------------------------------------------------------------------

    def pages_to_extend(self, seq: Sequence, rows: int, growth: Ints | None = None) -> int:
        """Pages that must be free before `prepare` when as many rows come, which lanes do not count yet; `growth` [1]
        or [layers] is what lanes gain if not these rows."""
        if not _notes(seq.plan):
            return 0
        size = self._bytes(seq, seq.rows_read + rows, seq.growth(rows) if growth is None else growth)
        return max(0, -(-size // self._arena.layout.page_bytes) - self._arena.ballast(seq.slot))

    def prepare(self, seq: Sequence, rows: int) -> None:
        """Before a step whose `rows` the lanes count already: room for what they add."""
        if not _notes(seq.plan):
            return
        self._reader.prepare(seq)
        upto = seq.rows_read + rows
        self._make_room(seq, upto)
        self._arena.hold(seq.slot, self._bytes(seq, upto))
        # Kernels look positions up where evicted lanes meet a window, or keys that are held before RoPE.
        looks_up = self._has_windows or seq.plan.goes_by_position or seq.slot in self._arena.kv.noise
        knows = seq.plan.evict is not None or seq.stages is not None
        if knows and looks_up and seq.staging is None:  # stages note their own, and seal nothing
            self.note_positions(seq, upto)

    def _make_room(self, seq: Sequence, upto: int) -> None:
        slot, kv = seq.slot, self._arena.kv
        if self._watches_channels(seq, upto) and slot not in kv.energy:
            sums = torch.zeros((*self._lanes, self._head_dim), dtype=torch.float64, device=self._device)
            kv.energy[slot] = Energy(sums, *seq.timeline.channel_window)
        tokens = int(self._arena.kept[slot].max())
        for name, dtype in self._parts(seq, upto).items():
            side = getattr(kv, name)
            if slot in side or name not in LATER:
                side[slot] = self._resized(side.get(slot), tokens, dtype)
        if seq.plan.evict is None:
            return
        if self._hears_newest(seq):
            kv.earlier_mass[slot] = kv.mass[slot].clone()
        if slot in kv.mass:
            kv.votes[slot] = seq.plan.evict.vote(seq.document_tokens)
        if self._counts_queries(seq, upto) and slot not in kv.moments:
            kv.moments[slot] = torch.zeros(self._moments, dtype=torch.float64, device=self._device)

    def withdrawn(self, seq: Sequence) -> None:
        """After all rows of a step were taken out of its lanes again. What they voted stays: see
        `Sequence.leaves_traces`."""
        self._reader.withdrawn(seq)
        if self._hears_newest(seq):  # it was made for that step
            self._arena.kv.earlier_mass.pop(seq.slot, None)
        self.truncated(seq, seq.rows_read)

    def truncated(self, seq: Sequence, upto: int) -> None:
        """After the newest rows were taken out of its lanes again, so that they have read up to `upto`."""
        seq.positions_known = min(seq.positions_known, upto)
        if not _notes(seq.plan):
            return
        self._reader.fit(seq)
        slot, kv = seq.slot, self._arena.kv
        tokens = int(self._arena.kept[slot].max())
        for side in (kv.positions, kv.mass, kv.noise, kv.log_weights):
            if slot in side:
                side[slot] = self._resized(side[slot], tokens, side[slot].dtype)
        self._arena.hold(slot, self._bytes(seq, upto))

    def most_pages(self, plan: Plan, prompt_tokens: int, tokens: int) -> int:
        """Pages that a request's side state may come to by the time that `tokens` have been read."""
        size = 0 if plan.read is None else self._reader.most_bytes(plan.read, tokens)
        size += 0 if plan.evict is None else self._most_bytes(plan.evict, prompt_tokens, tokens)
        size += 8 * prod(self._lanes) * self._head_dim if plan.drops_channels else 0
        return -(-size // self._arena.layout.page_bytes)

    def _most_bytes(self, evict: Evict, prompt_tokens: int, tokens: int) -> int:
        is_noisy, hears_newest = evict.vote(prompt_tokens).is_noisy, evict.newest_voters(tokens) > 0
        parts = 1 + sum((Signal.ATTENTION in evict.signals, is_noisy, hears_newest, evict.merge is not None))
        fixed = 8 * prod(self._moments) if Signal.QUERIES in evict.signals else 0
        if evict.stage_bounds(self._lanes[0]):
            fixed += 4 * self._hidden_size * prompt_tokens
        return 4 * parts * prod(self._lanes) * room(tokens) + fixed

    def check_room(self, timeline: Timeline, text_tokens: int, stages: Stages | None) -> None:
        """PromptTooLong where the arena cannot hold a sequence, even alone, and what its policy notes of it."""
        arena, plan = self._arena, timeline.plan
        if not _notes(plan):
            return
        tokens = timeline.most_tokens(text_tokens)
        beside = self.most_pages(plan, timeline.document_tokens, tokens)
        if stages is not None and stages.images:
            size = prod(self._lanes) * room(tokens) + self._hidden_size * timeline.prompt_tokens
            beside += -(-4 * (size + self._query_size * len(stages.raters)) // arena.layout.page_bytes)
        if arena.lanes * (arena.layout.pages(tokens) + 1) + beside > arena.total:
            parts = (plan.evict, plan.read, plan.drops_between_layers)
            names = " and ".join(f"'{part.policy}'" for part in parts if part is not None)
            names = names or f"'{timeline.fmt.label}'"
            raise PromptTooLong(
                "max_tokens", f"{tokens} tokens, and what {names} must know of them, exceed the KV memory"
            )

    def _bytes(self, seq: Sequence, upto: int, growth: Ints = NO_GROWTH) -> int:
        """What is held, or promised, when lanes have gained `growth` [1] or [layers] tokens, read up to `upto`."""
        tokens = int((self._arena.kept[seq.slot] + growth[:, None]).max())
        size = self._reader.size(seq, upto, growth)
        size += 4 * len(self._parts(seq, upto)) * prod(self._lanes) * room(tokens)
        if self._counts_queries(seq, upto):
            size += 8 * prod(self._moments)
        if seq.staging is not None:  # no stage hands on more, in place of what it is handed
            size += 4 * self._hidden_size * seq.prompt_tokens
            size += 4 * self._query_size * len(seq.staging.stages.raters)
        if seq.slot in self._arena.kv.channels:
            size += prod(self._lanes) * self._head_dim
        elif self._watches_channels(seq, upto):
            size += 8 * prod(self._lanes) * self._head_dim
        return size

    def _watches_channels(self, seq: Sequence, upto: int) -> bool:
        """Whether queries choose the channels that stay, while tokens are read up to `upto`."""
        return seq.slot not in self._arena.kv.channels and seq.timeline.channel_window[0] < upto

    def _parts(self, seq: Sequence, upto: int) -> dict[str, torch.dtype]:
        """The parts that grow with tokens, by their names in `PagedKV`, while tokens are read up to `upto`. All have
        four bytes a token. Log weights, which merging may bring, have their place before."""
        parts: dict[str, torch.dtype] = {}
        if self._keeps_positions(seq):
            parts["positions"] = torch.int32
        if seq.plan.evict is None:
            return parts
        may_merge = seq.plan.evict.merge is not None and self._will_evict(seq)
        if may_merge or seq.slot in self._arena.kv.log_weights:
            parts["log_weights"] = torch.float32
        if Signal.ATTENTION in seq.plan.evict.signals:
            if seq.vote_start < upto:
                parts["mass"] = torch.float32
            hears_newest = self._hears_newest(seq) and seq.computed < upto
            if hears_newest or seq.slot in self._arena.kv.earlier_mass:
                parts["earlier_mass"] = torch.float32
            if seq.vote_start != NEVER and seq.plan.evict.vote(seq.document_tokens).is_noisy:
                parts["noise"] = torch.float32
        return parts

    def _keeps_positions(self, seq: Sequence) -> bool:
        """Whether windows, lanes of two formats, keys before RoPE or an eviction to come, be it for want of pages, look
        positions up."""
        if seq.plan.evict is None and seq.stages is None:
            return False
        if seq.plan.mix is not None or seq.plan.goes_by_position:
            return True
        return self._has_windows or self._will_evict(seq) or seq.plan.on_pressure is not None

    def _will_evict(self, seq: Sequence) -> bool:
        return seq.reciting is not None or seq.timeline.evicts_after(seq.computed)

    def _hears_newest(self, seq: Sequence) -> bool:
        """Whether the next step's first query is the first that is heard apart."""
        return seq.computed == seq.timeline.newest_start(seq.computed)

    def _counts_queries(self, seq: Sequence, upto: int) -> bool:
        evict = seq.plan.evict
        return evict is not None and Signal.QUERIES in evict.signals and seq.vote_start < upto

    def note_positions(self, seq: Sequence, upto: int) -> None:
        """Writes down where the lanes' tokens stand in the text, of which they count those before `upto` as kept.

        Until an event tokens follow each other in a lane as they do in the text, so those to come are noted too, as
        far as there is room: most steps find nothing to do.
        """
        slot, kv, kept = seq.slot, self._arena.kv, self._arena.kept[seq.slot]
        known = seq.positions_known
        if upto <= known:
            return
        first = kept - (upto - known)  # where in a lane the token at position `known` is
        held = self._resized(kv.positions.get(slot), int(kept.max()), torch.int32)
        start, capacity = int(first.min()), held.shape[-1]
        place = torch.arange(start, capacity, device=self._device)
        ahead = place - to_device(torch.from_numpy(first), self._device)[..., None]
        positions, part = known + ahead, held[..., start:]
        part.copy_(positions.int().where(ahead >= 0, part))
        kv.positions[slot] = held
        if slot in kv.noise:
            part = kv.noise[slot][..., start:]
            part.copy_(gumbel(seq.plan_seed, positions, self._first_head).where(ahead >= 0, part))
        seq.positions_known = upto + capacity - int(kept.max())

    def moments(self, slot: int, layers: slice, votes: int) -> QueryMoments:
        """Mean and covariance of the queries that voted; zero if none did."""
        moments = self._arena.kv.moments.get(slot)
        if moments is None:  # the text has no more tokens than sinks
            moments = torch.zeros((1, 1, 1, 1), dtype=torch.float64, device=self._device).expand(self._moments)
        mean, upper = moments[layers, :, 0] / max(1, votes), moments[layers, :, 1:].triu() / max(1, votes)
        products = upper + upper.triu(1).mT
        return QueryMoments(mean, products - mean[..., :, None] * mean[..., None, :])

    # Events ----------------------------------------------------------------------------------------------------------

    def carry(self, seq: Sequence, keep: Tensor | None, count: Ints) -> None:
        """Moves it with the tokens at an event: `keep` [layers, kv_heads, n] of them, padded with -1 (None: all stay).
        Mass that does not accumulate starts anew after an eviction."""
        kv, slot, tokens = self._arena.kv, seq.slot, int(count.max())
        if keep is not None:
            seq.positions_known = min(seq.positions_known, seq.computed)
            counts = to_device(torch.from_numpy(count), self._device)
            held = torch.arange(tokens, device=self._device) < counts[..., None]
            for side in (kv.positions, kv.mass, kv.noise, kv.log_weights):
                if slot in side:
                    moved = side[slot].gather(2, keep[..., :tokens].clamp_min(0)) * held
                    side[slot] = self._resized(moved, tokens, moved.dtype)
        if seq.timeline.evicts_at(seq.computed):
            kv.earlier_mass.pop(slot, None)
            if not seq.accumulates_votes:
                kv.mass.pop(slot, None)

    def put_log_weights(self, slot: int, weights: Tensor) -> None:
        """After `carry`: what the tokens that stayed count for, [layers, kv_heads, n] float32."""
        self._arena.kv.log_weights[slot] = self._resized(weights, weights.shape[-1], torch.float32)

    def settle(self, seq: Sequence) -> None:
        """After an event: lets go of what no later one looks at."""
        kv, slot = self._arena.kv, seq.slot
        if seq.vote_start == NEVER:
            for part in (kv.mass, kv.earlier_mass, kv.noise, kv.moments, kv.votes):
                part.pop(slot, None)
        if not seq.plan.drops_channels:
            kv.channels.pop(slot, None)
        if not self._keeps_positions(seq) and kv.positions.pop(slot, None) is not None and seq.plan.evict is None:
            seq.positions_known = 0  # lanes that nothing was evicted from: they may be noted again
        self._reader.fit(seq)
        size = self._bytes(seq, seq.rows_read)
        self._arena.ensure(-(-size // self._arena.layout.page_bytes) - self._arena.ballast(slot))
        self._arena.hold(slot, size)

    def _resized(self, side: Tensor | None, tokens: int, dtype: torch.dtype) -> Tensor:
        """`side` with room for `tokens` tokens a lane, zeros where it is new."""
        if side is not None and side.shape[-1] == room(tokens):
            return side
        resized = torch.zeros((*self._lanes, room(tokens)), dtype=dtype, device=self._device)
        if side is not None:
            known = min(side.shape[-1], room(tokens))
            resized[..., :known] = side[..., :known]
        return resized


def _notes(plan: Plan) -> bool:
    """Whether its sequences have anything beside their pages."""
    parts = (plan.evict, plan.read, plan.drops_between_layers)
    return plan.drops_channels or any(part is not None for part in parts)


def gumbel(seed: int, positions: Tensor, first_head: int = 0) -> Tensor:
    """Standard Gumbel noise of lane tokens: positions [layers, kv_heads, tokens] int64 -> float32."""
    # In float64, whose last bits are rounded away: the vectorised logarithm may differ in them from the plain one.
    layers = torch.arange(positions.shape[0], device=positions.device)
    even = uniform(seed, layers, positions, first_head).double() + 2.0**-25
    return -(-even.log()).log().float()
