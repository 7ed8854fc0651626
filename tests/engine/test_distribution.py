"""Sampled answers are distributed as the model says, guessed ahead or not: a chi-square test over whole answers.

That answers with and without guesses are the same, token for token, is tested elsewhere; here neither is trusted.
"""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
from transformers import PreTrainedModel

from winnow.engine.models.decoder import Decoder
from winnow.engine.speculation.registry import METHODS

from ..models.checkpoints import logits_of, prompt_of, random_model
from .bench import Bench
from .drafts import first_layers

PROMPT = prompt_of(12, 4)
TOP_K, TEMPERATURE, LENGTH = 3, 1.6, 4
CHOICES, REQUESTS = 64, 25
FEW = [3, 17, 40, 77, 121]
"""Tokens of answers in which something can be looked up: whatever was said stands in the prompt, too"""
REPEATING = [*PROMPT, *(FEW[token % len(FEW)] for token in prompt_of(24, 5))]
GUESSES: dict[str, dict[str, Any]] = {
    "": {},
    **{method: {"method": method, "tokens": 3} for method in METHODS},
    "prompt_lookup": {"method": "prompt_lookup", "tokens": 3, "ngram_max": 2, "ngram_min": 1},
}

Answers = dict[tuple[int, ...], float]


def foretold(model: PreTrainedModel, temperature: float, prompt: list[int], known: list[int]) -> Answers:
    """The probability of each answer: of each token the likeliest `TOP_K` of those that are known count."""
    answers: Answers = {(): 1.0}
    for _ in range(LENGTH):
        longer: Answers = {}
        for said, share in answers.items():
            scores, places = (logits_of(model, [*prompt, *said])[-1][known] / temperature).topk(TOP_K)
            for place, part in zip(places.tolist(), scores.double().softmax(0).tolist(), strict=True):
                longer[*said, known[place]] = share * part
        answers = longer
    return answers


def surprise(counts: Counter[tuple[int, ...]], shares: Answers) -> float:
    """The chi-square statistic as a standard normal variable (Wilson and Hilferty, 1931); answers that are too rare
    for it count as one."""
    total = sum(counts.values())
    rare = {answer for answer in {*shares, *counts} if total * shares.get(answer, 0.0) < 5}
    cells = [(counts[answer], total * share) for answer, share in shares.items() if answer not in rare]
    cells.append((sum(counts[answer] for answer in rare), total * sum(shares.get(answer, 0.0) for answer in rare)))
    chi = sum((seen - wanted) ** 2 / max(wanted, 1e-9) for seen, wanted in cells if wanted or seen)
    spread = 2 / (9 * (len(cells) - 1))
    return float(((chi / (len(cells) - 1)) ** (1 / 3) - (1 - spread)) / spread**0.5)


@pytest.mark.parametrize("method", GUESSES)
def test_answers_are_distributed_as_the_model_says(tiny: Decoder, method: str) -> None:
    bench = Bench(tiny, draft=first_layers(tiny))
    prompt, known = (REPEATING, FEW) if method == "prompt_lookup" else (PROMPT, list(range(tiny.config.vocab_size)))
    sampling: dict[str, Any] = {"temperature": TEMPERATURE, "top_k": TOP_K, "n": CHOICES}
    if known == FEW:
        sampling["logit_bias"] = dict.fromkeys(FEW, 100.0)
    for seed in range(REQUESTS):
        bench.submit(str(seed), prompt, LENGTH, speculative=GUESSES[method], **sampling | {"seed": seed})
    counts = Counter(tuple(seen.tokens) for seen in bench.run().values())
    assert sum(counts.values()) == CHOICES * REQUESTS
    if method:
        stats = bench.engine.stats
        assert stats.accepted_tokens_total > 200
        assert stats.draft_tokens_total - stats.accepted_tokens_total > 200
    model = random_model("llama", max_position_embeddings=1024)
    shares = foretold(model, TEMPERATURE, prompt, known)
    assert len(set(counts)) > 30
    assert abs(surprise(counts, shares)) < 3
    # A little off, and it would show.
    assert surprise(counts, foretold(model, 0.8 * TEMPERATURE, prompt, known)) > 3


def test_the_surprise_of_what_is_even() -> None:
    shares = dict.fromkeys(product(range(3), repeat=3), 1 / 27)
    even = Counter(dict.fromkeys(shares, 100))
    assert surprise(even, shares) < -3  # too even
    assert surprise(Counter({answer: 60 + 80 * (answer[0] == 1) for answer in shares}), shares) > 10
