"""How the shipped vision model is made: its scenes, questions, checkpoint files and training."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedTokenizerFast

from winnow.engine.models.mosaic import train
from winnow.engine.models.mosaic.checkpoint import END, IMAGE, PATCHES, VOCABULARY, write_settings
from winnow.engine.models.mosaic.conversations import Batch, conversations, write_ids
from winnow.engine.models.mosaic.evaluate import pixel_values, questions
from winnow.engine.models.mosaic.questions import KIND_NAMES, Asker, Question
from winnow.engine.models.mosaic.scenes import COLOURS, Bank, Mosaic, load_bank

RGB = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


@pytest.fixture(scope="module")
def bank() -> Bank:
    return load_bank("test")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mosaic")
    write_settings(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(settings: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(settings)


def test_patches_have_the_colours_that_mosaics_name(bank: Bank) -> None:
    rng = np.random.default_rng(1)
    mosaics = [bank.draw(rng) for _ in range(40)]
    patches = bank.render(mosaics).reshape(40, 12, 8, 12, 8, 3).swapaxes(2, 3).reshape(40, PATCHES, 64, 3)
    kinds = bank.patch_kinds(mosaics)
    for row, mosaic in enumerate(mosaics):
        shown = {int(kind) - 1 for kind in kinds[row]} - {-1}
        assert shown == set(mosaic.cells) - {-1}
        for patch in np.flatnonzero(kinds[row]):
            colour = RGB[COLOURS[(kinds[row, patch] - 1) % len(COLOURS)]]
            nearest = np.abs(patches[row, patch].astype(int) - colour).sum(-1).min()
            assert nearest < 90  # resized edges are mixed with the background


def test_cells_lie_where_they_are_named(bank: Bank) -> None:
    red = COLOURS.index("red")
    source = int(bank.of_kind[red][0])
    mosaic = Mosaic(3, (-1, -1, red) + (-1,) * 6, (source,) * 9)
    kinds = bank.patch_kinds([mosaic])[0].reshape(12, 12)
    rows, columns = np.nonzero(kinds)
    assert len(rows) and rows.max() < 4 and columns.min() >= 8
    places = bank.patch_places([mosaic, Mosaic(2, (-1,) * 4, (source,) * 4)])
    assert set(places[0, kinds.reshape(-1) > 0]) == {4 + 2}
    assert places[1].reshape(12, 12)[::6, ::6].tolist() == [[0, 1], [2, 3]]
    assert Asker(random.Random(0))._where(mosaic)[1].answer == "top right"


def test_cached_images_are_the_package_s(bank: Bank, tmp_path: Path) -> None:
    for _ in range(2):  # written, then read
        cached = load_bank("test", tmp_path / "cells.npz")
        assert np.array_equal(cached.kinds, bank.kinds)
        assert np.array_equal(cached.cells[3], bank.cells[3])


def test_answers_are_true(bank: Bank) -> None:
    """By rules of their own for the kinds that can be told from the cells alone."""
    for mosaic, asked in questions(bank, 200):
        shown = [(kind // 8, kind % 8) for kind in mosaic.cells if kind >= 0]
        for question in asked:
            if question.kind == "count all":
                assert int(question.answer) == len(shown)
            elif question.kind == "count colours":
                named = next(colour for colour in COLOURS if f" {colour} " in f" {question.text} ")
                assert int(question.answer) == sum(COLOURS[colour] == named for _, colour in shown)
            elif question.kind == "grid":
                assert int(question.answer) == mosaic.grid**2


def test_no_answer_is_much_likelier_than_others(bank: Bank) -> None:
    """The part of the most frequent answer is what who does not look can reach."""
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for _, asked in questions(bank, 560):
        for question in asked:
            given[question.kind][question.answer] += 1
    most = {kind: max(given[kind].values()) / given[kind].total() for kind in KIND_NAMES}
    limits = {"presence": 0.53, "grid": 0.62, "cell shape": 0.36, "cell colour": 0.15, "cell": 0.12, "where": 0.2}
    assert all(most[kind] < limits.get(kind, 0.25) for kind in KIND_NAMES), most


@pytest.mark.parametrize("text_first", [False, True])
def test_training_reads_what_the_chat_template_writes(tokenizer: PreTrainedTokenizerFast, text_first: bool) -> None:
    asked = [
        Question("", "what colour is in the top left cell", "red"),
        Question("", "where is the gray circle", "middle"),
    ]
    text, image = {"type": "text", "text": "What color is in the TOP-left cell?"}, {"type": "image"}
    messages = [
        {"role": "user", "content": [text, image] if text_first else [image, text]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Where is the grey circle?!"},
        {"role": "assistant", "content": [{"type": "text", "text": "middle"}]},
    ]
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer.encode(written.replace("<image>", "<image>" * PATCHES), add_special_tokens=False)
    tokens, targets = write_ids(asked)
    if text_first:
        words = tokens[2 + PATCHES : 2 + PATCHES + 8]
        tokens[2 : 2 + PATCHES + 8] = words + [IMAGE] * PATCHES
    assert ids == tokens
    assert tokenizer.decode([token for token in targets if token >= 0]) == "red</s> middle</s>"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert written.startswith(prompt)


def test_every_word_has_a_token(bank: Bank, tokenizer: PreTrainedTokenizerFast) -> None:
    for _, asked in questions(bank, 200):
        for question in asked:
            for text in (question.text, question.answer):
                ids = tokenizer.encode(text, add_special_tokens=False)
                assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer.encode("a zebra", add_special_tokens=False) == [VOCABULARY["▁a"], tokenizer.unk_token_id]


def test_a_system_message_is_written_and_an_unknown_role_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "count the shapes"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s><system> be brief<user> count the shapes"
    with pytest.raises(Exception, match="roles are system, user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "4"}], tokenize=False)


def test_training_sees_what_the_image_processor_makes(bank: Bank, settings: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(settings, backend="pil")
    batch = conversations(bank, [3], 2, 1)
    images = [Image.fromarray(pixels.numpy()) for pixels in batch.pixels]
    made = processor(images, return_tensors="pt")["pixel_values"]
    assert torch.allclose(made, pixel_values(batch.pixels), atol=1e-5)


def test_training_goes_on_as_if_it_had_not_stopped(bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "WHOLE", 1)

    def trainer(name: str) -> train.Trainer:
        return train.Trainer(bank, bank, tmp_path, tmp_path / f"{name}.pt", "cpu", 1, 1e-3, seed=5, tower_steps=1)

    whole = trainer("whole")
    whole.train(3, workers=0)
    stopped = trainer("parts")
    stopped.steps = 3
    for batch in itertools.islice(stopped._batches(workers=0), 2):
        stopped._one(batch)
    stopped.save()
    resumed = trainer("parts")
    assert resumed.step == 2
    resumed.train(3, workers=0)
    assert resumed.step == 3
    for name, weight in whole.student.state_dict().items():
        assert torch.equal(weight, resumed.student.state_dict()[name]), name


def test_heads_are_told_to_look_by_their_own_attention(bank: Bank) -> None:
    """The loss is the attention's that transformers computes, at the patches of the asked cells, token by token."""
    torch.manual_seed(0)
    student = train.Student()
    batch = conversations(bank, [1], 2, 6)
    model = student.llava.model
    model.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        seen = train._seen(batch.branches)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
        embeddings = _embedded(student, batch)
        ran = model.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=batch.positions,
            output_hidden_states=True,
            output_attentions=True,
        )
        told = student._look(batch, seen, 3, ran.hidden_states[3])
    expected = []
    cells = batch.places - batch.places.amin(1, keepdim=True)
    for row, tokens in enumerate(batch.tokens.tolist()):
        first = tokens.index(IMAGE)
        for place, target in enumerate(batch.targets[row].tolist()):
            shown = batch.looks[row, place][cells[row]]
            if target >= 0 and target != END and shown.any():
                looked = ran.attentions[3][row, :2, place, first : first + PATCHES]
                expected.append(-looked[:, shown].log().mean())
    assert len(expected) > 3
    assert torch.allclose(told, torch.stack(expected).mean(), rtol=1e-4)


def test_a_branch_reads_as_if_it_were_alone(bank: Bank) -> None:
    """What is learnt from many conversations in one sequence is what is asked later: one conversation."""
    torch.manual_seed(0)
    student = train.Student()
    batch = conversations(bank, [2], 3, 8)
    language = student.llava.model.language_model
    with torch.no_grad():
        embeddings = _embedded(student, batch)
        together = language(
            inputs_embeds=embeddings, attention_mask=train._seen(batch.branches)[:, None], position_ids=batch.positions
        ).last_hidden_state
        read = 0
        for row, branches in enumerate(batch.branches):
            for branch in range(1, int(branches.max()) + 1):
                own = (branches == 0) | (branches == branch)
                alone = language(inputs_embeds=embeddings[row, own][None]).last_hidden_state[0]
                assert torch.allclose(together[row, own], alone, atol=1e-5)
                read += 1
    assert read > 10


def _embedded(student: train.Student, batch: Batch) -> Tensor:
    model = student.llava.model
    tower = model.vision_tower(pixel_values(batch.pixels), output_hidden_states=True).hidden_states
    embeddings = model.get_input_embeddings()(batch.tokens)
    features = model.multi_modal_projector(tower[-2][:, 1:])
    return embeddings.masked_scatter((batch.tokens == IMAGE).unsqueeze(-1), features)


def test_patches_tell_their_cells(bank: Bank) -> None:
    batch = conversations(bank, [4], 4, 1)
    assert torch.equal(batch.cells[batch.patches > 0], batch.patches[batch.patches > 0])
    rows, patches = (batch.cells == 0).nonzero(as_tuple=True)
    assert len(rows) and not batch.patches[rows, patches].any()
