"""Token recycling: the model's own guesses, kept for the next time (Luo et al., 2024, arXiv:2408.08696).

    after[t] = the likeliest token when the model last read t          draft = after[last], after[after[last]], ...

Rows that verify wrong guesses teach as well: that is what is recycled.

Where we depart: the paper keeps eight candidates of each token and verifies a tree of them in one pass. In a tree the
ancestors of a token are not the tokens before it in the lane; their attention would be summed in another order than
without speculation, and answers would no longer be the same bits. So the draft is a chain, which the likeliest
candidate suffices for.

Memory of what was read is shared by requests of one cache salt, as cached prefixes are: it shows in nothing but speed.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from winnow.engine.speculation.method import MethodParams, Tools

if TYPE_CHECKING:
    from winnow.engine.pages import Ints
    from winnow.engine.sequence import Sequence

SALTS = 16
"""Memories that are kept; the one unused for longest is forgotten first"""
UNKNOWN = -1


class TokenRecycling:
    """Guess what the model itself held for likeliest when it last read the same token: for any text."""

    learns = True
    needs_draft = False

    class Params(MethodParams):
        pass

    def __init__(self, tools: Tools) -> None:
        self._vocab_size = tools.table.vocab_size
        self._memories: OrderedDict[str, Ints] = OrderedDict()
        """salt -> [vocab] the token after each"""

    def propose(self, seqs: list[Sequence], most: list[int]) -> list[Ints]:
        return [self._chain(seq, count) for seq, count in zip(seqs, most, strict=True)]

    def learn(self, seq: Sequence, read: Ints, likeliest: Ints) -> None:
        self._memory(seq.salt)[read] = likeliest  # of equal tokens the last one's

    def _chain(self, seq: Sequence, count: int) -> Ints:
        after, token = self._memory(seq.salt), int(seq.tokens[seq.length - 1])
        chain: list[int] = []
        while len(chain) < count and (token := int(after[token])) != UNKNOWN:
            chain.append(token)
        return np.array(chain, np.int32)

    def _memory(self, salt: str) -> Ints:
        if salt not in self._memories:
            if len(self._memories) == SALTS:
                self._memories.popitem(last=False)
            self._memories[salt] = np.full(self._vocab_size, UNKNOWN, np.int32)
        self._memories.move_to_end(salt)
        return self._memories[salt]
