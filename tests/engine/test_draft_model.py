"""Which models may draft for which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from winnow.engine.build import build_engine
from winnow.engine.config import EngineSettings
from winnow.engine.errors import ModelError
from winnow.engine.messages import SamplingParams, Submit
from winnow.engine.models.tokenizer import load_tokenizer

from ..models.checkpoints import random_model

SMALL: dict[str, Any] = {"model": "default", "kv_memory_gib": 0.1, "threads": 1, "max_seqs": 2, "max_model_len": 256}


@pytest.fixture(scope="module")
def relative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and the tokens of the default model."""
    path = tmp_path_factory.mktemp("relative")
    random_model("llama", vocab_size=49152, tie_word_embeddings=True).save_pretrained(path)
    load_tokenizer("default").hf.save_pretrained(path)
    return path


def test_a_model_with_the_same_tokens(relative: Path) -> None:
    settings = EngineSettings(**SMALL, draft_model=str(relative), draft_weights="f32", draft_memory_gib=0.01)
    engine = build_engine(settings)
    assert engine.draft is not None
    assert engine.info.draft_max_len == 128
    assert engine.draft.engine.settings.weights == "f32"
    assert engine.draft.engine.arena.total * engine.draft.engine.arena.layout.page_bytes <= 0.01 * 2**30
    for name, speculative in (("plain", {}), ("guessed", {"method": "draft"})):
        sampling = SamplingParams(temperature=0.0, max_tokens=8)
        engine.submit(Submit(name, list(range(20, 40)), sampling, speculative=speculative))
    said: dict[str, list[int]] = {"plain": [], "guessed": []}
    while not engine.is_idle:
        for output in engine.step():
            said[output.request_id] += output.token_ids  # type: ignore[union-attr]
    assert said["plain"] == said["guessed"]
    assert engine.stats.draft_tokens_total > 0


def test_a_model_with_another_vocabulary(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"draft model .*: its vocabulary has 160 tokens, and default 49152"):
        build_engine(EngineSettings(**SMALL, draft_model=str(tmp_path)))


def test_a_model_with_other_tokens(relative: Path, tmp_path: Path) -> None:
    for file in relative.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[1000:1002]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="its tokenizer has other tokens than that of default"):
        build_engine(EngineSettings(**SMALL, draft_model=str(tmp_path)))


def test_an_arena_that_holds_no_text(relative: Path) -> None:
    with pytest.raises(ModelError, match=r"draft model .*hold no sequence"):
        build_engine(EngineSettings(**SMALL, draft_model=str(relative), draft_memory_gib=2e-5))


def test_settings_without_a_draft_model() -> None:
    with pytest.raises(ValueError, match="no effect without draft_model"):
        EngineSettings(draft_weights="f32")
    with pytest.raises(ValueError, match="draft_weights: fp8 is not for device cpu"):
        EngineSettings(draft_weights="fp8", draft_model="default")
