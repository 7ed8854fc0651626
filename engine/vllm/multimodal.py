"""Prompts in vLLM's words. Pictures reach its model as the server's processor made them: vLLM's own is not asked."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from vllm.config import ModelConfig
from vllm.inputs.engine import MultiModalInput, TokensInput, mm_input, tokens_input
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalFlatField,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.multimodal.video_prune.evs import compute_retained_tokens_count

from winnow.engine.errors import RequestError
from winnow.engine.messages import Picture, Submit
from winnow.engine.pictures import places_of
from winnow.engine.tower_protocol import inputs_of
from winnow.engine.vllm.pictures import placed


@dataclass(frozen=True)
class Prompt:
    input: TokensInput | MultiModalInput
    tokens: int
    """That the language model reads"""
    image_tokens: int = 0
    """Placeholders before videos are pruned"""
    image_tokens_kept: int = 0

    @property
    def dropped(self) -> int:
        return self.image_tokens - self.image_tokens_kept


class Prompts:
    """Makes vLLM's inputs of requests."""

    def __init__(self, config: ModelConfig, kind: str | None):
        """`kind`: `seeing_type`"""
        self._pruning_rate = 0.0
        self.sees: dict[str, int] = {}
        """`EngineInfo.sees`; vLLM may have been told to leave a kind out"""
        if kind is not None:
            ids = {name: getattr(config.hf_config, f"{name}_token_id", None) for name in ("image", "video")}
            limit = config.multimodal_config.get_limit_per_prompt
            self.sees = {name: token for name, token in ids.items() if token is not None and limit(name)}
            self._pruning_rate = config.multimodal_config.video_pruning_rate or 0.0

    @property
    def video_keep(self) -> float | None:
        """`EngineInfo.video_keep`"""
        return round(1 - self._pruning_rate, 9) if self._pruning_rate else None

    def read(self, request: Submit) -> Prompt:
        """
        Raises
            RequestError: its pictures are not what its prompt has placeholders for
        """
        salt = request.cache_salt or None
        places = places_of(request, self.sees)
        if not places:
            return Prompt(tokens_input(request.prompt, cache_salt=salt), len(request.prompt))
        if self._pruning_rate and any(a[-1] + 1 == b[0] for a, b in pairwise(places)):
            raise RequestError("messages", "messages: where vLLM prunes videos, text must stand between two pictures")
        kept = [self._kept(picture, len(own)) for picture, own in zip(request.pictures, places, strict=True)]
        prompt, firsts = placed(request.prompt, places, kept)
        items: dict[str, list[MultiModalKwargsItem]] = defaultdict(list)
        hashes: dict[str, list[str]] = defaultdict(list)
        ranges: dict[str, list[PlaceholderRange]] = defaultdict(list)
        for picture, first, count in zip(request.pictures, firsts, kept, strict=True):
            items[picture.kind].append(_item(picture))
            hashes[picture.kind].append(picture.key.hex())
            ranges[picture.kind].append(PlaceholderRange(first, count))
        pictured = mm_input(prompt, MultiModalKwargsItems(items), hashes, ranges, cache_salt=salt)
        return Prompt(pictured, len(prompt), sum(map(len, places)), sum(kept))

    def _kept(self, picture: Picture, tokens: int) -> int:
        """Of so many placeholders of a picture, how many vLLM leaves."""
        if picture.kind != "video" or not self._pruning_rate:
            return tokens
        frames = int(inputs_of(picture)["video_grid_thw"][0])
        return compute_retained_tokens_count(tokens // frames, frames, self._pruning_rate)


def _item(picture: Picture) -> MultiModalKwargsItem:
    """Pixels of several pictures are joined along their first axis; other inputs get one that counts pictures, and are
    read on the host."""
    fields = {}
    for name, value in inputs_of(picture).items():
        is_pixels = name.startswith("pixel")
        field = MultiModalFlatField(slices=[slice(None)]) if is_pixels else MultiModalBatchedField(keep_on_cpu=True)
        fields[name] = MultiModalFieldElem(torch.from_numpy(np.asarray(value)), field)
    return MultiModalKwargsItem(fields)
