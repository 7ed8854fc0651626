"""Prefix cache: pages of prompt prefixes, found by the tokens they hold.

A block is a page of tokens in every lane; its key is a hash chained over all blocks before it and a salt. So a page is
never in two blocks.
Blocks hold uncompressed pages only: they are published before a plan touches them, and a plan that compresses copies
what survives. The cache has one reference to each of its pages; a block that nobody else refers to is given back,
least recently used first, when pages run out.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

import numpy as np

from winnow.engine.pages import Ints, PageArena


class PrefixCache:
    """Blocks by key, least recently used first."""

    def __init__(self, arena: PageArena):
        self._arena = arena
        self.block_tokens = arena.layout.page_tokens
        self._blocks: OrderedDict[bytes, Ints] = OrderedDict()
        """key -> pages [layers, kv_heads]"""
        arena.reclaim = self.reclaim

    def __len__(self) -> int:
        return len(self._blocks)

    def keys(self, tokens: Ints, salt: str) -> list[bytes]:
        """Keys of the full blocks of `tokens`."""
        key = blake2b(salt.encode(), digest_size=16).digest()
        keys = []
        for start in range(0, len(tokens) - self.block_tokens + 1, self.block_tokens):
            key = blake2b(key + tokens[start : start + self.block_tokens].tobytes(), digest_size=16).digest()
            keys.append(key)
        return keys

    def match(self, keys: list[bytes]) -> Ints | None:
        """Pages [layers, kv_heads, n] of the longest known prefix of `keys`, marked as just used."""
        known = 0
        while known < len(keys) and keys[known] in self._blocks:
            known += 1
        if not known:
            return None
        # The last block first: a block is reclaimed before the one it continues.
        for key in reversed(keys[:known]):
            self._blocks.move_to_end(key)
        return np.stack([self._blocks[key] for key in keys[:known]], axis=-1)

    def publish(self, keys: list[bytes], slot: int) -> None:
        """Adds the leading blocks of a sequence whose lanes hold them whole and uncompressed, as just used."""
        table = self._arena.table[slot]
        for i in range(len(keys) - 1, -1, -1):  # as in `match`, a block is used after the one that continues it
            if keys[i] not in self._blocks:
                pages = table[:, :, i].copy()
                self._arena.share(pages.reshape(-1))
                self._blocks[keys[i]] = pages
            self._blocks.move_to_end(keys[i])

    def reclaim(self, pages: int) -> None:
        """Gives back blocks that only the cache refers to until `pages` are free, or none is left."""
        freed = 0
        for key in list(self._blocks):
            if freed >= pages:
                return
            block = self._blocks[key].reshape(-1)
            if self._arena.refs[block].min() == 1:
                freed += self._arena.release(block)
                del self._blocks[key]
            else:
                self._blocks.move_to_end(key)  # in use: not looked at again soon

    def drop(self, keys: list[bytes]) -> None:
        """Forgets these blocks and what they hold."""
        for key in keys:
            if (block := self._blocks.pop(key, None)) is not None:
                self._arena.release(block.reshape(-1))

    def forget(self, pages: Ints) -> None:
        """Drops the blocks that hold any of these pages, so that their holder may overwrite them."""
        marked = np.zeros(self._arena.total, bool)
        marked[pages] = True
        for key in [key for key, block in self._blocks.items() if marked[block].any()]:
            self._arena.release(self._blocks.pop(key).reshape(-1))

    def pages(self) -> Ints:
        """[n] all pages of all blocks."""
        if not self._blocks:
            return np.empty(0, np.int32)
        return np.concatenate([block.reshape(-1) for block in self._blocks.values()])

    def reclaimable(self) -> int:
        """Pages that only the cache refers to."""
        return int(np.count_nonzero(self._arena.refs[self.pages()] == 1))
