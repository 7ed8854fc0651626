"""Each policy against a plain reading of its paper: loops over what transformers says of the same tokens or text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from winnow.engine.compression.prompt.spec_pc import voting_layers
from winnow.engine.compression.prompt.units import starts_of
from winnow.engine.errors import PromptTooLong
from winnow.engine.messages import Shorten
from winnow.engine.models.decoder import Decoder

from ..engine.bench import Bench, pages_for
from ..engine.drafts import first_layers
from .encoders import LONGEST
from .messages import QUESTION, TEXT, context_positions, message, without

SHORT = "The code is 7342. Who knows? Nobody knows it!"
Pieces = list[tuple[list[int], float]]
"""Positions in the prompt and score of each unit"""

NEAR_TIE = 1e-5


def kept_of(request: Shorten, pieces: Pieces, budget: int) -> list[int]:
    """The prompt without the units that do not fit. Scores that rounding could swap would say nothing: an error."""
    ranked = sorted(range(len(pieces)), key=lambda i: (-pieces[i][1], i))
    kept: list[int] = []
    full = False
    for one, other in zip(ranked, [*ranked[1:], None], strict=True):
        places, score = pieces[one]
        full = full or score == -math.inf or (bool(kept) and len(kept) + len(places) > budget)
        if not full:
            kept += places
        if other is not None and len(kept) <= budget < len(kept) + len(pieces[other][0]) and not full:
            gap = score - pieces[other][1]
            assert gap == 0 or gap > NEAR_TIE, "choose another text"
    return without(request, [place for place in context_positions(request) if place not in kept])


def units_of(request: Shorten, unit: str) -> list[tuple[str, list[int]]]:
    """Text and positions of the units; a character is a token, and space goes with what follows it."""
    units = []
    for part in request.parts:
        if unit == "token":
            units += [(char, [part.first + i]) for i, char in enumerate(part.text)]
            continue
        starts = starts_of(part.text, unit)  # type: ignore[arg-type]
        for first, last in zip(starts, [*starts[1:], len(part.text)], strict=True):
            units.append((part.text[first:last], list(range(part.first + first, part.first + last))))
    return units


# selective ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["token", "phrase", "sentence"])
@pytest.mark.parametrize("keep", [0.5, 40])
def test_selective(reference: PreTrainedModel, tiny: Decoder, unit: str, keep: Any) -> None:
    request = message({"policy": "selective", "keep": keep, "unit": unit}, [TEXT, SHORT])
    with torch.no_grad():
        logprobs = reference(torch.tensor([request.prompt])).logits[0].double().log_softmax(-1)

    def surprise(place: int) -> float:
        return -float(logprobs[place - 1, request.prompt[place]])

    pieces = [(places, sum(map(surprise, places)) / len(places)) for _, places in units_of(request, unit)]
    budget = int(keep * (len(TEXT) + len(SHORT))) if isinstance(keep, float) else keep
    shortened = Bench(tiny, max_step_tokens=64).shorten(request)
    assert shortened.prompt == kept_of(request, pieces, budget)
    assert shortened.context_tokens == len(TEXT) + len(SHORT)
    assert len(request.prompt) - len(shortened.prompt) == shortened.context_tokens - shortened.context_kept


def test_selective_of_a_prompt_that_is_all_context(reference: PreTrainedModel, tiny: Decoder) -> None:
    """Of the first token nothing is known: it stays, and does not count for its sentence."""
    request = message({"policy": "selective", "keep": 10, "unit": "token"}, lead=0)
    assert Bench(tiny).shorten(request).prompt[0] == request.prompt[0]
    request = message({"policy": "selective", "keep": 60, "unit": "sentence"}, lead=0)
    with torch.no_grad():
        logprobs = reference(torch.tensor([request.prompt])).logits[0].double().log_softmax(-1)
    pieces = []
    for _, places in units_of(request, "sentence"):
        known = [-float(logprobs[place - 1, request.prompt[place]]) for place in places if place > 0]
        pieces.append((places, sum(known) / len(known)))
    assert Bench(tiny).shorten(request).prompt == kept_of(request, pieces, 60)


# spec_pc ------------------------------------------------------------------------------------------------------------


def paid(reference: PreTrainedModel, prompt: list[int], window: int, layers: Sequence[int]) -> list[float]:
    """What the last queries pay each token, from transformers' own attention weights."""
    with torch.no_grad():
        attentions = reference(torch.tensor([prompt]), output_attentions=True).attentions
    window = min(window, len(prompt))
    best = [0.0] * len(prompt)
    for layer in layers:
        weights = attentions[layer][0].double()
        for i in range(window):
            row = weights[:, len(prompt) - window + i].amax(dim=0) * (i / (window - 1) if window > 1 else 1.0)
            best = [max(one, float(other)) for one, other in zip(best, row, strict=True)]
    return best


@pytest.mark.parametrize(
    ("knobs", "window", "pool", "layers"),
    [
        ({}, 64, 64, [1, 2]),  # of three layers the upper half
        ({"window": 9, "pool": 1, "first_layer": 0}, 9, 1, [0, 1, 2]),
        ({"window": 1, "pool": 4, "first_layer": 2}, 1, 4, [2]),
        ({"window": 1024, "pool": 5}, 1024, 5, [1, 2]),  # longer than the prompt
    ],
)
@pytest.mark.parametrize("max_step_tokens", [16, 512])  # the window in several chunks, and in one
def test_spec_pc(
    reference: PreTrainedModel,
    tiny: Decoder,
    knobs: Any,
    window: int,
    pool: int,
    layers: list[int],
    max_step_tokens: int,
) -> None:
    request = message({"policy": "spec_pc", "keep": 0.3} | knobs, [TEXT, SHORT])
    score = paid(reference, request.prompt, window, layers)
    pieces = []
    for part in request.parts:
        inside = range(part.first, part.first + len(part.text))
        for place in inside:
            around = range(place - (pool - 1) // 2, place + pool // 2 + 1)
            pieces.append(([place], max(score[other] for other in around if other in inside)))
    shortened = Bench(tiny, max_step_tokens=max_step_tokens).shorten(request)
    assert shortened.prompt == kept_of(request, pieces, int(0.3 * len(pieces)))


@pytest.mark.parametrize(("first", "layers", "voting"), [(None, 30, 8), (None, 16, 8), (None, 7, 3), (12, 30, 12)])
def test_the_layers_that_vote(first: int | None, layers: int, voting: int) -> None:
    assert voting_layers(first, layers) == range(voting, layers)


@pytest.mark.parametrize("plan", [{"policy": "selective"}, {"policy": "spec_pc", "pool": 3}])
def test_what_a_draft_model_finds_is_what_counts(tiny: Decoder, plan: dict[str, Any]) -> None:
    draft = first_layers(tiny)
    request = message(plan | {"keep": 0.4}, [TEXT, SHORT])
    bench = Bench(tiny, draft=draft, max_step_tokens=64)
    left = bench.shorten(request)
    assert left == Bench(draft).shorten(request)
    assert left != Bench(tiny).shorten(request)
    stats = bench.engine.stats
    assert stats.steps_total == 0  # of the model itself
    assert stats.draft_pages_free == stats.draft_pages_total
    with pytest.raises(PromptTooLong, match="exceed the 96 of the model that is to rank them"):
        Bench(tiny, draft=draft, draft_pages=pages_for(draft, 96)).shorten(request)


# extractive ---------------------------------------------------------------------------------------------------------


def embedding(path: Path, text: str) -> torch.Tensor:
    """Mean of the last hidden states, at most 24 tokens as the checkpoint says, of unit length."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    ids = tokenizer(text, add_special_tokens=False).input_ids[:22]
    ids = [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(path)(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
    mean = sum(hidden) / len(ids)
    return mean / mean.norm()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def cosines(sentence_encoder: Path) -> dict[str, float]:
    question = embedding(sentence_encoder, QUESTION)
    sentences = {text.strip() for text, _ in units_of(message({}, [TEXT, SHORT]), "sentence")}
    return {text: float(question @ embedding(sentence_encoder, text)) for text in sentences}


@pytest.mark.parametrize(("keep", "threshold"), [(0.4, None), (60, None), (1.0, "middle"), (0.9, "middle"), (1.0, 1.0)])
def test_extractive(
    tiny: Decoder, sentence_encoder: Path, cosines: dict[str, float], keep: Any, threshold: Any
) -> None:
    if threshold == "middle":
        threshold = round(sorted(cosines.values())[len(cosines) // 2] - 1e-3, 4)
    plan = {"policy": "extractive", "keep": keep} | ({} if threshold is None else {"threshold": threshold})
    request = message(plan, [TEXT, SHORT])
    pieces = []
    for text, places in units_of(request, "sentence"):
        score = cosines[text.strip()]
        pieces.append((places, -math.inf if threshold is not None and score < threshold else score))
    bench = Bench(tiny, embedding_model=str(sentence_encoder))
    shortened = bench.shorten(request)
    budget = int(keep * (len(TEXT) + len(SHORT))) if isinstance(keep, float) else keep
    assert shortened.prompt == kept_of(request, pieces, budget)
    assert (shortened.context_kept == 0) == (threshold == 1.0)  # nothing may be left
    bench.engine.shortener.stop()


# llmlingua2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.5, 33])
def test_llmlingua2(tiny: Decoder, classifier: Path, keep: Any) -> None:
    request = message({"policy": "llmlingua2", "keep": keep}, [TEXT, SHORT])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(classifier)
    model = AutoModelForTokenClassification.from_pretrained(classifier).eval()
    pieces = []
    for part in request.parts:
        words = [unit for unit in units_of(request, "word") if part.first <= unit[1][0] < part.first + len(part.text)]
        votes: list[list[float]] = [[] for _ in words]
        coded = tokenizer(part.text, add_special_tokens=False, return_offsets_mapping=True)
        for start in range(0, len(coded.input_ids), LONGEST - 2):
            ids = coded.input_ids[start : start + LONGEST - 2]
            with torch.no_grad():
                framed = torch.tensor([[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]])
                probabilities = model(input_ids=framed).logits[0].double().softmax(-1)[1:-1, 1]
            for (_, end), probability in zip(coded.offset_mapping[start:], probabilities.tolist(), strict=False):
                place = part.first + end - 1
                (word,) = [i for i, (_, places) in enumerate(words) if place in places]
                votes[word].append(probability)
        pieces += [
            (places, sum(vote) / len(vote) if vote else 0.0) for (_, places), vote in zip(words, votes, strict=True)
        ]
    bench = Bench(tiny, llmlingua2_model=str(classifier))
    shortened = bench.shorten(request)
    budget = int(keep * (len(TEXT) + len(SHORT))) if isinstance(keep, float) else keep
    assert shortened.prompt == kept_of(request, pieces, budget)
    bench.engine.shortener.stop()


# all ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["selective", "spec_pc", "extractive", "llmlingua2"])
@pytest.mark.parametrize("keep", [1.0, 10_000])
def test_what_keeps_everything_asks_no_model(tiny: Decoder, policy: str, keep: Any) -> None:
    request = message({"policy": policy, "keep": keep})
    bench = Bench(tiny)
    assert bench.shorten(request).prompt == request.prompt
    assert not bench.batches
