"""Images over HTTP to a real engine: OpenAI's client asks a tiny model that sees, transformers says what to expect."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from openai import BadRequestError, OpenAI
from PIL import Image

from ..models.vision_checkpoints import image_of, image_processor, save_vlm
from ..server.pictures import data_uri, image_part, text_part
from ..server.test_image_decode import encoded
from .serving import KEY, Serving, serving

SHAPES = ((32, 32), (48, 40), (20, 64))
PATCHES = 16
"""Tokens of an image, of any shape"""


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, Any]]:
    """A server of a LLaVA with random weights, and transformers' model of it."""
    folder = tmp_path_factory.mktemp("images")
    model = save_vlm(folder / "tiny", "llava")
    options = ("--model", str(folder / "tiny"), "--kv-memory-gib", "0.1", "--weights", "f32")
    with serving(folder, *options) as server:
        yield server, model


@pytest.fixture(scope="module")
def server(seeing: tuple[Serving, Any]) -> Serving:
    return seeing[0]


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def shown(image: Image.Image) -> dict[str, Any]:
    return image_part(data_uri(encoded(image)))


def user(*parts: dict[str, Any]) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


def greedy(client: OpenAI, messages: list[Any], **fields: Any) -> Any:
    fields = {"max_tokens": 8, "temperature": 0, "logprobs": True} | fields
    return client.chat.completions.create(model="tiny", messages=messages, **fields)


def tokens_of(choice: Any) -> list[str]:
    return [entry.token for entry in choice.logprobs.content]


def expected(server: Serving, model: Any, messages: list[Any], images: list[Image.Image]) -> list[str]:
    """What transformers says, token by token, of the prompt that /tokenize writes."""
    with server.http() as http:
        told = http.post("/tokenize", json={"messages": messages}).raise_for_status().json()
        pixels = torch.from_numpy(image_processor("llava")(images, return_tensors="np")["pixel_values"])
        prompt = torch.tensor([told["tokens"]])
        assert int((prompt == model.config.image_token_id).sum()) == PATCHES * len(images)
        said = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=pixels,
            max_new_tokens=8,
            do_sample=False,
        )[0, prompt.shape[1] :].tolist()
        end = model.config.text_config.eos_token_id
        said = said[: said.index(end)] if end in said else said
        return [http.post("/detokenize", json={"tokens": [token]}).json()["prompt"] for token in said]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_answers_are_those_of_transformers(seeing: tuple[Serving, Any], client: OpenAI, count: int) -> None:
    server, model = seeing
    images = [image_of(*shape, seed=i) for i, shape in enumerate(SHAPES[:count])]
    messages = user(*map(shown, images), text_part("what is this ?"))
    answer = greedy(client, messages)
    assert tokens_of(answer.choices[0]) == expected(server, model, messages, images)
    details = answer.usage.prompt_tokens_details.model_dump()
    assert details["image_tokens"] == details["image_tokens_kept"] == PATCHES * count


def test_several_turns(seeing: tuple[Serving, Any], client: OpenAI) -> None:
    server, model = seeing
    images = [image_of(32, 32, seed=i) for i in range(2)]
    first = user(shown(images[0]), text_part("what is this ?"))
    messages = [
        *first,
        {"role": "assistant", "content": "a red circle"},
        *user(shown(images[1]), text_part("and this ?")),
    ]
    assert tokens_of(greedy(client, first).choices[0]) == expected(server, model, first, images[:1])
    assert tokens_of(greedy(client, messages).choices[0]) == expected(server, model, messages, images)


def test_another_image_another_answer(client: OpenAI) -> None:
    def logprobs(seed: int) -> list[float]:
        answer = greedy(client, user(shown(image_of(32, 32, seed)), text_part("what ?")))
        return [entry.logprob for entry in answer.choices[0].logprobs.content]

    assert logprobs(1) == logprobs(1)
    assert logprobs(1) != logprobs(2)


def test_streams_and_choices(client: OpenAI) -> None:
    messages = user(shown(image_of(32, 32)), text_part("what ?"))
    whole = greedy(client, messages, n=2)
    assert tokens_of(whole.choices[0]) == tokens_of(whole.choices[1])
    said: list[list[str]] = [[], []]
    usage = None
    for chunk in greedy(client, messages, n=2, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.logprobs is not None:
                said[choice.index] += tokens_of(choice)
    assert said == [tokens_of(choice) for choice in whole.choices]
    assert usage is not None
    assert usage.prompt_tokens_details.model_dump()["image_tokens"] == PATCHES


def test_pruned(client: OpenAI, server: Serving) -> None:
    messages = user(shown(image_of(32, 32)), text_part("what ?"))
    plan = {"vision": {"policy": "uniform", "keep": 4}}
    for _ in range(2):  # encoded, and from the cache
        answer = greedy(client, messages, extra_body={"compression": plan})
        details = answer.usage.prompt_tokens_details.model_dump()
        assert (details["image_tokens"], details["image_tokens_kept"]) == (PATCHES, 4)
    everything = greedy(client, messages, extra_body={"compression": {"vision": {"policy": "uniform", "keep": 1.0}}})
    plain = greedy(client, messages)
    assert [e.logprob for e in everything.choices[0].logprobs.content] == [
        e.logprob for e in plain.choices[0].logprobs.content
    ]
    assert server.metric("image_tokens_kept_total", policy="uniform") == 8


def test_a_bad_image_beside_good_ones(client: OpenAI, server: Serving) -> None:
    image = image_of(32, 32)
    good, bad = shown(image), image_part(data_uri(encoded(image)[:200]))

    def ask(part: dict[str, Any]) -> Any:
        try:
            return tokens_of(greedy(client, user(part, text_part("what ?"))).choices[0])
        except BadRequestError as error:
            return error.body

    alone = ask(good)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [good, bad] * 4))
    assert answers[::2] == [alone] * 4
    for error in answers[1::2]:
        assert (error["param"], error["code"]) == ("messages[0].content[0].image_url", "image_parse_error")
    server.until_idle()


def test_what_the_model_sees(server: Serving) -> None:
    with server.http() as http:
        assert http.get("/v1/models/tiny").json()["sees"] == ["image"]
        video = {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AAAA"}}
        refused = http.post("/v1/chat/completions", json={"messages": user(video)})
        assert refused.status_code == 400
        assert "reads no videos" in refused.json()["error"]["message"]
