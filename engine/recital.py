"""Recitals: a document that has been read is read again, as if the model were repeating it (KVzip, arXiv:2505.23416).

    lanes during a part:    [ the document | lead-in, a part of it ]     the second half is dropped after it

The document is the whole prompt unless the request says where it ends. What the rows of a recital attend to in it is
what repeating it takes, whatever will be asked of it. They are read like those of a prompt, in chunks and among others,
behind the document's last position; they vote and leave nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from winnow.engine.errors import PromptTooLong

if TYPE_CHECKING:
    from torch import Tensor

    from winnow.engine.compression.evict_plan import Evict
    from winnow.engine.pages import Ints, PageArena
    from winnow.engine.sequence import Sequence as Seq

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
OVERLAP = 8
"""Tokens of the part before that tell the model where a later part starts"""
LEAST = 64
"""Shortest parts that a prompt is cut into"""


class Tokenizer(Protocol):
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str: ...

    @property
    def chat_template(self) -> str | None: ...


def lead_ins(tokenizer: Tokenizer) -> list[list[int]]:
    """What is said before the first part, before later ones, and where the model's turn begins: token ids of each."""
    turn = "\n"
    if tokenizer.chat_template is not None:
        said = "something to repeat"
        turn = tokenizer.apply_chat_template([{"role": "user", "content": said}]).rpartition(said)[2]
    return [tokenizer.encode(text, False) for text in (FIRST, LATER, turn)]


def parts_of(evict: Evict | None, document: Ints, said: Sequence[Sequence[int]], room: int) -> list[Ints]:
    """Token ids of each part: some tokens of the document behind their lead-in, no more than `room` in all. None where
    the plan's policy asks for no recital.

    Raises:
        PromptTooLong: the model's context leaves no room behind the document
    """
    if evict is None or not evict.recital_chunk:
        return []
    first, later, turn = (np.array(tokens, np.int32) for tokens in (*said, (), (), ())[:3])
    chunk = min(evict.recital_chunk, room - max(len(first), len(later) + OVERLAP) - len(turn))
    if chunk < min(LEAST, len(document)):
        path = "compression.kv.evict.policy"
        raise PromptTooLong(path, f"{path}: the prompt leaves no room in the model's context to be repeated behind it")
    parts = [np.concatenate((first, turn, document[:chunk]))]
    for start in range(chunk, len(document), chunk):
        lead = (later, document[max(0, start - OVERLAP) : start], turn)
        parts.append(np.concatenate((*lead, document[start : start + chunk])))
    return parts


@dataclass(eq=False)
class Recital:
    """How far a sequence has got with repeating its document."""

    parts: list[Ints]
    part: int = 0
    done: int = 0
    """Rows of the part that have been read"""
    logits: Tensor | None = None
    """[vocab] after the prompt's last token, if that is repeated too: the first token is sampled from it in the end"""

    @property
    def is_over(self) -> bool:
        return self.part == len(self.parts)

    @property
    def left(self) -> int:
        """Rows of the part that are still to be read."""
        return 0 if self.is_over else len(self.parts[self.part]) - self.done

    @property
    def growth(self) -> int:
        """Tokens that lanes will hold at most beside what they hold now."""
        return max(map(len, self.parts[self.part :]), default=self.done) - self.done

    def next_tokens(self, count: int) -> Ints:
        return self.parts[self.part][self.done : self.done + count]

    def skip(self) -> None:
        """For a sequence that begins where the recital of another has ended."""
        self.part, self.done = len(self.parts), 0

    def restart(self) -> None:
        self.part, self.done, self.logits = 0, 0, None


def end_parts(seqs: Sequence[Seq], arena: PageArena) -> None:
    """Takes the parts that have been read whole out of the lanes again."""
    ended = [(seq, seq.reciting) for seq in seqs if seq.reciting is not None and not seq.reciting.left]
    if not ended:
        return
    slots = np.array([seq.slot for seq, _ in ended], np.int32)
    arena.truncate(slots, np.array([recital.done for _, recital in ended], np.int32))
    for seq, recital in ended:
        seq.positions_known = min(seq.positions_known, seq.document_tokens)
        recital.part, recital.done = recital.part + 1, 0


def keep_for_later(seqs: Sequence[Seq], rows: NDArray[np.int64], logits: Tensor) -> Tensor:
    """The logits [R, vocab] of a step in which each sequence has its row: who begins a recital keeps a copy of its own,
    and who has ended it has them back."""
    changed = logits
    for row, seq in zip(rows.tolist(), seqs, strict=True):
        if seq.recital is None or seq.has_question or not seq.is_running or seq.computed != seq.prompt_tokens:
            continue
        if seq.recital.logits is None:
            seq.recital.logits = logits[row].clone()
        elif seq.recital.is_over:
            changed = logits.clone() if changed is logits else changed
            changed[row] = seq.recital.logits
    return changed
