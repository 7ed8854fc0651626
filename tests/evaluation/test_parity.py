"""Comparing with kvpress: keep sets, weights as a directory, and the job that its side is given."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from winnow.engine.errors import EvalError, ModelError
from winnow.engine.evaluation.measures import Whole
from winnow.engine.evaluation.parity import KeptTarget, common_share, compare, write
from winnow.engine.evaluation.parity_methods import BUDGETS, METHODS, cases_of, plan_of
from winnow.engine.evaluation.plans import check
from winnow.engine.evaluation.targets import Ask
from winnow.engine.models.export import export_directory

from ..models.checkpoints import logits_of, prompt_of, random_model, write_gguf


def test_shares_of_common_tokens() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = generator.random((2, 2, 3, 50)) < 0.4
    both = sum(
        len(set(np.flatnonzero(ours[i, j])) & set(np.flatnonzero(theirs[i, j]))) for i in range(2) for j in range(3)
    )
    assert common_share(ours, theirs) == both / ours.sum()
    assert common_share(ours, ours) == 1
    with pytest.raises(EvalError, match="lanes"):
        common_share(ours, theirs[:1])


def test_the_kept_tokens_of_a_plan(target: KeptTarget) -> None:
    whole, kept = target.kept_after(
        Ask(list(range(100)), plan_of("streaming_llm", 0.25, 100), [1, 2, 3], foretells=True)
    )
    assert isinstance(whole, Whole)
    assert kept.shape == (2, 2, 100)
    assert all(np.flatnonzero(lane).tolist() == [*range(4), *range(79, 100)] for lane in kept.reshape(4, 100))
    assert target.kept_after(Ask(list(range(100)), {}, [1, 2, 3], foretells=True))[1].all()


def test_the_kept_tokens_where_positions_are_compact(target: KeptTarget) -> None:
    ask = Ask(list(range(100)), plan_of("streaming_llm compact", 0.25, 100), [1, 2, 3], foretells=True)
    _, kept = target.kept_after(ask)
    assert all(np.flatnonzero(lane).tolist() == [*range(4), *range(79, 100)] for lane in kept.reshape(4, 100))


def test_the_kept_channels_of_a_plan(target: KeptTarget) -> None:
    (case,) = cases_of(["think"], target.head_dim)
    _, kept = target.kept_after(Ask(list(range(100)), plan_of(*case, 100), [1, 2, 3], foretells=True))
    assert kept.shape == (2, 2, target.head_dim)
    assert (kept.sum(-1) == case[1] * target.head_dim).all()


@pytest.mark.parametrize("name", ["snapkv adaptive", "snapkv pyramid", "kvzip"])
def test_lanes_that_keep_as_they_like(target: KeptTarget, name: str) -> None:
    """Not one by one, but in all they keep what the budget says."""
    prompt = [i * i % 97 for i in range(300)]
    _, kept = target.kept_after(Ask(prompt, plan_of(name, 0.5, 300), [1, 2, 3], foretells=True))
    counts = kept.sum(-1)
    assert counts.min() < counts.max()
    assert counts.sum() == 2 * 2 * 150


def test_plans_are_plans() -> None:
    cases = cases_of(list(METHODS), 64)
    assert check({f"{name}:{budget}": plan_of(name, budget, 512) for name, budget in cases}) == {}
    assert ("h2o", 0.25) in cases
    assert ("think", 38 / 64) in cases
    assert all(method.note for method in METHODS.values())


def test_weights_as_a_directory(tmp_path: Path) -> None:
    model = random_model("llama")
    path = write_gguf(tmp_path / "tiny.gguf", model, "llama")
    folder = export_directory(str(path), tmp_path / "hf")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(logits_of(again, prompt_of(40)), logits_of(model, prompt_of(40)), atol=1e-3)
    assert export_directory(str(folder), tmp_path / "other") == folder
    assert export_directory(str(path), tmp_path / "hf") == folder
    with pytest.raises(ModelError):
        export_directory(str(tmp_path / "none"), tmp_path / "hf")


KVPRESS = """
import json, sys
import numpy as np
job = json.load(open(sys.argv[1]))
out = {"versions": np.array(["1", "2", "3"])}
for i, text in enumerate(job["texts"]):
    out[f"off/{i}/true"] = np.zeros(len(text) - 1, np.float32)
    for case in job["cases"]:
        key = f"{case['name']}/{i}"
        size = int(len(job["prompts"][i]) * (1 - case["knobs"]["compression_ratio"]))
        kept = np.ones((2, 2, len(job["prompts"][i])), bool)
        kept[..., 4 : len(job["prompts"][i]) - size + 4] = False
        out |= {f"{key}/true": np.zeros(len(text) - 1, np.float32), f"{key}/kl": 0.5, f"{key}/agreement": 0.25,
                f"{key}/kept": kept}
print("off", flush=True)
np.savez(sys.argv[2], **out)
"""


def test_both_sides_are_compared(target: KeptTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a program in kvpress' place that keeps what streaming_llm keeps, whatever it is asked."""
    from winnow.engine.evaluation import parity

    fake = tmp_path / "kvpress_worker.py"
    fake.write_text(KVPRESS)
    monkeypatch.setattr(parity, "WORKER", fake)
    prompts = [(list(range(i, 100 + i)), [5, 6, 7, 8]) for i in range(3)]
    said: list[str] = []
    names = ["streaming_llm", "knorm"]
    done = compare(target, tmp_path, Path(sys.executable), prompts, names, 1, said.append)
    assert [(row.method, row.budget) for row in done.rows] == [(n, b) for n in names[:2] for b in BUDGETS]
    same, other = done.rows[0], done.rows[3]
    assert same.common == [1, 1, 1]
    assert max(other.common) < 1
    assert same.theirs.kl == [0.5] * 3
    assert same.differs
    assert len(said) == 1 + 1 + len(done.rows)
    data = json.loads(write(done, {"model": "tiny"}, tmp_path / "parity.json").read_text("utf-8"))
    assert data["rows"][0]["kept_in_common"] == 1
    out = StringIO()
    done.show(Console(file=out, width=160))
    assert "100.00%" in out.getvalue()

    fake.write_text("raise SystemExit('no kvpress here')")
    with pytest.raises(EvalError, match="no kvpress here"):
        compare(target, tmp_path, Path(sys.executable), prompts, names, 1, said.append)
