"""Conversations about mosaics as tensors, written as the chat template writes them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from winnow.engine.models.mosaic.checkpoint import (
    ASSISTANT,
    BEGIN,
    END,
    IMAGE,
    PAD,
    PATCHES,
    SYSTEM,
    UNKNOWN,
    USER,
    VOCABULARY,
    word_ids,
)
from winnow.engine.models.mosaic.questions import Asker, Question
from winnow.engine.models.mosaic.scenes import KINDS, PLACES, Bank, Mosaic

_NO_TARGET = -100
_WORDS = range(UNKNOWN + 5, len(VOCABULARY))
_SYSTEM_PART, _TEXT_FIRST_PART, _LONGEST_SYSTEM = 0.1, 0.1, 12


class Batch(NamedTuple):
    pixels: Tensor
    """[mosaics, 96, 96, 3] uint8."""
    tokens: Tensor
    """[mosaics, longest] int64, padded behind the end."""
    targets: Tensor
    """[mosaics, longest] int64: the next token where it belongs to an answer, else -100."""
    patches: Tensor
    """[mosaics, 144] int64: 0 where a patch shows background, else 1 + kind."""
    places: Tensor
    """[mosaics, 144] int64: which of all grids' cells a patch is in."""
    presence: Tensor
    """[mosaics, kinds] f32: 1 where the mosaic shows the kind."""
    looks: Tensor
    """[mosaics, turns, 144] bool: the patches that show the answer of each turn; none where no cell does."""


def conversations(bank: Bank, seed: Sequence[int], mosaics: int, turns: int, varied: bool) -> Batch:
    """As many new mosaics, each with as many questions.

    Args:
        varied: for training: some conversations begin with a system message (of words that mean nothing here), some
            name the question before the image, and the images' brightness differs.
    """
    rng, choices = np.random.default_rng(seed), random.Random(str(list(seed)))
    scenes = [bank.draw(rng) for _ in range(mosaics)]
    asker = Asker(choices)
    asked = [[asker.ask(scene) for _ in range(turns)] for scene in scenes]
    written = [write_ids(questions, choices if varied else None) for questions in asked]
    pixels = bank.render(scenes)
    if varied:
        brightness = rng.uniform(0.85, 1.1, (mosaics, 1, 1, 1)).astype(np.float32)
        noise = rng.normal(0, 3, (mosaics, 96, 96, 1)).astype(np.float32)
        pixels = np.clip(pixels * brightness + noise, 0, 255).astype(np.uint8)
    presence = torch.zeros(mosaics, KINDS)
    for row, scene in enumerate(scenes):
        presence[row, [kind for kind in scene.cells if kind >= 0]] = 1.0
    tokens, targets = padded(written)
    patches, places = (torch.from_numpy(of(scenes)) for of in (bank.patch_kinds, bank.patch_places))
    looks = torch.stack([_looks(*each) for each in zip(scenes, asked, patches, places, strict=True)])
    return Batch(torch.from_numpy(pixels), tokens, targets, patches, places, presence, looks)


def _looks(scene: Mosaic, asked: Sequence[Question], patches: Tensor, places: Tensor) -> Tensor:
    """[turns, 144]: of a cell the patches that its shape covers, or all where it is empty."""
    cells = torch.zeros(len(asked), PLACES, dtype=torch.bool)
    first = int(places.min())
    for turn, question in enumerate(asked):
        cells[turn, [first + place for place in question.cells]] = True
    empty = torch.zeros(PLACES, dtype=torch.bool)
    empty[first : first + len(scene.cells)] = torch.tensor(scene.cells) < 0
    return cells[:, places] & ((patches > 0) | empty[places])


def write_ids(questions: Sequence[Question], choices: random.Random | None = None) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, and for each the next token where that belongs to an answer."""
    tokens, answered = [BEGIN], [False]
    if choices and choices.random() < _SYSTEM_PART:
        length = choices.randint(1, _LONGEST_SYSTEM)
        tokens += [SYSTEM, *(choices.choice(_WORDS) if choices.random() < 0.5 else UNKNOWN for _ in range(length))]
    image = [IMAGE] * PATCHES
    text_first = choices is not None and choices.random() < _TEXT_FIRST_PART
    for turn, question in enumerate(questions):
        said = word_ids(question.text)
        if turn == 0:
            said = said + image if text_first else image + said
        answer = [*word_ids(question.answer), END]
        tokens += [USER, *said, ASSISTANT, *answer]
        answered += [False] * (len(tokens) - len(answered) - len(answer)) + [True] * len(answer)
    following = zip(tokens[1:], answered[1:], strict=True)
    return tokens, [token if is_answer else _NO_TARGET for token, is_answer in following] + [_NO_TARGET]


def padded(written: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Tokens and targets of several conversations, [conversations, longest] each."""
    longest = max(len(tokens) for tokens, _ in written)
    both = torch.tensor(
        [
            [tokens + [PAD] * (longest - len(tokens)), targets + [_NO_TARGET] * (longest - len(targets))]
            for tokens, targets in written
        ]
    )
    return both[:, 0], both[:, 1]
