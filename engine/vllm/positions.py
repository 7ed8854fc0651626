"""Where tokens stand (M-RoPE) in a prompt of Qwen2.5-VL whose videos vLLM has pruned: where they would without pruning.

vLLM 0.32 itself loses them: where a video was cut between two steps, behind another, found in the prefix cache, taller
than wide, or longer than what is left of the prompt. Here, text has its place before anything is pruned, and only what
stays of a video is placed when its embeddings come. Nothing here imports vllm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

CHANNELS = 4
"""That vLLM's model appends to each embedding: time, row and column from the picture's first token, and the columns. In
bf16 they are exact up to 256: of a longer video, moments behind the 256th frame are rounded."""


def place_as_whole(worker: Any) -> None:
    """Makes the model of one of vLLM's workers place tokens as said above."""
    worker.model_runner.is_multimodal_pruning_enabled = True  # which vLLM's runner for CPUs leaves out
    model = worker.get_model()
    model.get_mrope_input_positions = partial(prompt_positions, model, model.get_mrope_input_positions)
    model.recompute_mrope_positions = partial(positions_of_embeddings, model)


def prompt_positions(model: Any, of_whole: Any, tokens: Sequence[int], features: Iterable[Any]) -> tuple[Tensor, int]:
    """
    Args
        of_whole: the model's own, for prompts none of whose videos is pruned
        tokens: a prompt, with as many placeholders for a video as stay of it
        features: vLLM's descriptions of its pictures
    Returns
        [3, tokens]: time, row and column, those of videos' placeholders to be put right when they are seen; and what
        those of new tokens are more than their numbers
    """
    features = sorted(features, key=lambda feature: feature.mm_position.offset)
    times = torch.ones(len(tokens), dtype=torch.int64)  # how often a token stands in the whole prompt
    moved, ahead = [], 0
    for feature, (first, *grid, _) in zip(features, model.iter_mm_grid_thw(features), strict=True):
        place = feature.mm_position
        dropped = grid[0] * grid[1] * grid[2] - place.length
        moved.append(replace(feature, mm_position=replace(place, offset=first + ahead)))
        times[first + place.length - 1] += dropped
        ahead += dropped
    whole, _ = of_whole(torch.tensor(tokens).repeat_interleave(times).tolist(), moved)
    positions = whole[:, times.cumsum(0) - times]
    return positions, int(positions.max()) + 1 - len(tokens)


def positions_of_embeddings(
    model: Any,
    input_ids: Sequence[int] | Tensor,
    multimodal_embeddings: Sequence[Tensor],
    mrope_positions: Tensor,
    num_computed_tokens: int,
) -> tuple[list[Tensor], Tensor, int]:
    """
    Args
        input_ids: the prompt
        multimodal_embeddings: [n, hidden + CHANNELS] each, for its next placeholders from `num_computed_tokens` on
        mrope_positions: [3, tokens]
    Returns
        [n, hidden] each; [3, tokens] with the placeholders' own positions; what those of new tokens are more than
        their numbers
    """
    positions = mrope_positions.clone()
    own = [one[:, -CHANNELS:-1].T.to(positions) for one in multimodal_embeddings]
    if own:
        tokens = torch.as_tensor(input_ids, device=positions.device)
        is_seen = (tokens == model.config.image_token_id) | (tokens == model.config.video_token_id)
        from_first = torch.cat(own, 1)
        at = num_computed_tokens + is_seen[num_computed_tokens:].nonzero()[: from_first.shape[1], 0]
        begins = is_seen.clone()
        begins[1:] &= ~is_seen[:-1]
        firsts = begins.nonzero()[:, 0]  # the first token of a picture always stays
        first = firsts[torch.searchsorted(firsts, at, right=True) - 1]
        positions[:, at] = positions[:, first] + from_first
    left = [one[:, :-CHANNELS] for one in multimodal_embeddings]
    return left, positions, int(positions.max()) + 1 - positions.shape[1]
