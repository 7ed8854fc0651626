"""What was made of pictures, remembered: of towers, features by picture; of policies, what is left by picture, policy
and text. So is all of a picture whose features, with what each layer of the tower has read, have no room. The least
recently used goes first.

A request's `cache_salt` has no part in the keys of what was made of pictures alone, as it has none in vLLM's encoder
cache: they are hashes of all pixels, so that an entry's being there tells who has the very picture that somebody sent
it, and nothing of what was said. What a policy left by the text of a message is known by the salt too, as prefixes are.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from winnow.engine.compression.vision.features import Features
from winnow.engine.compression.vision.policy import View


@dataclass(frozen=True)
class Left:
    """What a policy, if there is one, has left of a picture."""

    view: View
    total: int
    """Tokens that the picture has"""
    patches: Tensor | None = None
    """[P] int64, ascending: which of them stand for patches; None where a policy within the tower has left it"""

    @property
    def is_whole(self) -> bool:
        return len(self.view.tokens) == self.total

    @property
    def nbytes(self) -> int:
        parts = (self.view.tokens, self.view.embeddings, self.view.is_key, self.patches)
        return sum(part.nbytes for part in parts if part is not None)


class Album:
    def __init__(self, most_bytes: int):
        self.held_bytes = 0
        self._most_bytes = most_bytes
        self._entries: OrderedDict[bytes, tuple[Features | Left, int]] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def features(self, key: bytes) -> Features | None:
        found = self._find(key)
        return found if isinstance(found, Features) else None

    def left(self, key: bytes) -> Left | None:
        found = self._find(key)
        return found if isinstance(found, Left) else None

    def keep(self, key: bytes, made: Features | Left) -> None:
        """What is larger than all the room there is, is not kept."""
        if isinstance(made, Left):
            size = made.nbytes
        else:
            size = made.embeddings.nbytes + made.places.nbytes + made.signals.nbytes
        if key in self._entries:
            self.held_bytes -= self._entries.pop(key)[1]
        if size > self._most_bytes:
            return
        self._entries[key] = made, size
        self.held_bytes += size
        while self.held_bytes > self._most_bytes:
            self.held_bytes -= self._entries.popitem(last=False)[1][1]

    def _find(self, key: bytes) -> Features | Left | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]
