"""Carrying out plans: score, keep, compact, seal. The only code that moves tokens between pages.

A lane before:  [ shared | sealed | open ]      kept tokens, some of which the plan no longer wants
A lane after:   [ shared | sealed | open ]      leading pages that do not change stay, the rest is rewritten

Survivors go to the lane's own pages where nobody else refers to them, and to fresh ones where somebody does: a shared
page is never written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from winnow.engine.calibration.store import NO_PROFILES, Profile
from winnow.engine.compression.change import Change, Turn, from_place
from winnow.engine.compression.channels import choose_channels
from winnow.engine.compression.destination import destination
from winnow.engine.compression.gathered import gathered
from winnow.engine.compression.layer_choice import rows_left, truncated
from winnow.engine.compression.mixer import by_position, mix_formats
from winnow.engine.compression.plan import Evict
from winnow.engine.compression.policy import EvictionPolicy, LaneView, MergesLayers, SetsBudgets, StagedPolicy
from winnow.engine.compression.registry import eviction_policy
from winnow.engine.compression.select import keep_mask, keep_sets, layer_budgets, packed
from winnow.engine.compression.side_state import SideState
from winnow.engine.compression.signals import Signal
from winnow.engine.compression.timeline import NEVER
from winnow.engine.models.config import ModelConfig
from winnow.engine.pages import Ints, PageArena
from winnow.engine.prefix_cache import PrefixCache
from winnow.engine.sequence import Sequence
from winnow.kernels.dispatch import Backend
from winnow.kernels.host import to_device
from winnow.kernels.layout import PageFormat

READS = {Signal.KEYS, Signal.VALUES}


@dataclass
class Freed:
    """What compression gave back since the engine started."""

    tokens: int = 0
    """Lane tokens evicted"""
    bytes: int = 0


class Compressor:
    """Applies the plans of sequences that have reached an event of their timeline."""

    def __init__(
        self,
        arena: PageArena,
        cache: PrefixCache | None,
        side: SideState,
        ops: Backend,
        config: ModelConfig,
        profiles: Mapping[str, Profile] = NO_PROFILES,
    ):
        self._arena = arena
        self._cache = cache
        self._side = side
        self._ops = ops
        self._q_per_kv = config.heads // config.kv_heads
        first = arena.ranks.rank * config.kv_heads
        self._own_heads = slice(first, first + config.kv_heads)
        self._device = arena.kv.device
        self._inv_freq = to_device(torch.tensor(config.inv_freq, dtype=torch.float32), self._device)
        self._rope_factor = config.rope_factor
        self._profiles = {
            method: {name: to_device(part, self._device) for name, part in profile.items()}
            for method, profile in profiles.items()
        }
        self.freed = Freed()

    # Events ----------------------------------------------------------------------------------------------------------

    def apply(self, seq: Sequence) -> None:
        """Compresses a sequence that stands at an event, and lets others begin with what is left of a document.
        OutOfPages leaves it untouched, to be tried again."""
        distils = seq.distilled is not None and seq.computed == seq.prompt_tokens
        evicts = not distils and seq.timeline.evicts_at(seq.computed)
        self.compress(seq, seq.plan.evict if evicts else None, distils)
        if seq.document_key and seq.computed == seq.document_tokens and self._cache is not None:
            self._cache.keep_document(seq.document_key, seq.slot, seq.positions_known, seq.turned_back)

    def compress(self, seq: Sequence, evict: Evict | None, distils: bool = False) -> None:
        """Evicts or distils, if so told, and seals. OutOfPages leaves the sequence untouched."""
        slot, seen, arena = seq.slot, seq.computed, self._arena
        kept = arena.kept[slot]
        keep: Tensor | None = None
        change: Change | None = None
        if seq.plan.drops_channels and slot not in arena.kv.channels:
            arena.kv.channels[slot] = choose_channels(self._ops, arena.kv, slot)
            arena.kv.energy.pop(slot)
        if seq.plan.goes_by_position and (seq.plan.evict is not None or seq.stages is not None):
            self._side.note_positions(seq, seen)
        count = kept
        chosen: tuple[Tensor, Tensor] | None = None
        if distils:
            assert seq.distilled is not None
            keep, count = self._distil(seq, seq.distilled)
        elif evict is not None:
            self._side.note_positions(seq, seen)
            index, counts, scores = self._choose(seq, evict)
            if seq.plan.mix is not None:
                chosen = index, scores
            elif (count := counts.cpu().numpy().astype(np.int32)) is not None and (count < kept).any():
                keep, change = index, self._change(seq, evict, index, counts, scores)
        before = len(arena.held(slot))
        given_up = int(kept.flat[0]) - int(count.flat[0])
        if seq.plan.mix is not None:
            self._side.note_positions(seq, seen)
            moved = mix_formats(arena, self._cache, self._ops, seq, seq.plan.mix, chosen)
            self._side.carry(seq, moved, arena.kept[slot])
        else:
            self._rewrite(seq, keep, count, change, seq.plan.residual)
        if change is not None and change.turn is not None:  # all lanes gave up as many
            seq.turned_back += given_up
        # A lane may take more pages than before, where what is left of a sealed page no longer fills one.
        self.freed.bytes += max(0, before - len(arena.held(slot))) * arena.layout.page_bytes
        seq.vote_start = seq.timeline.vote_start(seen)
        self._side.settle(seq)

    def _choose(self, seq: Sequence, evict: Evict) -> tuple[Tensor, Tensor, Tensor]:
        """Keep sets of all lanes, index [layers, kv_heads, most] int64 and count [layers, kv_heads] int64, and the
        policy's scores [layers, kv_heads, tokens]."""
        seen = seq.computed
        policy = eviction_policy(evict.policy)
        layers = self._arena.kv.table.shape[1]
        budget = evict.budget_tokens(seen)
        recent = evict.recent_tokens(budget)
        protected = min(budget, recent + evict.sinks)
        shares = layer_budgets(budget, layers, evict.layer_budget, seen, protected=protected)
        budgets = to_device(torch.tensor(shares), self._device)
        votes = max(0, seen - seq.timeline.vote_start(seen - 1))
        order = None if seq.plan.mix is None else by_position(self._arena, seq.slot)
        chosen = []
        for block, reads in _blocks(policy, evict, layers):
            view = self._view(seq, evict, block, seen, votes, reads)
            if order is not None:
                view = view.taken(order[block, :, : view.positions.shape[-1]])
            view = gathered(view, self._arena.ranks)
            scores = policy.score(view, evict)
            lanes = policy.lane_budgets(view, evict) if isinstance(policy, SetsBudgets) else budgets[block]
            keep = keep_mask(scores, view.kept, lanes, evict.sinks, recent, evict.head_budget)
            chosen.append((keep, scores))
        masks, all_scores = zip(*chosen, strict=True)
        own, tokens = self._own_heads, int(self._arena.kept[seq.slot].max())
        return *packed(_stacked(masks, False)[:, own]), _stacked(all_scores, 0.0)[:, own, :tokens]

    def _newest_mass(self, slot: int, layers: slice, tokens: int) -> Tensor | None:
        """What the newest queries gave; None where they are not heard apart."""
        mass, earlier = self._arena.kv.mass.get(slot), self._arena.kv.earlier_mass.get(slot)
        if mass is None or earlier is None:
            return None
        before = earlier[layers, :, :tokens]
        return mass[layers, :, :tokens] - pad(before, (0, tokens - before.shape[-1]))

    def _change(self, seq: Sequence, evict: Evict, keep: Tensor, count: Tensor, scores: Tensor) -> Change | None:
        """How the survivors of an eviction change; None where they only move."""
        if evict.merge is None and not evict.is_compact:
            return None
        kv, slot = self._arena.kv, seq.slot
        return Change(
            merge=evict.merge,
            turn=Turn.to_places(keep[0, 0], self._inv_freq) if evict.is_compact else None,
            kept=to_device(kv.kept[slot].long(), self._device),
            keep=keep,
            count=count,
            scores=scores,
            log_weights=kv.log_weights.get(slot),
            sinks=evict.sinks,
            recent=evict.recent_tokens(evict.budget_tokens(seq.computed)),
        )

    def _view(self, seq: Sequence, evict: Evict, block: slice, seen: int, votes: int, reads: bool) -> LaneView:
        """What the plan's policy is shown of some layers, whose positions are noted already; `reads` tokens or not."""
        slot, kv, signals = seq.slot, self._arena.kv, evict.signals
        tokens = int(kv.kept[slot, block].max())
        kept = to_device(kv.kept[slot, block].long(), self._device)
        held = torch.arange(tokens, device=self._device) < kept[..., None]
        read = [self._ops.read_lanes(kv, slot, layer) for layer in range(block.start, block.stop) if reads]
        keys, values = map(_layers_of, zip(*read, strict=True)) if reads else (None, None)
        return LaneView(
            positions=kv.positions[slot][block, :, :tokens].long().masked_fill(~held, -1),
            kept=kept,
            layers=torch.arange(block.start, block.stop, device=self._device),
            keys=keys if Signal.KEYS in signals else None,
            values=values if Signal.VALUES in signals else None,
            mass=kv.mass[slot][block, :, :tokens] if Signal.ATTENTION in signals else None,
            newest_mass=self._newest_mass(slot, block, tokens),
            newest_votes=max(0, seen - seq.timeline.newest_start(seen - 1)),
            queries=self._side.moments(slot, block, votes) if Signal.QUERIES in signals else None,
            votes=votes,
            q_per_kv=self._q_per_kv,
            seen=seen,
            seed=seq.plan_seed,
            sinks=evict.sinks,
            depth=kv.table.shape[1],
            inv_freq=self._inv_freq,
            rope_factor=self._rope_factor,
            ahead=seq.ahead,
            profile=self._profiles.get(evict.policy),
        )

    # Prompts that are read in stages ---------------------------------------------------------------------------------

    def end_stage(self, seq: Sequence) -> None:
        """A stage has read all its rows: chooses those of the next one, or ends the reading of the prompt. OutOfPages
        leaves the sequence untouched."""
        staging, vision, kv, slot = seq.staging, seq.plan.drops_between_layers, self._arena.kv, seq.slot
        assert staging is not None
        layers, rows = slice(staging.layers.start, staging.layers.stop), len(staging.rows)
        if slot in kv.positions:
            kv.positions[slot][layers, :, :rows] = to_device(torch.from_numpy(staging.rows), self._device)
        if staging.is_last:
            if vision is not None and vision.truncates:
                # Nothing is sealed here: what the plan does at the end of the prompt follows.
                keep, count = truncated(staging, self._arena.kept[slot])
                self._rewrite(seq, to_device(keep, self._device), count, None, residual=seq.prompt_tokens)
            seq.computed = seq.positions_known = seq.prompt_tokens
            seq.distilled, seq.staging = (staging.rows if vision is None else None), None
            return
        if vision is None:
            staging.next(self._distilled(seq, layers.stop - 1))
            seq.vote_start = NEVER
        else:
            asked = len(staging.stages.raters) > 0
            keys = self._ops.read_lanes(kv, slot, layers.stop - 1)[0] if asked else None
            staging.next(rows_left(vision, staging, keys))
        self._side.settle(seq)

    def _distilled(self, seq: Sequence, layer: int) -> Ints:
        """The rows of the prompt that a policy of `kv.evict` chooses by what it is shown of a layer."""
        evict = seq.plan.evict
        assert evict is not None
        policy = eviction_policy(evict.policy)
        block, reads = slice(layer, layer + 1), not policy.signals.isdisjoint(READS)
        view = gathered(self._view(seq, evict, block, seq.prompt_tokens, votes=1, reads=reads), self._arena.ranks)
        budget = evict.budget_tokens(seq.prompt_tokens)
        recent = evict.recent_tokens(budget)
        budgets = torch.full((1,), budget, device=self._device)
        index, _ = keep_sets(policy.score(view, evict), view.kept, budgets, evict.sinks, recent)
        chosen: Ints = index[0, 0].int().cpu().numpy()  # in all lanes the same
        return chosen

    def _distil(self, seq: Sequence, chosen: Ints) -> tuple[Tensor | None, Ints]:
        """Keep sets and counts of lanes whose upper layers hold the chosen positions only, and lower ones all."""
        kept, evict = self._arena.kept[seq.slot], seq.plan.evict
        assert evict is not None and seq.stages is not None
        policy = eviction_policy(evict.policy)
        if not isinstance(policy, StagedPolicy) or not policy.truncates(evict):
            return None, kept
        keep = torch.arange(len(chosen), device=self._device).expand(*kept.shape, len(chosen)).clone()
        keep[: seq.stages.bounds[1]] = to_device(torch.from_numpy(chosen).long(), self._device)
        return keep, np.full_like(kept, len(chosen))

    def _rewrite(self, seq: Sequence, keep: Tensor | None, count: Ints, change: Change | None, residual: int) -> None:
        """Moves the kept tokens (None: all) to where the plan wants them, and seals all but the newest `residual`."""
        arena, slot, fmt = self._arena, seq.slot, seq.timeline.fmt
        packed, open_ = arena.layout.capacity(fmt), arena.layout.page_tokens
        is_sealing, was_fmt = fmt is not arena.layout.compute, PageFormat(arena.formats[slot])
        was_packed = arena.layout.capacity(was_fmt)
        kept, old_sealed = arena.kept[slot].copy(), arena.sealed[slot].copy()
        evicted = int((kept - count).sum())

        # Leading tokens that stay where they are, and survivors in sealed pages.
        if keep is None:
            same, in_sealed = count, np.minimum(count, old_sealed * was_packed)
        else:
            in_place = keep == torch.arange(keep.shape[-1], device=self._device)
            was_sealed = to_device(torch.from_numpy(old_sealed * was_packed), self._device)[..., None]
            runs = in_place.int().cumprod(-1).sum(-1), ((keep >= 0) & (keep < was_sealed)).sum(-1)
            same, in_sealed = torch.stack(runs).int().cpu().numpy()
            if change is not None:  # any token of a lane that gives some up may change
                same[count < kept] = 0
        if is_sealing:
            # Pages of another format are all written anew.
            start = np.minimum(same // packed, old_sealed) if fmt is was_fmt else np.zeros_like(old_sealed)
            # What was sealed once is not widened again, but for the rest that no longer fills a page.
            wanted = np.maximum((count - residual).clip(0) // packed, in_sealed // packed)
            sealed = np.maximum(start, wanted).astype(np.int32)
            columns = sealed + -(-(count - sealed * packed) // open_)
        else:
            start = same // open_
            sealed = start  # to the kernel these are pages that stay; the table knows no sealed ones
            columns = -(-count // open_)
        start = start.astype(np.int32)
        stays = fmt is was_fmt or not old_sealed.any()
        if keep is None and (not is_sealing or (stays and np.array_equal(sealed, old_sealed))):
            arena.formats[slot] = fmt
            arena.ensure(0)  # lanes at other ranks may need pages
            self._side.carry(seq, None, count)
            return

        table, fresh = destination(arena, self._cache, slot, start, columns)
        rest = torch.from_numpy(np.ascontiguousarray(count - start * packed, np.int32))
        first, new_table = torch.from_numpy(start), torch.from_numpy(table)
        new_sealed = torch.from_numpy(np.ascontiguousarray(sealed, np.int32))
        log_weights: Tensor | None = None
        try:
            if change is None:
                moves_on = None if keep is None else _from(keep, start * packed)
                self._ops.repack(arena.kv, slot, moves_on, rest, first, new_table, new_sealed, fmt)
            else:
                log_weights = self._write_changed(slot, change, rest, first, new_table, new_sealed, fmt)
        except Exception:  # the sequence is lost, its new pages need not be
            arena.release(fresh)
            raise
        arena.formats[slot] = fmt
        arena.replace(slot, table, columns, count, sealed if is_sealing else np.zeros_like(sealed))
        self.freed.tokens += evicted
        self._side.carry(seq, keep, count)
        if log_weights is not None:
            self._side.put_log_weights(slot, log_weights)

    def _write_changed(
        self,
        slot: int,
        change: Change,
        counts: Tensor,
        start: Tensor,
        table: Tensor,
        sealed: Tensor,
        fmt: PageFormat,
    ) -> Tensor | None:
        """`repack` of survivors that change on the way; returns their log weights [layers, kv_heads, most], if any."""
        kv, weights = self._arena.kv, []
        first, held = to_device(start.long() * kv.layout.capacity(fmt), self._device), change.keep >= 0
        for layer in range(len(change.keep)):
            # All of a layer is read before any of it is written: its new pages may be its old ones.
            stay = change.survivors(self._ops, layer, *self._ops.read_lanes(kv, slot, layer))
            moved = from_place(stay, first[layer], int(counts[layer].max()))
            to = counts[layer], start[layer], table[layer], sealed[layer]
            positions = None
            if fmt.is_opened:
                positions = change.positions(layer, kv.positions[slot][layer], first[layer], moved[0].shape[1])
            self._ops.write_lanes(kv, slot, layer, *moved, *to, fmt, positions)
            if stay.log_weights is not None:
                weights.append(stay.log_weights.masked_fill(~held[layer], 0.0))
        return torch.stack(weights) if weights else None


def _blocks(policy: EvictionPolicy, evict: Evict, layers: int) -> list[tuple[slice, bool]]:
    """The layers that a policy is shown at a time, and whether their tokens are read: of as few layers as it must be,
    since those of all of them together may be larger than the arena."""
    if isinstance(policy, MergesLayers):
        lower = policy.layer_merge(evict, layers).lower_layers(layers)
        blocks = [(slice(0, lower.start), False), *((slice(layer, layer + 2), True) for layer in lower)]
        blocks.append((slice(lower[-1] + 2, layers), False))
        return [(block, reads) for block, reads in blocks if block.start < block.stop]
    if policy.signals.isdisjoint(READS):
        return [(slice(0, layers), False)]
    return [(slice(layer, layer + 1), True) for layer in range(layers)]


def _layers_of(parts: tuple[Tensor, ...]) -> Tensor:
    """Tensors [...] of some layers as one, [layers, ...]; that of a single one is not copied."""
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def _stacked(parts: Iterable[Tensor], padding: float) -> Tensor:
    """Tensors [l, kv_heads, n] of several blocks of layers as one, padded to the longest."""
    parts = list(parts)
    most = max(part.shape[-1] for part in parts)
    return torch.cat([pad(part, (0, most - part.shape[-1]), value=padding) for part in parts])


def _from(keep: Tensor, first: Ints) -> Tensor:
    """Drops the leading `first` [layers, kv_heads] entries of each row of `keep`, padding with -1."""
    index = to_device(torch.from_numpy(first.astype(np.int64)), keep.device)[..., None]
    index = index + torch.arange(keep.shape[-1], device=keep.device)
    inside = index < keep.shape[-1]
    return keep.gather(2, index.clamp_max(keep.shape[-1] - 1)).masked_fill(~inside, -1).to(torch.int32)
