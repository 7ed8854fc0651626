"""Prefix cache: pages of prompt prefixes, found by the tokens they hold.

A block is a page of tokens in every lane, uncompressed; its key is a hash chained over all blocks before it and a salt.
Where it has rows of pictures, or rows that RoPE has elsewhere because of them, these are in the hash (`Sight.marks`).
Blocks are published before a plan touches them, and a plan that compresses copies what survives.

A document is a prefix that a query-agnostic plan has compressed: all that the lanes held when that was done. Its key is
a hash of its tokens, the plan and the salt. A sequence that finds it begins behind it, with the bits that it would have
come to itself.

The cache has a reference to each page of an entry. Entries are given back, least recently used first, when pages run
out; those in which every page is somebody else's too would free none, and stay.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from winnow.engine.lanes import Lanes
from winnow.engine.pages import Ints, OutOfPages, PageArena
from winnow.engine.picture_rows import Sight


@dataclass(frozen=True)
class Block:
    lanes: Ints
    """[layers, kv_heads] its page in each lane"""

    @property
    def pages(self) -> Ints:
        return self.lanes.reshape(-1)


@dataclass(frozen=True)
class Document:
    lanes: Lanes
    positions_known: int
    turned_back: int
    """As in the sequence that compressed it"""

    @property
    def pages(self) -> Ints:
        return self.lanes.pages


class PrefixCache:
    """Blocks and documents by key, least recently used first."""

    def __init__(self, arena: PageArena):
        self._arena = arena
        self.block_tokens = arena.layout.page_tokens
        self._entries: OrderedDict[bytes, Block | Document] = OrderedDict()
        self._refs: Ints = np.zeros(arena.total, np.int32)
        """How many entries have each page"""
        arena.reclaim = self.reclaim

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    # Blocks ----------------------------------------------------------------------------------------------------------

    def keys(self, tokens: Ints, salt: str, sight: Sight | None = None) -> list[bytes]:
        """Keys of the full blocks of `tokens`, the first of a text that shows these pictures."""
        marks = None if sight is None else sight.marks_of(len(tokens))
        key = blake2b(salt.encode(), digest_size=16).digest()
        keys = []
        for start in range(0, len(tokens) - self.block_tokens + 1, self.block_tokens):
            block = slice(start, start + self.block_tokens)
            said = tokens[block].tobytes()
            if marks is not None and marks[block].any():  # text before the first picture is known to all
                said += marks[block].tobytes()
            key = blake2b(key + said, digest_size=16).digest()
            keys.append(key)
        return keys

    def match(self, keys: list[bytes]) -> Ints | None:
        """Pages [layers, kv_heads, n] of the longest known prefix of `keys`, marked as just used."""
        blocks = []
        for key in keys:
            if not isinstance(block := self._entries.get(key), Block):
                break
            blocks.append(block.lanes)
        if not blocks:
            return None
        # The last block first: a block is reclaimed before the one it continues.
        for key in reversed(keys[: len(blocks)]):
            self._entries.move_to_end(key)
        return np.stack(blocks, axis=-1)

    def publish(self, keys: list[bytes], slot: int) -> None:
        """Adds the leading blocks of a sequence whose lanes hold them whole and uncompressed, as just used."""
        table = self._arena.table[slot]
        for i in range(len(keys) - 1, -1, -1):  # as in `match`, a block is used after the one that continues it
            if keys[i] not in self._entries:
                block = Block(table[:, :, i].copy())
                self._arena.share(block.pages)
                self._add(keys[i], block)
            self._entries.move_to_end(keys[i])

    # Documents -------------------------------------------------------------------------------------------------------

    @staticmethod
    def document_key(tokens: Ints, plan: str, salt: str, parts: Iterable[Ints]) -> bytes:
        """Key of a document that a plan has compressed.

        Args:
            plan: its fingerprint
            parts: what the model has read behind the document to compress it (see recital.py)
        """
        digest = blake2b(digest_size=16, person=b"document")
        for part in (salt.encode(), plan.encode(), tokens.tobytes(), *(part.tobytes() for part in parts)):
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.digest()

    def document(self, key: bytes) -> Document | None:
        """The document, marked as just used; None if it is not here."""
        found = self._entries.get(key)
        if not isinstance(found, Document):
            return None
        self._entries.move_to_end(key)
        return found

    def keep_document(self, key: bytes, slot: int, positions_known: int, turned_back: int) -> None:
        """Adds what a sequence holds, which has compressed its document just now. Where there are no pages for a copy
        of its side state, the document is not kept."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return
        try:
            lanes = self._arena.note(slot)
        except OutOfPages:
            return
        self._add(key, Document(lanes, positions_known, turned_back))

    @property
    def documents(self) -> list[Document]:
        return [entry for entry in self._entries.values() if isinstance(entry, Document)]

    # Both ------------------------------------------------------------------------------------------------------------

    def _add(self, key: bytes, entry: Block | Document) -> None:
        """The arena counts the entry's references already."""
        self._entries[key] = entry
        self._refs[entry.pages] += 1

    def _remove(self, key: bytes) -> int:
        """Returns how many pages became free."""
        pages = self._entries.pop(key).pages
        self._refs[pages] -= 1
        return self._arena.release(pages)

    def reclaim(self, pages: int) -> None:
        """Gives back entries with pages that only the cache refers to, until `pages` are free or none is left. Where
        ranks share a model, of which each says what it needs, until they are at all; what one can do without goes."""
        freed, ranks = 0, self._arena.ranks
        for key in list(self._entries):
            if ranks.most(pages - freed) <= 0:
                return
            held = self._entries[key].pages
            if ranks.most(int((self._arena.refs[held] == self._refs[held]).any())):
                freed += self._remove(key)
            else:
                self._entries.move_to_end(key)  # in use: not looked at again soon

    def drop(self, keys: Iterable[bytes]) -> None:
        """Forgets these entries and what they hold."""
        for key in keys:
            if key in self._entries:
                self._remove(key)

    def forget(self, pages: Ints) -> None:
        """Drops the entries that hold any of these pages, so that their holder may overwrite them, at all ranks those
        that hold such pages at one."""
        marked = np.zeros(self._arena.total, bool)
        marked[pages] = True
        is_marked = np.array([marked[entry.pages].any() for entry in self._entries.values()], bool)
        keys = zip(list(self._entries), self._arena.ranks.any(is_marked).tolist(), strict=True)
        self.drop(key for key, is_held in keys if is_held)

    def pages(self) -> Ints:
        """[n] all pages of all entries, those of several as often."""
        if not self._entries:
            return np.empty(0, np.int32)
        return np.concatenate([entry.pages for entry in self._entries.values()])

    def reclaimable(self) -> int:
        """Pages that only the cache refers to."""
        return int(np.count_nonzero((self._refs > 0) & (self._arena.refs == self._refs)))

    def check_integrity(self) -> None:
        """AssertionError if pages are counted wrongly, or side state has none that stand for it."""
        counted = np.bincount(self.pages(), minlength=len(self._refs))
        assert np.array_equal(counted, self._refs), "the cache counts its pages wrongly"
        for document in self.documents:
            lanes, room = document.lanes, len(document.lanes.ballast) * self._arena.layout.page_bytes
            assert lanes.side_bytes <= room, "no page stands for what a document notes"
