"""Choices between layers by themselves, on numbers made up: what a model's numbers seldom are, and every knob."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from winnow.engine.compression import layer_choice
from winnow.engine.compression.plan import Plan
from winnow.engine.compression.vision.clustering import density_peaks
from winnow.engine.compression.vision.plan import Vision
from winnow.engine.compression.vision.policy import Choice, LayerPolicy, LayerView
from winnow.engine.compression.vision.registry import VISION, vision_policy
from winnow.engine.staging import ImageRows, Stages, Staging

from ..engine.layer_oracles import ORACLES, Scene, relevance_of
from .images import drawn

NAMES = [name for name in VISION if isinstance(vision_policy(name), LayerPolicy)]


def plan(name: str, keep: float, **knobs: Any) -> Vision:
    vision = Plan.parse({"vision": {"policy": name, "keep": keep} | knobs}).vision
    assert vision is not None
    return vision


def view(tokens: int, raters: int, keep: int, choice: int = 0, **changes: Any) -> LayerView:
    attention = (drawn((raters, tokens), 3) * 2).softmax(1) * 0.7
    parts = {
        "choice": choice,
        "tokens": torch.arange(tokens),
        "patches": tokens,
        "keep": keep,
        "attention": attention,
        "hidden": drawn((tokens, 12), 4),
        "is_key": torch.zeros(tokens, dtype=torch.bool),
    }
    return LayerView(**(parts | changes))


@pytest.mark.parametrize("number", [0.0, 1e9, torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_overflows_fails_nobody(name: str, number: float) -> None:
    """A choice is made in a step that others have a part in, whatever the model's states have come to."""
    asks = plan(name, 30).asks_raters
    attention = torch.full((3 * asks, 40), number if number in (0.0, torch.inf) else torch.nan)
    for hidden in (torch.full((40, 12), number), drawn((40, 12), 4).index_fill(0, torch.arange(0, 40, 3), number)):
        for choice in range(2):
            vision = plan(name, 30)
            chosen = vision.choose(
                view(40, 3, 30, choice % len(vision.choices(32)), hidden=hidden, attention=attention)
            )
            rows = chosen.rows.tolist()
            assert rows == sorted(set(rows)) and set(rows) <= set(range(40))
            assert len(rows) <= 40 and (rows or name == "to_dre")
            assert chosen.hidden is None or chosen.hidden.shape == (len(rows), 12)


def test_tokens_that_say_the_same_are_one_cluster() -> None:
    """Two places of three vectors each, one vector twice: equally dense, only one is a centre."""
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.1, 0.0], [5.0, 5.0], [5.0, 5.1], [5.2, 5.0]]).repeat(1, 6)
    centres, means = density_peaks(x, 2, 2)
    assert [int(one) // 3 for one in centres] == [0, 1]
    torch.testing.assert_close(means, torch.stack([x[:3].mean(0), x[3:].mean(0)]))


KNOBS: list[tuple[str, dict[str, Any]]] = [
    ("zipvl", {"tau": 0.5}),
    ("zipvl", {"tau": 1.0, "probes": 1}),
    ("zipvl", {"tau": 0.9, "probes": 3}),
    ("must_drop", {"total": 0.03, "single": 0.9}),
    ("must_drop", {"total": 1.0, "single": 0.05}),
    ("must_drop", {"total": 1.0, "single": 1.0}),  # all may go
    ("must_drop", {"total": 0.0}),
    ("sparse_vlm", {"recycle": 0.0}),
    ("sparse_vlm", {"recycle": 1.0, "cluster": 1}),
    ("sparse_vlm", {"recycle": 1.0, "cluster": 4}),
    ("apet", {"basis": 1}),
    ("apet", {"basis": 256}),
]


@pytest.mark.parametrize("keep", [1, 2, 12, 39])
@pytest.mark.parametrize(("name", "knobs"), [*((name, {}) for name in NAMES), *KNOBS], ids=str)
def test_as_the_paper_says(name: str, knobs: dict[str, Any], keep: int) -> None:
    """Of 40 tokens, of which the first are there: from one to all but one."""
    vision, raters = plan(name, keep, **knobs), 5
    for choice in sorted(set(vision.choices(32).values())):
        for there in (40, 23):
            hidden, attention = drawn((there, 12), choice), (drawn((raters, there), 5 + choice) * 2).softmax(1) * 0.7
            keys = (1, 7, 20) if name == "must_drop" else ()
            heard = attention
            if vision.asks_raters:
                heard = attention[vision.raters(hidden, drawn((raters, 12), 8))]
            is_key = torch.isin(torch.arange(there), torch.tensor(keys, dtype=torch.int64))
            seen = view(there, raters, keep, choice, hidden=hidden, attention=heard, is_key=is_key, patches=40)
            chosen = vision.choose(seen)
            relevance = relevance_of(hidden, drawn((raters, 12), 8))
            scene = Scene(
                stage=choice,
                there=list(range(there)),
                patches=40,
                keep=keep,
                attention=dict(enumerate(attention.double().tolist())),
                hidden=dict(enumerate(hidden)),
                relevance=dict(enumerate(relevance)),
                keys=keys,
                params=vision,
            )
            picked = ORACLES[name](scene)
            assert chosen.rows.tolist() == picked.tokens
            if chosen.hidden is not None:
                wanted = torch.stack([picked.instead.get(token, hidden[token]) for token in picked.tokens])
                torch.testing.assert_close(chosen.hidden, wanted)
            else:
                assert not picked.instead


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_a_long_text_is_heard_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text of a thousand tokens behind an image the scores are never held all at once."""
    rows, raters, dim = 1200, 1000, 8
    image = ImageRows(
        rows=np.arange(100, dtype=np.int32),
        tokens=np.arange(100, dtype=np.int32),
        is_key=np.zeros(100, bool),
        patches=100,
        keep=10,
        raters=np.arange(150, 150 + raters, dtype=np.int32),
    )
    staging = Staging.begin(Stages((0, 1, 2), (0,), (image,), image.raters), rows)
    staging.hidden, staging.queries = drawn((rows, 12), 1), drawn((raters, 4, dim), 2)
    keys = drawn((2, rows, dim), 3)
    seen: list[Tensor] = []
    monkeypatch.setattr(Vision, "choose", lambda self, view: seen.append(view.attention) or Choice(view.tokens))
    monkeypatch.setattr(layer_choice, "SCORES", 1 << 16)
    with Largest() as largest:
        layer_choice.rows_left(plan("must_drop", 10), staging, keys)
    assert largest.elements < 1 << 18
    scores = torch.einsum("rhd,hnd->hrn", staging.queries.double(), keys.double().repeat_interleave(2, 0)) * dim**-0.5
    scores = scores.masked_fill(torch.arange(rows) > torch.from_numpy(image.raters)[:, None], -torch.inf)
    torch.testing.assert_close(seen[0], scores.softmax(-1).mean(0)[:, :100].float())
