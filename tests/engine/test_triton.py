"""An engine on the Triton backend, in its interpreter: what it says is what an engine on the CPU says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from triton import knobs

from winnow.engine.graphs import Graphs
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import Backend, backend

from ..kernels.triton.interpreter import install
from ..models.checkpoints import prompt_of, random_model
from .bench import Bench

if knobs.runtime.interpret:
    install()

pytestmark = pytest.mark.skipif(not knobs.runtime.interpret, reason="tests/gpu does the same on a GPU")

PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "evicted and packed": {"kv": {"evict": {"policy": "snapkv", "budget": 20, "recent": 6}, "format": "int4"}},
    "packed": {"kv": {"format": "int4", "residual": 0}},
}
PROMPTS = {name: prompt_of(length, length) for name, length in zip(PLANS, (17, 40, 36), strict=True)}
NEW = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("small")
    random_model("llama", num_hidden_layers=2, max_position_embeddings=256).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def triton() -> Backend:
    return backend("triton")


@pytest.fixture(scope="module")
def there(folder: Path, triton: Backend) -> Decoder:
    return load_model(str(folder), triton, "f32")


@pytest.fixture(scope="module")
def wanted(folder: Path, ops: Backend) -> dict[str, list[int]]:
    return answers(Bench(load_model(str(folder), ops, "f32"), pages=600, max_step_tokens=64))


def answers(bench: Bench) -> dict[str, list[int]]:
    """Greedy ones to all prompts, in one batch."""
    for name, plan in PLANS.items():
        bench.submit(name, PROMPTS[name], NEW, plan)
    return {name: seen.tokens for (name, _), seen in bench.run().items()}


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_greedy_answers(
    cuda_graphs: bool, there: Decoder, triton: Backend, wanted: dict[str, list[int]], replayed: list[int]
) -> None:
    bench = Bench(there, 600, triton, {}, device="cuda", page_tokens=16, max_step_tokens=64, cuda_graphs=cuda_graphs)
    assert answers(bench) == wanted
    assert bool(replayed) is cuda_graphs, "steps of one row each are replayed"
    assert all(rows in (1, 2, 4) for rows in replayed)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the recorded steps had that were replayed; the interpreter computes them anew."""
    seen: list[int] = []
    find = Graphs._find

    def watched(self: Graphs, host: Any) -> Any:
        recorded = find(self, host)
        seen.extend([] if recorded is None else [recorded.step.size])
        return recorded

    monkeypatch.setattr(Graphs, "_find", watched)
    return seen
