"""compression.prompt against a running server with the default model: every policy, alone and beside others."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerFast

from winnow.engine.compression.registry import PROMPT

from ..prompt.encoders import LONGEST
from .test_openai_client import MODEL, compression_of

DOCUMENT = (
    "The lighthouse at the cape was built in 1871 and is 43 metres tall. Its lamp burned whale oil, then paraffin. "
    "The keeper wrote a diary of the weather.\nThe village has a harbour, two pubs and a school. "
    "The secret code of the lamp room is 7342. In summer many visitors come to see the cliffs.\n"
) * 3
QUESTION = "What is the secret code of the lamp room?"
MESSAGES: list[Any] = [
    {"role": "system", "content": "Answer briefly."},
    {
        "role": "user",
        "content": [{"type": "text", "text": DOCUMENT, "context": True}, {"type": "text", "text": QUESTION}],
    },
]


def ask(client: OpenAI, policy: str, keep: Any = 0.5, stream: bool = False, **fields: Any) -> Any:
    plan = {"prompt": {"policy": policy, "keep": keep}} | fields.pop("compression", {})
    options = {"stream_options": {"include_usage": True}} if stream else {}
    return client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=0,
        max_tokens=12,
        stream=stream,
        extra_body={"compression": plan},
        **options,
        **fields,
    )


@pytest.fixture(scope="module")
def whole(server: Any) -> tuple[str, int]:
    """The answer and the prompt's tokens without a plan."""
    with server.http() as http:
        body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}
        answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize("policy", PROMPT)
def test_each_policy(client: OpenAI, whole: tuple[str, int], policy: str) -> None:
    answer = ask(client, policy)
    text, usage = answer.choices[0].message.content, answer.usage
    report = compression_of(usage)["prompt"]
    assert report["tokens_before"] == whole[1]
    assert usage.prompt_tokens == report["tokens_after"] < whole[1]
    dropped = report["context_before"] - report["context_after"]
    assert dropped == report["tokens_before"] - report["tokens_after"]
    assert 0 < report["context_after"] <= report["context_before"] // 2
    # What was read is held: tokens that were dropped take no memory.
    assert compression_of(usage)["tokens_seen"] == report["tokens_after"] + usage.completion_tokens - 1
    again = ask(client, policy)
    assert again.choices[0].message.content == text
    assert again.usage.prompt_tokens_details.cached_tokens > usage.prompt_tokens - 32  # the shortened prompt is cached
    chunks = list(ask(client, policy, stream=True))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == text
    assert compression_of(chunks[-1].usage)["prompt"] == report


def worth(classifier: Path, words: list[str]) -> list[float]:
    """What a checkpoint thinks of each word of a text: the mean over its tokens, read LONGEST - 2 at a time."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(classifier)
    model = AutoModelForTokenClassification.from_pretrained(classifier).eval()
    coded = tokenizer(" ".join(words), add_special_tokens=False, return_offsets_mapping=True)
    votes: list[list[float]] = [[] for _ in words]
    for start in range(0, len(coded.input_ids), LONGEST - 2):
        chunk = slice(start, start + LONGEST - 2)
        framed = torch.tensor([[tokenizer.cls_token_id, *coded.input_ids[chunk], tokenizer.sep_token_id]])
        with torch.no_grad():
            preserve = model(input_ids=framed).logits[0, 1:-1].double().softmax(-1)[:, 1].tolist()
        for (_, end), vote in zip(coded.offset_mapping[chunk], preserve, strict=True):
            votes[" ".join(words)[:end].count(" ")].append(vote)  # a space goes with the word behind it
    return [sum(vote) / len(vote) for vote in votes]


def test_the_words_of_a_checkpoint(client: OpenAI, classifier: Path) -> None:
    """What is left of a document is what the operator's LLMLingua-2 ranks highest, and the question."""
    names = ("lighthouse", "code", "lamp", "harbour", "keeper", "village", "visitor", "cliff", "school", "weather")
    words = [f"{name}{suffix}" for name in names for suffix in ("", "s", "like", "room")]
    question = "\n\nWhat was that about?"
    answer = client.completions.create(
        model=MODEL,
        prompt=" ".join(words) + question,
        max_tokens=1,
        temperature=0,
        echo=True,
        extra_body={"context": [" ".join(words)], "compression": {"prompt": {"policy": "llmlingua2", "keep": 0.5}}},
    )
    document, asked, _ = answer.choices[0].text.partition(question)
    assert asked, "the question is read as it is"
    left = [words.index(word) for word in document.split()]
    scores = worth(classifier, words)
    ranked = sorted(range(len(words)), key=lambda i: -scores[i])
    assert left == sorted(ranked[: len(left)])
    assert scores[ranked[len(left) - 1]] - scores[ranked[len(left)]] > 1e-5, "choose another text"
    report = compression_of(answer.usage)["prompt"]
    assert 0 < report["context_after"] <= report["context_before"] // 2
    assert len(words) > len(left) > len(words) // 4


def test_what_keeps_everything_is_no_plan(client: OpenAI, whole: tuple[str, int]) -> None:
    for keep in (1.0, 100_000):
        answer = ask(client, "selective", keep)
        assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == whole


def test_beside_others(client: OpenAI) -> None:
    """With KV compression, and while others read and generate: the same answers as alone."""
    plan = {"kv": {"evict": {"policy": "snapkv", "budget": 0.5}, "format": "int8"}}

    def answers() -> list[str]:
        return [ask(client, policy, 0.4, compression=plan).choices[0].message.content for policy in PROMPT]

    alone, together = answers(), [""] * len(PROMPT)

    def answer(i: int, policy: str) -> None:
        together[i] = ask(client, policy, 0.4, compression=plan).choices[0].message.content

    def talk() -> None:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=32)

    threads = [threading.Thread(target=answer, args=pair) for pair in enumerate(PROMPT)]
    threads.append(threading.Thread(target=talk))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_refusals(client: OpenAI) -> None:
    for fields, param in [
        ({"policy": "spec_pc", "keep": 0.5, "first_layer": 30}, "compression.prompt.first_layer"),  # of 30 layers
        ({"policy": "selective", "keep": 0}, "compression.prompt.keep"),
        ({"policy": "unheard_of", "keep": 0.5}, "compression.prompt.policy"),
    ]:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=4, extra_body={"compression": {"prompt": fields}}
            )
        assert caught.value.param == param
