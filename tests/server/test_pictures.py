"""Prompts with images by the processors, templates and tokenizers of real families of models."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from winnow.engine.models.tokenizer import Tokenizer, load_tokenizer
from winnow.engine.models.vision.processor import load_processor
from winnow.server.pictures import PicturedPrompt, Seen, assemble, seen_as
from winnow.server.protocol.chat import ChatPrompt, MediaPart

from ..models.vision_checkpoints import FAMILIES, IDS, WITH_VIDEO, image_of, save_vlm
from .pictures import image_part, text_part, video_part

IMAGES = [image_of(40, 60, 1), image_of(64, 32, 2), image_of(30, 30, 3)]
VIDEO = [image_of(40, 60, seed) for seed in range(3)]


class Model:
    def __init__(self, family: str, folder: Path):
        save_vlm(folder, family)
        self.family = family
        self.tokenizer: Tokenizer = load_tokenizer(str(folder))
        self.processor: Any = load_processor(str(folder), self.tokenizer)
        self.sees = {kind: IDS[mark] for kind, mark in self.processor.marks.items()}

    def read(self, chat: ChatPrompt) -> list[Seen]:
        images = iter(IMAGES)
        return [
            seen_as(
                part, i, self.processor.video(VIDEO) if part.kind == "video" else self.processor.image(next(images))
            )
            for _, i, part in chat.media
        ]

    def prompt(self, *turns: Any) -> PicturedPrompt:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(turns)]
        chat = ChatPrompt.model_validate({"messages": messages})
        return assemble(self.tokenizer, chat, self.processor.marks, self.sees, self.read(chat))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp(request.param))


FIRST = [text_part("what is"), image_part(), text_part("and "), image_part(), text_part("?")]


def test_what_the_template_writes_is_replaced(model: Model) -> None:
    """As the families' own processors do it: in the text, before it is tokenized."""
    mark = model.processor.marks["image"]
    parts = [{"type": "image"} if "image_url" in part else part for part in FIRST]
    text = model.tokenizer.apply_chat_template([{"role": "user", "content": parts}])
    between = text.split(mark)
    shown = [model.processor.image(image).text for image in IMAGES[:2]]
    wanted = between[0] + shown[0] + between[1] + shown[1] + between[2]
    assert model.prompt(FIRST).tokens == model.tokenizer.encode(wanted, add_special_tokens=False)


def test_where_pictures_lie(model: Model) -> None:
    last = [image_part(), text_part("a circle ?")]
    texts = [model.processor.image(image).text for image in IMAGES]
    if model.family in WITH_VIDEO:
        last.append(video_part(b"x"))
        texts.append(model.processor.video(VIDEO).text)
    made = model.prompt(FIRST, "a red circle", last)
    assert len(made.pictures) == len(texts)
    assert [picture.kind for picture in made.pictures] == ["image"] * 3 + ["video"] * (len(texts) - 3)
    for picture, text in zip(made.pictures, texts, strict=True):
        token, span = model.sees[picture.kind], made.tokens[picture.first : picture.first + picture.span]
        assert span[0] == span[-1] == token
        assert span.count(token) == text.count(model.processor.marks[picture.kind])
        assert token not in picture.text
    for one, following in pairwise(made.pictures):
        assert one.first + one.span <= following.first
    ids = set(model.sees.values())
    inside = sum(made.tokens[p.first : p.first + p.span].count(model.sees[p.kind]) for p in made.pictures)
    assert sum(token in ids for token in made.tokens) == inside


def test_later_turns_change_nothing_of_earlier_ones(model: Model) -> None:
    alone, later = model.prompt(FIRST), model.prompt(FIRST, "a red circle", [image_part(), text_part("and this ?")])
    assert later.pictures[:2] == alone.pictures
    end = alone.pictures[0].turn_end
    assert alone.pictures[1].turn_end == end
    assert alone.tokens[:end] == later.tokens[:end]
    assert alone.tokens[end - 1] == IDS["</s>"]
    assert later.pictures[2].turn_end == len(later.tokens) - 2  # "assistant :" opens the answer
    assert model.tokenizer.decode(later.pictures[2].text) == "and this ?"


def test_equal_images_have_equal_keys(model: Model) -> None:
    part = MediaPart("image", "x")
    keys = [seen_as(part, 0, model.processor.image(image)).key for image in (*IMAGES, IMAGES[0].copy())]
    assert keys[0] == keys[3]
    assert len(set(keys)) == 3
