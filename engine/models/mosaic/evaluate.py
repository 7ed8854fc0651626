"""How many questions about mosaics of test images a model answers rightly, to the last token, decoding greedily."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from winnow.engine.models.mosaic.checkpoint import DEVIATION, IMAGE, MEAN
from winnow.engine.models.mosaic.conversations import padded, write_ids
from winnow.engine.models.mosaic.questions import Asker, Question
from winnow.engine.models.mosaic.scenes import Bank, Mosaic

Score = dict[str, float]
"""Part of the questions answered rightly: of all, of the open ones (not yes or no), by kind and by grid."""

SEED = 1_000_003
QUESTIONS = 6
_AT_ONCE = 64


def questions(bank: Bank, mosaics: int) -> list[tuple[Mosaic, list[Question]]]:
    """The test: always the same for the same bank and number."""
    rng, asker = np.random.default_rng(SEED), Asker(random.Random(SEED))
    scenes = [bank.draw(rng) for _ in range(mosaics)]
    return [(scene, [asker.ask(scene) for _ in range(QUESTIONS)]) for scene in scenes]


def pixel_values(pixels: Tensor) -> Tensor:
    """[n, 96, 96, 3] bytes -> [n, 3, 96, 96] f32 for the tower, as the checkpoint's image processor makes it."""
    return ((pixels.float() / 255 - MEAN) / DEVIATION).permute(0, 3, 1, 2)


@torch.inference_mode()
def evaluate(
    model: LlavaForConditionalGeneration, bank: Bank, mosaics: int, turns: int = 1, blind: bool = False
) -> Score:
    """Asks the questions of `mosaics` test mosaics.

    An answer is right if each of its tokens is the likeliest after those before it: what greedy decoding then writes.

    Args:
        turns: questions of one conversation: 1 asks each alone; later ones could be guessed from former answers.
        blind: a white image stands for each mosaic.
    """
    device = next(model.parameters()).device
    right: dict[str, list[bool]] = defaultdict(list)
    test = questions(bank, mosaics)
    for first in range(0, mosaics, _AT_ONCE):
        part = test[first : first + _AT_ONCE]
        pixels = torch.from_numpy(bank.render([scene for scene, _ in part])).to(device)
        if blind:
            pixels.fill_(255)
        features = _features(model, pixels)
        for turn in range(0, QUESTIONS, turns):
            asked = [each[turn : turn + turns] for _, each in part]
            tokens, targets = (each.to(device) for each in padded([write_ids(some) for some in asked]))
            answered = _answered(model, features, tokens, targets)
            for (scene, _), some, results in zip(part, asked, answered, strict=True):
                for question, is_right in zip(some, results, strict=True):
                    for name in _groups(question, scene):
                        right[name].append(is_right)
    return {name: sum(each) / len(each) for name, each in sorted(right.items())}


def _groups(question: Question, scene: Mosaic) -> list[str]:
    is_open = question.answer not in ("yes", "no")
    return ["all", *(["open"] if is_open else []), question.kind, f"{scene.grid}x{scene.grid}"]


def _features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    with torch.autocast(pixels.device.type, enabled=False):
        hidden = model.model.vision_tower(pixel_values(pixels), output_hidden_states=True).hidden_states[-2]
        projected: Tensor = model.model.multi_modal_projector(hidden[:, 1:])
    return projected


def _answered(
    model: LlavaForConditionalGeneration, features: Tensor, tokens: Tensor, targets: Tensor
) -> list[list[bool]]:
    """For each conversation, which of its answers are right."""
    embeddings = model.get_input_embeddings()(tokens)
    embeddings = embeddings.masked_scatter((tokens == IMAGE).unsqueeze(-1), features)
    hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    wrong = ((model.lm_head(hidden).argmax(-1) != targets) & (targets >= 0)).cpu()
    results = []
    for row, is_answer in zip(wrong, (targets >= 0).cpu(), strict=True):
        # Answers are runs of targets.
        begins = is_answer & ~torch.nn.functional.pad(is_answer[:-1], (1, 0))
        answer = begins.cumsum(0)[is_answer]
        misses = torch.zeros(int(begins.sum()) + 1).index_add_(0, answer, row[is_answer].float())
        results.append((misses[1:] == 0).tolist())
    return results
