"""Every kind of vision-language checkpoint answers as transformers does, greedily and token for token: alone, with
several images, with videos, and all of them in one batch beside texts.

What prompts and towers are given is checked in tests/models; here transformers is given the same, but as its own
image processors batch it.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from PIL import Image

from winnow.engine.messages import Array, Picture
from winnow.engine.models.loader import load_model
from winnow.engine.models.tokenizer import load_tokenizer
from winnow.engine.models.vision.build import load_eyes
from winnow.engine.models.vision.processor import load_processor
from winnow.kernels.dispatch import Backend

from ..models.vision_checkpoints import FAMILIES, WITH_VIDEO, image_of, image_processor, save_vlm
from .bench import Bench, Seen, assert_same

NEW = 8
NEAR_TIE = 1e-3

Part = str | Image.Image | list[Image.Image]
"""Of a prompt: text, an image, or the frames of a video"""

TEXT: list[Part] = ["<s>user : what is a red circle ? assistant :"]
ONE: list[Part] = ["<s>user :", image_of(50, 70), "what is this ? assistant :"]
OTHER: list[Part] = ["<s>user :", image_of(50, 70, 5), "what is this ? assistant :"]
WIDE: list[Part] = ["<s>user : a blue", image_of(20, 90, 1), "circle"]
TWO: list[Part] = ["<s>user :", image_of(50, 70), "and a", image_of(40, 30, 2), "two circle ? assistant :"]
VIDEO: list[Part] = ["<s>user :", [image_of(40, 48, 3 + i) for i in range(5)], "what ? assistant :"]
BOTH: list[Part] = ["<s>user :", image_of(50, 70), "and", [image_of(32, 32, 3 + i) for i in range(3)], "two ?"]


class Model:
    """A checkpoint as the engine has it, and as transformers does."""

    def __init__(self, family: str, folder: Path, ops: Backend):
        self.family, self.folder = family, folder
        self.reference: Any = save_vlm(folder, family)
        self.reference.generation_config.eos_token_id = None
        self.tokenizer = load_tokenizer(str(folder))
        self.processor: Any = load_processor(str(folder), self.tokenizer)
        self.eyes: Any = load_eyes(folder, torch.device("cpu"), torch.float32)
        self.decoder = load_model(str(folder), ops, "f32")
        self.prompts = [TEXT, ONE, OTHER, WIDE, TWO, *([VIDEO, BOTH] if family in WITH_VIDEO else [])]

    def bench(self, **settings: Any) -> Bench:
        return Bench(self.decoder, eyes=self.eyes, **settings)

    def request(self, parts: Sequence[Part]) -> tuple[list[int], list[Picture]]:
        """The prompt, and its pictures."""
        tokens: list[int] = []
        text: list[int] = []
        pictures: list[Picture] = []
        is_alone = sum(isinstance(part, Image.Image) for part in parts) == 1
        for part in parts:
            if isinstance(part, str):
                words = self.tokenizer.encode(part, add_special_tokens=False)
                tokens += words
                text += words
                continue
            is_video = isinstance(part, list)
            made = self.processor.video(part) if is_video else self.processor.image(part, is_alone)
            ids = self.tokenizer.encode(made.text, add_special_tokens=False)
            own = np.flatnonzero(np.array(ids) == self.eyes.sees["video" if is_video else "image"])
            inputs = {
                name: Array(value.dtype.name, list(value.shape), np.ascontiguousarray(value).tobytes())
                for name, value in made.inputs.items()
            }
            digest = blake2b(repr(sorted(inputs.items())).encode(), digest_size=16).digest()
            first = len(tokens) + int(own[0])
            span = int(own[-1] - own[0]) + 1
            kind: Any = "video" if is_video else "image"
            pictures.append(Picture(digest, first, span, inputs, text, 0, kind))
            tokens += ids
        return tokens, [replace(shown, turn_end=len(tokens)) for shown in pictures]

    def greedy(self, parts: Sequence[Part]) -> list[int]:
        """What transformers generates."""
        tokens, _ = self.request(parts)
        ids = torch.tensor([tokens])
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images := [part for part in parts if isinstance(part, Image.Image)]:
            nested = [images] if self.family in ("llava_onevision", "idefics3", "smolvlm") else images
            given |= image_processor(self.family)(nested, return_tensors="pt")
        for part in parts:
            if isinstance(part, list):
                made = self.processor.video(part).inputs
                given |= {name: torch.from_numpy(value)[None] for name, value in made.items()}
                if self.family != "llava_onevision":  # patches of all videos stand in one array
                    given["pixel_values_videos"] = given["pixel_values_videos"][0]
        if self.family.startswith("qwen"):
            sees = self.eyes.sees
            given["mm_token_type_ids"] = (ids == sees["image"]).int() + 2 * (ids == sees["video"]).int()
        made = self.reference.generate(
            **given, do_sample=False, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True
        )
        best = torch.stack(made.logits)[:, 0].topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > NEAR_TIE, "rounding would decide: choose another prompt"
        return made.sequences[0, len(tokens) :].tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, ops: Backend, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp(request.param), ops)


@pytest.fixture(scope="module")
def answers(model: Model) -> list[Seen]:
    """To each prompt, with the engine to itself."""
    bench = model.bench()
    made = []
    for parts in model.prompts:
        tokens, pictures = model.request(parts)
        made.append(bench.alone(tokens, NEW, pictures=pictures))
    return made


def test_greedy(model: Model, answers: list[Seen]) -> None:
    wanted = [model.greedy(parts) for parts in model.prompts]
    assert [answer.tokens for answer in answers] == wanted
    assert wanted[1] != wanted[2], "what the image shows must matter"


@pytest.mark.parametrize("max_step_tokens", [16, 50, 512])
def test_in_one_batch(model: Model, answers: list[Seen], max_step_tokens: int) -> None:
    bench = model.bench(max_step_tokens=max_step_tokens)
    for i, parts in enumerate(model.prompts):
        tokens, pictures = model.request(parts)
        bench.submit(str(i), tokens, NEW, pictures=pictures)
    bench.run()
    for i, answer in enumerate(answers):
        assert_same(bench.seen[str(i), 0], answer)
    assert any(len(batch) > 2 for batch in bench.batches)


def test_every_token_of_an_image_is_counted(model: Model, answers: list[Seen]) -> None:
    for parts, answer in zip(model.prompts, answers, strict=True):
        tokens, _ = model.request(parts)
        placeholders = sum(tokens.count(seen) for seen in model.eyes.sees.values())
        report = answer.last.compression
        assert (0 if report is None else report.image_tokens) == placeholders


def test_pruned(model: Model, answers: list[Seen]) -> None:
    """A policy that goes by the tower's attention: fewer tokens are read, and keeping all changes nothing."""
    tokens, pictures = model.request(TWO)
    bench = model.bench()
    whole = bench.alone(tokens, NEW, {"vision": {"policy": "vtc_cls", "keep": 1.0}}, pictures=pictures)
    assert_same(whole, answers[4])
    few = bench.alone(tokens, NEW, {"vision": {"policy": "vtc_cls", "keep": 3}}, pictures=pictures)
    report = few.last.compression
    assert report is not None
    assert 6 <= report.image_tokens_kept < report.image_tokens
    assert few.tokens
