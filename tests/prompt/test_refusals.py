"""What the engine refuses to shorten, and what becomes of models that fail."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from winnow.engine.config import EngineSettings
from winnow.engine.errors import ModelError, PlanNotSupported, PromptTooLong, RequestError
from winnow.engine.messages import ContextPart
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.encoders import classifier_folder, embedding_folder

from ..engine.bench import Bench
from .encoders import random_sentence_encoder
from .messages import TEXT, message


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [ContextPart("", 5, [])],
        [ContextPart("abc", 0, [1, 2, 4])],  # beyond the text
        [ContextPart("abc", 0, [0, 1])],
        [ContextPart("abc", 0, [2, 1])],
        [ContextPart("abc", 9, [1, 2])],  # beyond the prompt
        [ContextPart("abc", -1, [1, 2])],
        [ContextPart("abc", 0, [1, 2]), ContextPart("abc", 1, [1])],  # one over the other
    ],
)
def test_context_that_is_nowhere(tiny: Decoder, parts: list[ContextPart]) -> None:
    bench = Bench(tiny)
    request = msgspec.structs.replace(message({"policy": "selective", "keep": 0.5}), prompt=[5] * 10, parts=parts)
    with pytest.raises(RequestError, match="context"):
        bench.engine.shorten(request)
    assert bench.engine.is_idle


def test_prompts_that_are_none(tiny: Decoder) -> None:
    bench = Bench(tiny, max_model_len=100)
    request = message({"policy": "selective", "keep": 0.5})
    with pytest.raises(RequestError, match="must be below 160"):
        bench.engine.shorten(msgspec.structs.replace(request, prompt=[160, *request.prompt[1:]]))
    with pytest.raises(PromptTooLong, match="exceed the 100"):
        bench.engine.shorten(request)
    with pytest.raises(RequestError, match="known policies: selective"):
        bench.engine.shorten(msgspec.structs.replace(request, plan={}))
    with pytest.raises(PlanNotSupported, match="3 layers"):
        bench.engine.shorten(message({"policy": "spec_pc", "keep": 0.5, "first_layer": 3}))
    for policy in bench.engine.info.missing_policies:
        with pytest.raises(RequestError, match="not here"):
            bench.engine.shorten(message({"policy": policy, "keep": 0.5}))
    with pytest.raises(PlanNotSupported, match="before it is submitted"):
        bench.submit("late", [5, 6], plan={"prompt": {"policy": "selective", "keep": 0.5}})
    assert bench.engine.is_idle


def test_numbers_that_are_none_fail_only_their_request(tiny: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    good = message({"policy": "selective", "keep": 0.5}, name="good")
    wanted = Bench(tiny).shorten(good)
    embed = type(tiny).embed

    def spoiled(self: Decoder, tokens: Tensor) -> Tensor:
        out = embed(self, tokens)
        if 151 in tokens:  # in the bad one's prompt only
            out = torch.full_like(out, torch.nan)
        return out

    monkeypatch.setattr(type(tiny), "embed", spoiled)
    bad = message({"policy": "selective", "keep": 0.5}, ["\x97" + TEXT], name="bad")
    assert 151 in bad.prompt
    assert 151 not in good.prompt
    bench = Bench(tiny)
    bench.engine.shorten(bad)
    bench.run()
    rejected = bench.seen["bad", 0].rejected
    assert rejected is not None
    assert rejected.kind == "internal"
    assert bench.shorten(good).prompt == wanted.prompt
    assert bench.held_pages == 0


def test_a_text_that_cannot_be_read(tiny: Decoder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = random_sentence_encoder(tmp_path)
    (path / "model.safetensors").write_bytes(b"nonsense")
    bench = Bench(tiny, embedding_model=str(path))
    bench.engine.shorten(message({"policy": "extractive", "keep": 0.5}))
    bench.run()
    rejected = bench.seen["p", 0].rejected
    assert rejected is not None
    assert (rejected.kind, rejected.message) == ("internal", "the prompt could not be shortened")
    assert "could not be shortened" in caplog.text
    bench.engine.shortener.stop()


def test_settings_that_name_no_model(tiny: Decoder, tmp_path: Path, sentence_encoder: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json and model"):
        Bench(tiny, embedding_model=str(tmp_path))
    with pytest.raises(ModelError, match="checkpoint for token classification"):
        Bench(tiny, llmlingua2_model=str(sentence_encoder))
    assert classifier_folder(None) is None
    assert embedding_folder(str(sentence_encoder)) == sentence_encoder
    assert EngineSettings().llmlingua2_model is None


def test_a_pooling_that_is_not_known(tiny: Decoder, tmp_path: Path) -> None:
    from winnow.engine.models.encoders import SentenceEncoder

    path = random_sentence_encoder(tmp_path)
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ModelError, match="pooling by max_tokens is not supported"):
        SentenceEncoder(path)


def test_the_packaged_encoder_knows_what_a_question_is_about() -> None:
    from winnow.engine.models.encoders import SentenceEncoder

    path = embedding_folder(None)
    assert path is not None, "it comes with `make test`"
    encoder = SentenceEncoder(path)
    question = encoder.embed("How tall is the tower?")
    about, beside = encoder.embed("The building has a height of 43 metres."), encoder.embed("She likes ice cream.")
    assert question @ about > 0.4 > 0.2 > question @ beside
