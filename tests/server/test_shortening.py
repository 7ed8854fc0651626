"""compression.prompt over HTTP: what is marked, what the engine is asked for, what is said of it, what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import httpx
import msgspec
import pytest

from winnow.engine.compression.registry import PROMPT
from winnow.engine.errors import EngineDied, RequestError
from winnow.engine.models.tokenizer import Tokenizer
from winnow.server.marks import marked_chat, marked_text
from winnow.server.protocol.chat import ChatPrompt
from winnow.server.protocol.responses import ChatCompletion, Completion

from .conftest import HELLO, Connect
from .fake_engine import FakeEngine
from .test_bad_input import error_of
from .test_routes import metrics

pytestmark = pytest.mark.anyio
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DOCUMENT = "The light is 43 m tall. 🦊 Naïve!\n\nDr. Finch kept it."
QUESTION = "How tall is it?"


def part(text: str, context: bool | None = None) -> dict[str, Any]:
    return {"type": "text", "text": text} | ({} if context is None else {"context": context})


def plan(policy: str, **knobs: Any) -> dict[str, Any]:
    return {"prompt": {"policy": policy, "keep": 0.5} | knobs}


PLAN = plan("selective")


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def asking(document: str = DOCUMENT, **fields: Any) -> dict[str, Any]:
    content = [part(document, True), part(QUESTION, False)]
    return {"messages": [{"role": "user", "content": content}], "compression": PLAN} | fields


def unmarked(body: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(body).replace(', "context": true', "").replace(', "context": false', ""))


async def test_a_chat(http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    answer = await http.post(CHAT, json=asking())
    assert answer.status_code == 200, answer.text
    body = ChatCompletion.model_validate(answer.json())
    (asked,), (submit,) = engine.shortens, engine.submits
    full = (await http.post("/tokenize", json={"messages": unmarked(asking())["messages"]})).json()["tokens"]
    assert asked.prompt == full  # marks leave no trace
    (context,) = asked.parts
    inside = tokenizer.decode(full[context.first : context.first + len(context.ends)], False)
    assert DOCUMENT.endswith(inside)
    assert asked.question == QUESTION
    assert asked.plan == PLAN["prompt"]
    assert submit.prompt == [token for i, token in enumerate(full) if i != context.first]
    assert submit.plan == {}
    assert submit.sampling.max_tokens == 2048 - len(submit.prompt)  # what was dropped makes room
    assert body.usage.prompt_tokens == len(full) - 1  # what the model read
    assert body.usage.compression is not None
    assert body.usage.compression.plan is not None
    assert body.usage.compression.plan == {
        "kv": {"residual": 32},
        "prompt": {"policy": "selective", "keep": 0.5, "unit": "phrase"},
    }
    assert body.usage.compression.prompt is not None
    assert body.usage.compression.prompt.model_dump() == {
        "tokens_before": len(full),
        "tokens_after": len(full) - 1,
        "context_before": len(context.ends),
        "context_after": len(context.ends) - 1,
    }
    samples = await metrics(http)
    labels = frozenset({("policy", "selective")})
    assert samples["winnow:prompt_context_tokens_total", labels] == len(context.ends)
    assert samples["winnow:prompt_context_tokens_kept_total", labels] == len(context.ends) - 1


async def test_with_kv_compression_and_salt(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    both = PLAN | {"kv": {"format": "int8"}}
    answer = await http.post(CHAT, json=asking(compression=both, cache_salt="mine", n=2))
    assert answer.status_code == 200
    assert engine.submits[0].plan == {"kv": {"format": "int8"}}
    assert engine.shortens[0].cache_salt == engine.submits[0].cache_salt == "mine"
    report = answer.json()["usage"]["compression"]
    assert report["sequences"] == 2
    assert report["prompt"]["tokens_before"] == len(engine.shortens[0].prompt)  # the choices share it


async def test_a_stream(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await http.post(CHAT, json=asking(stream=True, stream_options={"include_usage": True}))
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    report = {"tokens_before": len(engine.shortens[0].prompt), "tokens_after": len(engine.submits[0].prompt)}
    for said in (events[-2]["compression"], events[-1]["usage"]["compression"]):
        assert report.items() <= said["prompt"].items()
    assert events[-1]["usage"]["prompt_tokens"] == report["tokens_after"]


async def test_marks_without_a_plan_change_nothing(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    for compression in (None, {}, {"prompt": None}, {"prompt": {"policy": "selective", "keep": 1.0}}):
        body = asking(compression=compression)
        assert (await http.post(CHAT, json=body)).status_code == 200
        assert (await http.post(CHAT, json=unmarked(body))).status_code in (200, 400)
    assert not engine.shortens
    assert len({tuple(submit.prompt) for submit in engine.submits}) == 1


async def test_the_servers_own_plan_shortens_what_is_marked(connect: Connect, engine: FakeEngine) -> None:
    async with connect(compression=PLAN) as http:
        assert (await http.post(CHAT, json={"messages": HELLO})).status_code == 200
        assert not engine.shortens
        assert (await http.post(CHAT, json=asking(compression=None))).status_code == 200
        assert len(engine.shortens) == 1
        assert (
            error_of(await http.post(CHAT, json={"messages": HELLO, "compression": PLAN}))["param"]
            == "compression.prompt"
        )


async def test_a_completion(http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    prompt = f"Read this. {DOCUMENT} And this: 1 2 3. {QUESTION}"
    body = {"prompt": prompt, "context": ["1 2 3", DOCUMENT], "compression": PLAN, "echo": True, "max_tokens": 4}
    answer = await http.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    Completion.model_validate(answer.json())
    asked = engine.shortens[0]
    assert asked.prompt == tokenizer.encode(prompt)
    assert [text.text for text in asked.parts] == [DOCUMENT, "1 2 3"]
    assert asked.question == f"Read this.\nAnd this:\n. {QUESTION}"
    assert answer.json()["choices"][0]["text"].startswith(tokenizer.decode(engine.submits[0].prompt))


BAD: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": HELLO, "compression": PLAN}, "compression.prompt"),
    (CHAT, asking("  \n "), "compression.prompt"),  # nothing but space is marked
    (CHAT, asking(compression={"prompt": {"policy": "selective", "keep": 0}}), "compression.prompt.keep"),
    (CHAT, asking(compression={"prompt": {"policy": "best", "keep": 0.5}}), "compression.prompt.policy"),
    (CHAT, asking(compression={"prompt": {"policy": "llmlingua2", "keep": 0.5}}), "compression.prompt.policy"),
    (
        CHAT,
        asking(compression={"prompt": {"policy": "spec_pc", "keep": 0.5, "first_layer": -1}}),
        "compression.prompt.first_layer",
    ),
    (
        CHAT,
        {
            "messages": [{"role": "user", "content": [part("x", True)]}],
            "compression": {"prompt": {"policy": "extractive", "keep": 0.5}},
        },
        "messages",
    ),
    (CHAT, {"messages": [{"role": "system", "content": [part("x", True)]}, *HELLO]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "user", "content": [part("x") | {"context": 1}]}]}, "messages[0].content"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "context": True}]}]},
        "messages[0].content",
    ),
    (CHAT, asking("word " * 2100), "messages"),
    (COMPLETIONS, {"prompt": "x y", "compression": PLAN}, "compression.prompt"),
    (COMPLETIONS, {"prompt": [5, 6], "compression": PLAN}, "compression.prompt"),
    (COMPLETIONS, {"prompt": "x y", "context": "z", "compression": PLAN}, "context"),
    (COMPLETIONS, {"prompt": "x x", "context": "x", "compression": PLAN}, "context"),
    (COMPLETIONS, {"prompt": "x y z", "context": ["x y", "y z"], "compression": PLAN}, "context"),
    (COMPLETIONS, {"prompt": ["x", "y"], "context": "x"}, "context"),
    (COMPLETIONS, {"prompt": [5, 6], "context": "x"}, "context"),
    (COMPLETIONS, {"prompt": "x", "context": ""}, "context"),
    (COMPLETIONS, {"prompt": "x", "context": [""]}, "context[0]"),
    (COMPLETIONS, {"prompt": "x", "context": ["x"] * 65}, "context"),
]


@pytest.mark.parametrize(("url", "body", "param"), BAD, ids=lambda value: json.dumps(value)[-50:])
async def test_refused(http: httpx.AsyncClient, engine: FakeEngine, url: str, body: dict[str, Any], param: str) -> None:
    assert engine.info is not None
    engine.info = msgspec.structs.replace(
        engine.info, missing_policies={"llmlingua2": "there is no classifier: start …"}
    )
    for stream in (False, True):
        assert error_of(await http.post(url, json=body | {"stream": stream}))["param"] == param
    assert not engine.shortens
    assert not engine.submits


async def test_longer_than_the_context_where_no_model_must_read_it(connect: Connect, engine: FakeEngine) -> None:
    """The text is what other models read; what is left has to fit."""
    body = asking("word " * 2100, compression={"prompt": {"policy": "extractive", "keep": 0.1}})
    async with connect() as http:
        answer = error_of(await http.post(CHAT, json=body))  # the scripted engine drops a single token
        assert len(engine.shortens) == 1
        assert answer["code"] == "context_length_exceeded"
    async with connect(max_unshortened_tokens=1000) as http:
        assert "shortens at most 1000" in error_of(await http.post(CHAT, json=body))["message"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(RequestError("compression.prompt.first_layer", "no such layer"), 400), (EngineDied("x"), 503)],
)
async def test_an_engine_that_cannot(
    http: httpx.AsyncClient, engine: FakeEngine, error: Exception, status: int
) -> None:
    engine.error = error
    assert error_of(await http.post(CHAT, json=asking()), status)
    assert not engine.submits


async def test_the_catalogue(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert engine.info is not None
    missing = {"llmlingua2": "there is no classifier"}
    engine.info = msgspec.structs.replace(engine.info, missing_policies=missing)
    compression = (await http.get("/v1/models/default")).json()["compression"]
    assert set(compression["prompt"]) == set(PROMPT)
    assert compression["prompt"]["spec_pc"]["properties"]["pool"]["default"] == 64
    assert compression["schema"]["properties"]["prompt"]
    assert compression["missing"] == missing


# Marks --------------------------------------------------------------------------------------------------------------


class Rewriting:
    """A tokenizer whose chat template changes what it is given."""

    def __init__(self, tokenizer: Tokenizer, change: Any):
        self._tokenizer, self._change = tokenizer, change
        self.chat_template = tokenizer.chat_template
        self.template_takes_text = tokenizer.template_takes_text

    def apply_chat_template(self, messages: Any, **rest: Any) -> str:
        return self._change(self._tokenizer.apply_chat_template(messages, **rest))


def chat_of(*contents: Any) -> ChatPrompt:
    return ChatPrompt.model_validate({"messages": [{"role": "user", "content": content} for content in contents]})


@pytest.mark.parametrize(
    "text", ["plain", "  space around\n", "\ue0000\ue001 odd \ue0000\ue002", "🦊", "<|im_end|>\nx", "日本語。です"]
)
def test_marks_leave_no_trace(tokenizer: Tokenizer, text: str) -> None:
    chat = chat_of([part("before"), part(text, True), part("between"), part(text, True)], [part(text), part("end")])
    marked = marked_chat(tokenizer, chat)
    whole = tokenizer.apply_chat_template([{"role": "user", "content": message.text} for message in chat.messages])
    assert marked.tokens == tokenizer.encode(whole, False)
    assert [context.text for context in marked.parts] == [text.strip()] * 2
    assert marked.question == f"{text}\nend".strip()
    for context in marked.parts:
        tokens = marked.tokens[context.first : context.first + len(context.ends)]
        assert text.strip().endswith(tokenizer.decode(tokens, False))
        for i, end in enumerate(context.ends):
            decoded = tokenizer.decode(tokens[: i + 1], False)
            upto = decoded.rstrip("\ufffd")  # half a character ends where the whole one does
            assert context.text[: end - (decoded != upto)].endswith(upto)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text.replace("secret", "public"), None),  # alike with and without marks: nothing is wrong
        (lambda text: text.replace("\ue000", "<"), "changes text"),
        (lambda text: text[: text.index("secret")] if "\ue000" in text else text, "cuts text"),
        (lambda text: text[text.index("secret") :], "cuts text"),
    ],
)
def test_templates_that_touch_what_is_marked(tokenizer: Tokenizer, change: Any, why: str | None) -> None:
    chat = chat_of([part("a secret document", True), part("?")])
    rewriting: Any = Rewriting(tokenizer, change)
    if why is None:
        rewriting.encode_with_bounds = tokenizer.encode_with_bounds
        assert marked_chat(rewriting, chat).parts[0].text == "a public document"
    else:
        with pytest.raises(RequestError, match=why):
            marked_chat(rewriting, chat)


def test_a_token_that_is_partly_marked_is_not(tokenizer: Tokenizer) -> None:
    text = "unbelievable tokenization"
    assert [tokenizer.token_text(token) for token in tokenizer.encode(text)] == [
        "un",
        "belie",
        "vable",
        " token",
        "ization",
    ]
    (context,) = marked_text(tokenizer, text, ["lievable tokeniz"], True).parts
    assert (context.first, context.ends) == (2, [8, 14])
    assert marked_text(tokenizer, text, ["elie"], True).parts == []
    assert len(tokenizer.encode(" 🦊")) > 1
    assert marked_text(tokenizer, "a 🦊", ["🦊"], True).parts == []  # its first token is the space's too


def test_bounds_of_tokens(tokenizer: Tokenizer) -> None:
    text = "A naïve 🦊🦊 test\n\n of 日本"
    tokens, bounds = tokenizer.encode_with_bounds(text)
    assert tokens == tokenizer.encode(text)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == len(text)
    for (_, last), (start, end) in pairwise(bounds):
        assert end == last >= start or (end > last == start)  # parts of one character, or its neighbour
