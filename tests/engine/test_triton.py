"""An engine on the Triton backend, in its interpreter: what it says is what an engine on the CPU says."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from msgspec import structs
from triton import knobs

from winnow.engine.build import build_engine
from winnow.engine.config import EngineSettings
from winnow.engine.errors import ModelError
from winnow.engine.graphs import Graphs
from winnow.engine.messages import Output, SamplingParams, Submit
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import Backend, WeightKind, backend
from winnow.kernels.triton import reading, votes

from ..kernels.triton.interpreter import install
from ..models.checkpoints import prompt_of, random_model, write_gguf
from . import imagery
from .bench import Bench, assert_same
from .imagery import Part
from .plans import KV, evict
from .seeing import TinyEyes, picture, pictured, with_axes
from .tape import capture

if knobs.runtime.interpret:
    install()

pytestmark = pytest.mark.skipif(not knobs.runtime.interpret, reason="tests/gpu does the same on a GPU")

PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "evicted and packed": {
        "kv": {"evict": {"policy": "snapkv", "budget": 50, "recent": 6}, "format": "int8", "residual": 0}
    },
    "packed": {"kv": {"format": "fp8", "residual": 0}},
}
PROMPTS = {name: prompt_of(length, length) for name, length in zip(PLANS, (17, 60, 56), strict=True)}
NEW = 5
METHODS: dict[str, tuple[int, dict[str, Any]]] = {
    "keys are turned to new places": (74, KV["compact"]),
    "rows vote": (20, evict("h2o")),
    "tokens are merged": (20, evict("h2o", merge={"policy": "compensation"})),
    "pages are read by their bounds": (40, KV["quest"] | {"read": KV["quest"]["read"] | {"tokens": 16}}),
}
"""Tokens of a prompt, and what its plan does to lanes"""


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
    """Greedy ones to all prompts, in one batch; what no token was written to is not a number."""
    bench.engine.arena.kv.data.fill_(255)
    for name, plan in PLANS.items():
        bench.submit(name, PROMPTS[name], NEW, plan)
    seen = {name: one for (name, _), one in bench.run().items()}
    for name, fmt in {"evicted and packed": "int8", "packed": "fp8"}.items():
        report = seen[name].last.compression
        assert report is not None and report.tokens_by_format[fmt]
    return {name: one.tokens for name, one in seen.items()}


def test_methods(there: Decoder, folder: Path, triton: Backend, ops: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one batch: what they say, which tokens they hold, and what they report."""
    for module in (votes, reading):  # short lanes need few programs
        monkeypatch.setattr(module, "COLUMNS", 2)
    said = []
    for bench in (
        Bench(load_model(str(folder), ops, "f32"), 2000, profiles={}, max_step_tokens=128),
        Bench(there, 2000, triton, {}, device="cuda", page_tokens=16, max_step_tokens=128),
    ):
        for name, (length, kv) in METHODS.items():
            bench.submit(name, prompt_of(length, length), 9, {"kv": kv})
        said.append(bench.run())
    for choice, wanted in said[0].items():
        seen = said[1][choice]
        assert seen.tokens == wanted.tokens, choice
        assert seen.kept.keys() == wanted.kept.keys()
        for event, held in wanted.kept.items():
            assert torch.equal(seen.kept[event], held), (choice, event)
        assert seen.last.compression == wanted.last.compression


def test_image_tokens_are_dropped_between_layers(there: Decoder, triton: Backend, folder: Path, ops: Backend) -> None:
    """What raters attend to is read from the backend's own queries and pages."""
    here, parts = load_model(str(folder), ops, "f32"), [Part(2, 14, 17)]
    plan = {"vision": {"policy": "sparse_vlm", "keep": 6, "recycle": 0.9}}
    benches = Bench(there, 600, triton, {}, device="cuda", max_step_tokens=16), Bench(here, 600, max_step_tokens=16)
    for bench, model in zip(benches, (there, here), strict=True):
        imagery.submit(bench, model, "a", PROMPTS["plain"], parts, 3, plan)
        bench.run()
    assert benches[0].seen["a", 0].tokens == benches[1].seen["a", 0].tokens


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_greedy_answers(
    cuda_graphs: bool, there: Decoder, triton: Backend, wanted: dict[str, list[int]], replayed: list[int]
) -> None:
    bench = Bench(there, 600, triton, {}, device="cuda", page_tokens=16, max_step_tokens=64, cuda_graphs=cuda_graphs)
    assert answers(bench) == wanted
    assert bool(replayed) is cuda_graphs, "steps of one row each are replayed"
    assert all(rows in (1, 2, 4) for rows in replayed)


def reads(policy: str) -> dict[str, Any]:
    return {"read": {"policy": policy, "tokens": 12, "sinks": 1, "recent": 4, "dense_layers": 0}}


VOTERS: dict[str, dict[str, Any]] = {
    "expected_attention": evict("expected_attention", interval=3),
    "keyformer": evict("keyformer", interval=4),
    "h2o": evict("h2o", interval=3) | {"format": "int8", "residual": 0},
}
READERS: dict[str, dict[str, Any]] = {
    "quest": reads("quest"),
    "tidal_decode": reads("tidal_decode"),
    "token_select": reads("token_select"),
}


@pytest.mark.parametrize(
    ("plans", "prompts"), [(VOTERS, [9, 8, 7]), (READERS, [36, 18, 19])], ids=["vote", "choose what they read"]
)
def test_rows_that(
    plans: dict[str, dict[str, Any]],
    prompts: list[int],
    there: Decoder,
    triton: Backend,
    replayed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are replayed too, in steps that are filled up, and leave the same bits."""
    for module in (votes, reading):  # short lanes need few programs
        monkeypatch.setattr(module, "COLUMNS", 2)
    benches = [
        Bench(there, 600, triton, {}, device="cuda", page_tokens=16, max_step_tokens=256, cuda_graphs=cuda_graphs)
        for cuda_graphs in (False, True)
    ]
    for bench in benches:
        bench.submit("plain", PROMPTS["plain"], 3)
        for i, (name, kv) in enumerate(plans.items()):
            bench.submit(name, prompt_of(prompts[i], i), 4, {"kv": kv})
        bench.run()
    for choice, seen in benches[0].seen.items():
        assert_same(benches[1].seen[choice], seen)
        assert benches[1].seen[choice].last.compression == seen.last.compression
    assert replayed == [4, 4], "of four rows the second step, and the one of three"


@pytest.mark.parametrize("has_axes", [False, True])
def test_pictures(has_axes: bool, folder: Path, ops: Backend, triton: Backend, replayed: list[int]) -> None:
    """Pruned, so that RoPE is ahead of the rows: in recorded steps too."""
    prompt, pictures = pictured([9, picture(0, 0, 3, 4), 5])
    said = []
    for each, more in ((ops, {}), (triton, {"device": "cuda", "page_tokens": 16})):
        model = load_model(str(folder), each, "f32")
        model = with_axes(model, each) if has_axes else model
        bench = Bench(model, 600, each, {}, eyes=TinyEyes(has_axes), max_step_tokens=16, **more)
        plan = {"vision": {"policy": "uniform", "keep": 5}}
        said.append(bench.alone(prompt, 6, plan, pictures=pictures))
    assert said[0].tokens == said[1].tokens
    for at, logits in said[0].logits.items():
        torch.testing.assert_close(said[1].logits[at], logits, atol=1e-2, rtol=1e-3)
    assert replayed == [1] * 4, "steps of one row each, but the first"


def test_a_row_of_a_picture_is_not_replayed(
    folder: Path, ops: Backend, triton: Backend, there: Decoder, replayed: list[int]
) -> None:
    """Though it is alone in its step: a recorded step looks tokens up."""
    prompt, pictures = pictured([16, picture(0, 0, 3, 4)])
    pictures = [structs.replace(pictures[0], turn_end=len(prompt))]
    said = []
    for bench in (
        Bench(load_model(str(folder), ops, "f32"), 600, ops, {}, eyes=TinyEyes(), max_step_tokens=16),
        Bench(there, 600, triton, {}, eyes=TinyEyes(), max_step_tokens=16, device="cuda", page_tokens=16),
    ):
        plan = {"vision": {"policy": "uniform", "keep": 1}}
        said.append(bench.alone(prompt, 3, plan, pictures=pictures).tokens)
        assert [count for batch in bench.batches for _, count in batch] == [16, 1, 1, 1]
    assert said[0] == said[1]
    assert replayed == [1], "of the two generated tokens the second"


def test_a_step_that_cannot_be_recorded_is_launched(
    there: Decoder, triton: Backend, wanted: dict[str, list[int]], replayed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graphs, "_capture", Mock(side_effect=RuntimeError("out of memory")))
    bench = Bench(there, 600, triton, {}, device="cuda", page_tokens=16, max_step_tokens=64)
    bench.submit("plain", PROMPTS["plain"], NEW)
    assert bench.run()["plain", 0].tokens == wanted["plain"]
    assert not replayed


def settings(folder: Path, **changes: Any) -> EngineSettings:
    given = {"device": "cuda", "weights": "f32", "kv_memory_gib": 0.01, "max_seqs": 4, "page_tokens": 16}
    return EngineSettings(model=str(folder), **(given | changes))


def test_an_engine_as_its_process_makes_it(folder: Path, wanted: dict[str, list[int]], replayed: list[int]) -> None:
    engine = build_engine(settings(folder))
    assert engine.graphs is not None
    assert (engine.info.device, engine.info.weights, engine.info.compute_format) == ("cuda", "f32", "f32")
    engine.submit(Submit("plain", PROMPTS["plain"], SamplingParams(temperature=0, max_tokens=3)))
    outputs = [*engine.step(), *engine.step()]
    assert replayed == [1], "what was recorded at the start is replayed"
    engine.arena._reserve_width(100)
    outputs += [*engine.step(), *engine.step()]
    assert replayed == [1, 1], "what was recorded with a smaller table is recorded again; the last step only reads"
    said = [token for output in outputs if isinstance(output, Output) for token in output.token_ids]
    assert said == wanted["plain"][:3]


def test_what_cannot_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="kv_memory_gib must be given"):
        build_engine(settings(folder, kv_memory_gib=None))
    monkeypatch.setattr("winnow.kernels.triton.device", Mock(side_effect=RuntimeError("no GPU")))
    with pytest.raises(ModelError, match="device cuda: no GPU"):
        build_engine(settings(folder))


@pytest.mark.parametrize("weights", ["bf16", "f16", "fp8"])
def test_weights_are_the_files(
    weights: WeightKind, folder: Path, triton: Backend, ops: Backend, tmp_path: Path
) -> None:
    """Safetensors and GGUF."""
    model = random_model("llama", num_hidden_layers=2, max_position_embeddings=256)
    tokens = torch.arange(160, dtype=torch.int32)
    exact = load_model(str(folder), ops, "f32").embed(tokens)
    for path in (folder, write_gguf(tmp_path / "small.gguf", model, "llama")):
        narrow = load_model(str(path), triton, weights).embed(tokens)
        assert narrow.dtype == (torch.float16 if weights == "f16" else torch.bfloat16)
        if weights != "fp8":
            assert torch.equal(narrow, exact.to(narrow.dtype))
        torch.testing.assert_close(narrow.float(), exact, rtol=2**-4, atol=exact.abs().max().item() * 2**-9)


@pytest.mark.parametrize(("weights", "part"), [("bf16", 0.03), ("f16", 0.008)])
def test_sixteen_bits(
    weights: WeightKind, part: float, folder: Path, triton: Backend, ops: Backend, replayed: list[int]
) -> None:
    """Logits stray from those of f32 by what the type rounds off, in chunks and in a step that is replayed."""
    model, wide = load_model(str(folder), triton, weights), load_model(str(folder), ops, "f32")
    bench = Bench(model, 600, triton, {}, device="cuda", weights=weights, page_tokens=16, max_step_tokens=16)
    assert bench.engine.arena.layout.compute.label == bench.engine.info.compute_format == weights
    prompt = prompt_of(40)
    seen = bench.alone(prompt, 3)
    assert replayed == [1], "of the two generated tokens that are read the second"
    exact = Bench(wide, 600, max_step_tokens=64).alone([*prompt, *seen.tokens[:2]], 1).logits[42]
    assert (seen.logits[42] - exact).norm() < part * exact.norm()


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the recorded steps had that were replayed."""
    seen: list[int] = []
    find = Graphs._find

    def watched(self: Graphs, host: Any) -> Any:
        recorded = find(self, host)
        seen.extend([] if recorded is None else [recorded.step.size])
        return recorded

    monkeypatch.setattr(Graphs, "_find", watched)
    monkeypatch.setattr(Graphs, "_capture", lambda _, launch: capture(launch))
    return seen
