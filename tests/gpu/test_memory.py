"""The arena takes what the settings leave it of a GPU's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from winnow.engine.config import EngineSettings
from winnow.engine.engine import Engine
from winnow.engine.errors import ModelError
from winnow.engine.messages import Output, SamplingParams, Submit
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import Backend

from ..models.checkpoints import random_model


@pytest.fixture
def model(gpu: Backend, tmp_path: Path) -> Decoder:
    """Wide enough for a step to take memory that can be seen."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64, "max_position_embeddings": 4096}
    random_model("llama", **sizes).save_pretrained(tmp_path)
    return load_model(str(tmp_path), gpu, "bf16")


def test_a_share_of_the_memory(model: Decoder, gpu: Backend) -> None:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    share = (total - free) / total + 0.1
    settings = EngineSettings(device="cuda", memory_utilization=share, max_step_tokens=4096)
    engine = Engine(settings, model, gpu)
    pages = engine.arena.total * engine.arena.layout.page_bytes
    assert 0.08 * total < pages < 0.1 * total, "a step takes less than a fiftieth"
    engine.submit(Submit("long", [1] * 4000, SamplingParams(temperature=0.8, top_p=0.9, max_tokens=3)))
    torch.cuda.reset_peak_memory_stats()
    outputs = [output for _ in range(4) for output in engine.step()]
    assert len(outputs) == 3 and all(isinstance(output, Output) for output in outputs)
    assert torch.cuda.max_memory_allocated() < share * total


def test_no_memory_left(model: Decoder, gpu: Backend) -> None:
    with pytest.raises(ModelError, match="memory_utilization"):
        Engine(EngineSettings(device="cuda", memory_utilization=1e-4), model, gpu)
