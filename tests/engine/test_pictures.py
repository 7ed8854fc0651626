"""Prompts with pictures: against transformers, and to the bit the same whatever happens around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2VLTextModel

from winnow.engine.messages import Picture
from winnow.engine.models.decoder import Decoder

from ..models.checkpoints import random_model
from .bench import Bench, Seen
from .seeing import TinyEyes, mrope, picture, pictured, pixels

NEW = 12
UNIFORM = {"policy": "uniform"}
PRUNED = {"vision": UNIFORM | {"keep": 11}}

TWO = pictured([20, picture(0, 0), 9, picture(1, 0, 4, 9), 15])
"""A prompt with two pictures of as many tokens"""


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return random_model("llama", max_position_embeddings=1024)


def embedded(model: Any, prompt: Sequence[int], pictures: Sequence[Picture]) -> Tensor:
    """[n, hidden] what the language model reads, made without the engine."""
    table = model.get_input_embeddings()
    x = table(torch.tensor(prompt)).detach().clone()
    for i, shown in enumerate(pictures):
        x[shown.first : shown.first + shown.span] = seen_by_hand(i, shown)
    return x


def seen_by_hand(number: int, shown: Picture) -> Tensor:
    return TinyEyes().encode({"pixels": pixels(number, *shown.inputs["pixels"].shape[:2]).numpy()}).embeddings


def continued(model: Any, x: Tensor, positions: Tensor, tokens: Sequence[int], behind: int) -> Tensor:
    """Logits [len(tokens) + 1, vocab] after a prompt's rows x [n, hidden] at positions [..., n] and after each of some
    tokens, the first of which stands at position `behind`."""
    more = model.get_input_embeddings()(torch.tensor(list(tokens), dtype=torch.long))
    later = (behind + torch.arange(len(tokens))).expand(*positions.shape[:-1], len(tokens))
    at = torch.cat([positions, later], -1)
    at = at.unsqueeze(-2)  # [axes, batch, n] or [batch, n]
    with torch.no_grad():
        # A mask, or gaps between positions would be taken for texts packed into one row.
        every = torch.ones(1, len(x) + len(more), dtype=torch.long)
        given = {"inputs_embeds": torch.cat([x, more])[None], "position_ids": at, "attention_mask": every}
        given["use_cache"] = False
        if isinstance(model, Qwen2VLTextModel):
            logits = model.lm_head(model(**given).last_hidden_state)[0]
        else:
            logits = model(**given).logits[0]
    return logits[len(x) - 1 :]


def assert_greedy(seen: Seen, wanted: Tensor, prompt: int) -> None:
    """The tokens are the likeliest of wanted [new + 1, vocab], and logits are close."""
    assert seen.rejected is None, seen.rejected
    assert seen.tokens == wanted.argmax(-1).tolist()[: len(seen.tokens)]
    for i in range(len(seen.tokens)):
        torch.testing.assert_close(seen.logits[prompt + i], wanted[i], atol=1e-2, rtol=1e-3)


def test_whole_pictures_as_transformers_reads_them(tiny: Decoder, reference: PreTrainedModel) -> None:
    prompt, pictures = TWO
    seen = Bench(tiny, eyes=TinyEyes(), max_step_tokens=17).alone(prompt, NEW, pictures=pictures)
    x = embedded(reference, prompt, pictures)
    wanted = continued(reference, x, torch.arange(len(prompt)), seen.tokens, len(prompt))
    assert_greedy(seen, wanted, len(prompt))
    report = seen.last.compression
    assert report is not None
    assert (report.image_tokens, report.image_tokens_kept) == (72, 72)
    assert report.tokens_seen == len(prompt) + NEW - 1


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_pruned_pictures_as_transformers_reads_what_is_left(
    tiny: Decoder, reference: PreTrainedModel, positions: str
) -> None:
    prompt, pictures = TWO
    plan = {"vision": {"policy": "uniform", "keep": 11, "positions": positions}}
    seen = Bench(tiny, eyes=TinyEyes(), max_step_tokens=17).alone(prompt, NEW, plan, pictures=pictures)
    dropped = [shown.first + i for shown in pictures for i in set(range(36)) - set(evenly_by_hand(36, 11))]
    stays = torch.tensor([i for i in range(len(prompt)) if i not in dropped])
    x = embedded(reference, prompt, pictures)[stays]
    is_original = positions == "original"
    at = stays if is_original else torch.arange(len(stays))
    wanted = continued(reference, x, at, seen.tokens, len(prompt) if is_original else len(stays))
    assert_greedy(seen, wanted, len(stays))
    report = seen.last.compression
    assert report is not None
    assert (report.image_tokens, report.image_tokens_kept) == (72, 22)
    assert report.tokens_seen == len(prompt) + NEW - 1
    assert report.tokens_kept_mean == len(stays) + NEW - 1
    assert report.bytes_held < report.bytes_uncompressed


def evenly_by_hand(total: int, count: int) -> list[int]:
    return [int((i + 0.5) * total / count) for i in range(count)]


@pytest.mark.parametrize("keep", [1.0, 11])
def test_three_axes_as_transformers_turns_them(turning: tuple[Decoder, Any], keep: float) -> None:
    model, theirs = turning
    prompt, pictures = TWO
    plan = {"vision": {"policy": "uniform", "keep": keep}}
    seen = Bench(model, eyes=TinyEyes(has_axes=True), max_step_tokens=17).alone(prompt, NEW, plan, pictures=pictures)
    axes = torch.from_numpy(mrope(np.array(prompt, np.int32), pictures)).long()
    kept = set(range(36)) if keep == 1.0 else set(evenly_by_hand(36, 11))
    dropped = {shown.first + i for shown in pictures for i in range(36) if i not in kept}
    stays = torch.tensor([i for i in range(len(prompt)) if i not in dropped])
    x = embedded(theirs, prompt, pictures)[stays]
    behind = int(axes.max()) + 1
    assert behind < len(prompt), "pictures are shorter than their tokens"
    wanted = continued(theirs, x, axes[:, stays], seen.tokens, behind)
    assert_greedy(seen, wanted, len(stays))


def test_contiguous_axes_close_up_within_pruned_pictures_alone(turning: tuple[Decoder, Any]) -> None:
    """A 6 x 6 picture of which two rows stay; the other, of three tokens, is smaller than `keep`."""
    model, theirs = turning
    prompt, pictures = pictured([8, picture(0, 0), 3, picture(1, 0, 1, 3), 6])
    plan = {"vision": {"policy": "uniform", "keep": 4, "positions": "contiguous"}}
    seen = Bench(model, eyes=TinyEyes(has_axes=True)).alone(prompt, NEW, plan, pictures=pictures)
    kept = evenly_by_hand(36, 4)  # 4, 13, 22, 31: rows 0, 2, 3, 5 and columns 4, 1, 4, 1
    stays = torch.tensor([*range(8), *(8 + i for i in kept), *range(44, len(prompt))])
    first = [[0, 0, 0, 0], [0, 1, 2, 3], [1, 0, 1, 0]]  # of the first picture, from 8 on
    second = [[0, 0, 0], [0, 0, 0], [0, 1, 2]]  # from 15 on, behind three tokens that begin at 12
    axes = torch.tensor(
        [
            [*range(8), *(8 + x for x in one), 12, 13, 14, *(15 + x for x in other), *range(18, 24)]
            for one, other in zip(first, second, strict=True)
        ]
    )
    wanted = continued(theirs, embedded(theirs, prompt, pictures)[stays], axes, seen.tokens, 24)
    assert_greedy(seen, wanted, len(stays))
