"""The default model's tokenizer and those of Hugging Face directories; streaming; chat templates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from winnow.engine.errors import ModelError, RequestError
from winnow.engine.models.files import resolve_model
from winnow.engine.models.gguf_file import GgufFile
from winnow.engine.models.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces,\n\n\ttabs\r\n and trailing  ",
    "In 2024, 1234567 people; 3.14159  42",
    "don't, I'LL, they've",
    "naïve café — “quotes” …",
    "你好，世界！こんにちは 안녕",
    "🙂👩‍👩‍👧‍👦🇨🇭 é (e + accent) \u200b\ufeff",
    "def f(x):\n    return x**2  # ½ ² ٣ Ⅷ",
    "\x00\x07 control",
    "\ufffd already broken",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("default")


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    stream = tokenizer.stream(**options)
    return [*(stream.push([token]) for token in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert "".join(streamed(tokenizer, ids)) == text


def test_every_digit_is_a_token(tokenizer: Tokenizer) -> None:
    texts = [tokenizer.token_text(token) for token in tokenizer.encode("in  2024 and ٣½")]
    # Both spaces before a number are one token: GPT-2's own split would leave the second one with the number.
    assert texts[:7] == ["in", "  ", "2", "0", "2", "4", " and"]


def test_special_tokens_are_whole_wherever_they_stand(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|im_start|>b<|im_end|><|im_end|> c<file_sep>")
    assert [tokenizer.token_text(token) for token in ids] == [
        "a", "<|im_start|>", "b", "<|im_end|>", "<|im_end|>", " c", "<file_sep>",
    ]  # fmt: skip
    assert tokenizer.decode(ids) == "ab c"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_start|>b<|im_end|><|im_end|> c<file_sep>"
    assert [tokenizer.is_special(token) for token in ids] == [False, True, False, True, True, False, True]
    assert "".join(streamed(tokenizer, ids)) == "ab c"
    assert "".join(streamed(tokenizer, ids, skip_special_tokens=False)) == tokenizer.decode(ids, False)


def test_ids_are_those_of_the_file(tokenizer: Tokenizer) -> None:
    tokens = GgufFile(resolve_model("default")).metadata["tokenizer.ggml.tokens"]
    assert tokenizer.vocab_size == len(tokens) == 49152
    assert tokenizer.hf.convert_ids_to_tokens(range(len(tokens))) == tokens
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.hf.special_tokens_map["bos_token"] == "<|im_start|>"
    assert tokenizer.encode("a", add_special_tokens=True) == tokenizer.encode("a", add_special_tokens=False)


@pytest.mark.parametrize("text", ["🙂", "日本語の文章です", "a🙂b👩‍👩‍👧c", "ελληνικά", "ﷺ𝔘"])
def test_streaming_never_breaks_a_character(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert len(ids) > 1
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""
    # What is out is what the tokens so far say, less an unfinished character.
    for count in range(len(ids) + 1):
        assert "".join(pieces[:count]) == tokenizer.decode(ids[:count]).rstrip("\ufffd")
    stream = tokenizer.stream()
    assert stream.push(ids) + stream.finish() == text


def test_streaming_bytes_that_are_no_text(tokenizer: Tokenizer) -> None:
    smile = tokenizer.encode("🙂")
    assert streamed(tokenizer, smile[:-1])[-1] == "\ufffd"
    broken = [*smile[:-1], *tokenizer.encode("abc"), smile[-1]]
    assert "".join(streamed(tokenizer, broken)) == tokenizer.decode(broken)
    assert "abc" in tokenizer.decode(broken)


def test_unknown_ids_have_no_text(tokenizer: Tokenizer) -> None:
    for token in (tokenizer.vocab_size, 10**6):
        assert tokenizer.token_bytes(token) == b""
        assert tokenizer.token_text(token) == ""


CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <|im_end|> {{ 7*7 }} {% raw %}"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "你好"},
    ],
]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_is_the_template_rendered(
    messages: list[dict[str, Any]], add_generation_prompt: bool, tokenizer: Tokenizer
) -> None:
    template = GgufFile(resolve_model("default")).metadata["tokenizer.chat_template"]
    direct = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    expected = direct.render(messages=messages, add_generation_prompt=add_generation_prompt)
    assert tokenizer.chat_template == template
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.parametrize(
    ("messages", "variables", "param"),
    [
        ([], {}, "messages"),
        ([{"role": "user"}], {}, "messages"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], {}, "messages"),
        ([{"content": "Hi"}], {}, "messages"),
        (["Hi"], {}, "messages"),
        (CHATS[0], {"chat_template": "mine"}, "chat_template_kwargs"),
        (CHATS[0], {"tokenize": True}, "chat_template_kwargs"),
        (CHATS[0], {"conversation": []}, "chat_template_kwargs"),
    ],
)
def test_chats_that_are_refused(messages: Any, variables: dict[str, Any], param: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError) as caught:
        tokenizer.apply_chat_template(messages, variables=variables)
    assert caught.value.param == param


# ---- Hugging Face directories ----


def save(folder: Path, backend: Backend, **options: Any) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=backend, **options).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return folder


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the cat sat on the mat", "hello there"], trainer)
    backend.enable_truncation(3)
    return backend


def test_directory(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    template += "{% endif %}{{ m.content }}{% if shout %}!{% endif %}{% endfor %}"
    folder = save(tmp_path, byte_level(), bos_token="<s>", eos_token="</s>", chat_template=template)
    tokenizer = load_tokenizer(str(folder))
    assert [tokenizer.token_text(token) for token in tokenizer.encode("the cat</s>")] == ["the", " cat", "</s>"]
    assert tokenizer.eos_token_ids == (tokenizer.hf.eos_token_id,)
    assert len(tokenizer.encode("the cat sat on the mat")) > 3, "truncation in the file is not for us"
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages) == "<s>Hi"
    assert tokenizer.apply_chat_template(messages, variables={"shout": True}) == "<s>Hi!"
    with pytest.raises(RequestError, match="refuses these messages: no tools here"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])
    for text in TEXTS:
        assert "".join(streamed(tokenizer, tokenizer.encode(text))) == text


def test_directory_says_which_tokens_end(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level(), eos_token="</s>")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.eos_token_ids == (5, 6)
    assert tokenizer.chat_template is None
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_templates_are_sandboxed(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level(), chat_template="{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RequestError, match="refuses"):
        load_tokenizer(str(folder)).apply_chat_template([{"role": "user", "content": "Hi"}])


def test_spaces_of_sentencepiece_in_a_stream(tmp_path: Path) -> None:
    words = ["<unk>", "▁", "▁the", "▁cat", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {word: token for token, word in enumerate(words)}
    merges: list[tuple[str, str]] = []
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = load_tokenizer(str(save(tmp_path, backend)))
    the_cats = [2, 3, 4]
    assert streamed(tokenizer, the_cats) == ["the", " cat", "s", ""]
    assert "".join(streamed(tokenizer, the_cats)) == tokenizer.decode(the_cats)
    assert streamed(tokenizer, the_cats, continues=True) == [" the", " cat", "s", ""]
    smile = tokenizer.encode("🙂")
    assert [tokenizer.token_bytes(token) for token in smile] == [b" ", b"\xf0", b"\x9f", b"\x99", b"\x82"]
    assert streamed(tokenizer, smile) == ["", "", "", "", "🙂", ""]


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_torch_is_never_imported(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level(), chat_template="{{ messages[0].content }}")
    program = f"""
import sys
from winnow.engine.models.tokenizer import load_tokenizer
for name in ("default", {str(folder)!r}):
    tokenizer = load_tokenizer(name)
    text = tokenizer.apply_chat_template([{{"role": "user", "content": "Hi"}}])
    tokenizer.stream().push(tokenizer.encode(text))
assert "torch" not in sys.modules, sorted(name for name in sys.modules if name.startswith("transformers"))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
