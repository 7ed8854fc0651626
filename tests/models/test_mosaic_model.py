"""The shipped vision model: transformers loads it, it answers about mosaics of held-out images, and it must look."""

from __future__ import annotations

import logging

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from winnow.engine.models.files import MOSAIC, resolve_model
from winnow.engine.models.mosaic.checkpoint import PATCHES
from winnow.engine.models.mosaic.evaluate import evaluate, questions
from winnow.engine.models.mosaic.scenes import Bank, load_bank

FOLDER = resolve_model(MOSAIC)


@pytest.fixture(scope="module")
def bank() -> Bank:
    return load_bank("test")


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    loaded, told = LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


def test_it_answers_about_mosaics_of_test_images(model: LlavaForConditionalGeneration, bank: Bank) -> None:
    """The first of the 560 mosaics of the model card, where 95.1 % of open questions are answered."""
    score = evaluate(model, bank, 50)
    assert score["open"] >= 0.92 and score["cell colour"] >= 0.95, score


def test_without_the_image_it_is_near_chance(model: LlavaForConditionalGeneration, bank: Bank) -> None:
    """Chance is about a half for two answers, a third for three, and little for the rest."""
    score = evaluate(model, bank, 50, blind=True)
    assert score["open"] < 0.3 and score["presence"] < 0.65 and score["cell colour"] < 0.3, score


def test_it_generates_what_was_counted_as_right(model: LlavaForConditionalGeneration, bank: Bank) -> None:
    """Through the image processor, the chat template and `generate`, as users of transformers ask it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDER)
    processor = AutoImageProcessor.from_pretrained(FOLDER, backend="pil")
    right = 0
    for scene, asked in questions(bank, 10):
        pixels = processor(Image.fromarray(bank.render([scene])[0]), return_tensors="pt")["pixel_values"]
        content = [{"type": "image"}, {"type": "text", "text": asked[0].text.capitalize() + "?"}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text.replace("<image>", "<image>" * PATCHES), add_special_tokens=False, return_tensors="pt")
        made = model.generate(input_ids=ids["input_ids"], pixel_values=pixels, max_new_tokens=6, do_sample=False)
        answer = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        right += answer == asked[0].answer
    assert right >= 9


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 20e6
