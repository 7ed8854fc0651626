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
from winnow.engine.models.mosaic.questions import KIND_NAMES, Asker, Question
from winnow.engine.models.mosaic.scenes import KINDS, PLACES, SIDE, Bank

_NO_TARGET = -100
_WORDS = range(UNKNOWN + 5, len(VOCABULARY))
_SYSTEM_PART, _TEXT_FIRST_PART, _LONGEST_SYSTEM = 0.1, 0.1, 12
_TURNS = (1, 1, 1, 1, 2, 6)
"""Of a conversation; those with the question before the image have the most."""
_ASKED = (*KIND_NAMES, "count shapes", "count colours", "where", "presence")
"""What is looked for among all cells is learnt last, and asked twice as often as the rest."""


class Batch(NamedTuple):
    pixels: Tensor
    """[mosaics, 96, 96, 3] uint8."""
    tokens: Tensor
    """[mosaics, longest] int64, padded behind the end."""
    targets: Tensor
    """[mosaics, longest] int64: the next token where it belongs to an answer, else -100."""
    branches: Tensor
    """[mosaics, longest] int64: 0 for what all conversations about a mosaic begin with, else which of them it is."""
    positions: Tensor
    """[mosaics, longest] int64: in the conversation."""
    patches: Tensor
    """[mosaics, 144] int64: 0 where a patch shows background, else 1 + kind."""
    cells: Tensor
    """[mosaics, 144] int64: 0 where a patch is in an empty cell, else 1 + the cell's kind."""
    places: Tensor
    """[mosaics, 144] int64: which of all grids' cells a patch is in."""
    presence: Tensor
    """[mosaics, kinds] f32: 1 where the mosaic shows the kind."""
    looks: Tensor
    """[mosaics, questions, 144] bool: the patches in cells that show a question's answer; none where no cell does."""


def conversations(bank: Bank, seed: Sequence[int], mosaics: int, questions: int) -> Batch:
    """As many new mosaics, and as many questions about each, in several conversations.

    Most conversations about a mosaic begin alike, with its image: they are branches of one sequence, each of which sees
    only itself and their beginning, so that an image is read once for all of them. Some begin with a system message (of
    words that mean nothing here), some name the question before the image, and the images' brightness differs.
    """
    rng, choices = np.random.default_rng(seed), random.Random(str(list(seed)))
    scenes = [bank.draw(rng) for _ in range(mosaics)]
    asker = Asker(choices, _ASKED)
    asked = [[asker.ask(scene) for _ in range(questions)] for scene in scenes]
    written = [_branched(each, choices) for each in asked]
    brightness = rng.uniform(0.85, 1.1, (mosaics, 1, 1, 1)).astype(np.float32)
    noise = rng.normal(0, 3, (mosaics, SIDE, SIDE, 1)).astype(np.float32)
    pixels = np.clip(bank.render(scenes) * brightness + noise, 0, 255).astype(np.uint8)
    presence = torch.zeros(mosaics, KINDS)
    for row, scene in enumerate(scenes):
        presence[row, [kind for kind in scene.cells if kind >= 0]] = 1.0
    tokens, targets, branches, positions = (
        _padded([each[part] for each in written], filler) for part, filler in enumerate((PAD, _NO_TARGET, -1, 0))
    )
    patches, places = (torch.from_numpy(of(scenes)) for of in (bank.patch_kinds, bank.patch_places))
    within = places - places.min(1, keepdim=True).values
    cells = torch.stack([torch.tensor(scene.cells)[row] + 1 for scene, row in zip(scenes, within, strict=True)])
    looks = torch.zeros(mosaics, questions, PLACES, dtype=torch.bool)
    for row, each in enumerate(asked):
        for turn, question in enumerate(each):
            looks[row, turn, list(question.cells)] = True
    looks = looks.gather(2, within[:, None].expand(-1, questions, -1))
    return Batch(
        torch.from_numpy(pixels), tokens, targets, branches, positions, patches, cells, places, presence, looks
    )


def _branched(
    questions: Sequence[Question], choices: random.Random
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Tokens, targets, branches and positions of conversations about one mosaic, as `Batch` has them."""
    tokens, image = [BEGIN], [IMAGE] * PATCHES
    if choices.random() < _SYSTEM_PART:
        length = choices.randint(1, _LONGEST_SYSTEM)
        tokens += [SYSTEM, *(choices.choice(_WORDS) if choices.random() < 0.5 else UNKNOWN for _ in range(length))]
    text_first = choices.random() < _TEXT_FIRST_PART
    if not text_first:
        tokens += [USER, *image]
    begun = len(tokens)
    targets, branches, positions = [_NO_TARGET] * begun, [0] * begun, list(range(begun))
    asked = 0
    while asked < len(questions):
        turns = _TURNS[-1] if text_first else choices.choice(_TURNS)
        written: list[int] = []
        is_answer: list[bool] = []
        for turn, question in enumerate(questions[asked : asked + turns]):
            said, answer = word_ids(question.text), [*word_ids(question.answer), END]
            if turn or text_first:
                said = [USER, *said]
            if not turn and text_first:
                said += image
            written += [*said, ASSISTANT, *answer]
            is_answer += [False] * (len(said) + 1) + [True] * len(answer)
        tokens += written
        targets += _targets(written, is_answer)
        branches += [1 + asked] * len(written)
        positions += range(begun, begun + len(written))
        asked += turns
        if text_first:
            break  # each conversation would hold the image anew
    return tokens, targets, branches, positions


def write_ids(questions: Sequence[Question]) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, and for each the next token where that belongs to an answer."""
    tokens, is_answer = [BEGIN], [False]
    for turn, question in enumerate(questions):
        said, answer = word_ids(question.text), [*word_ids(question.answer), END]
        tokens += [USER, *([] if turn else [IMAGE] * PATCHES), *said, ASSISTANT, *answer]
        is_answer += [False] * (len(tokens) - len(is_answer) - len(answer)) + [True] * len(answer)
    return tokens, _targets(tokens, is_answer)


def _targets(tokens: Sequence[int], is_answer: Sequence[bool]) -> list[int]:
    """The next token where that belongs to an answer."""
    following = zip(tokens[1:], is_answer[1:], strict=True)
    return [token if answers else _NO_TARGET for token, answers in following] + [_NO_TARGET]


def padded(written: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Tokens and targets of several conversations, [conversations, longest] each."""
    return _padded([tokens for tokens, _ in written], PAD), _padded([targets for _, targets in written], _NO_TARGET)


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
