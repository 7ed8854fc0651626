"""Towers make what transformers makes, and say of their layers what an eager run of transformers shows."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from winnow.engine.compression.vision.features import Features
from winnow.engine.errors import ModelError, RequestError
from winnow.engine.models.vision.build import _without_language_model, load_eyes
from winnow.engine.models.vision.mrope import Grid, positions

from .vision_checkpoints import FAMILIES, image_of, image_processor, random_vlm, save_vlm

SIZES = [(50, 70), (32, 32), (20, 90), (130, 60)]


def load(folder: Path) -> Any:
    return load_eyes(folder, torch.device("cpu"), torch.float32)


@dataclass
class Model:
    """A tower, and transformers' model with what its layers did."""

    family: str
    eyes: Any
    reference: Any
    attention: list[Tensor] = field(default_factory=list)
    """[groups, heads, rows, rows] of each call"""
    keys: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)

    def see(self, height: int, width: int) -> tuple[Features, Tensor, dict[str, np.ndarray]]:
        """The tower's features and transformers', and what both read."""
        read = image_processor(self.family)(image_of(height, width), return_tensors="np")
        for seen in (self.attention, self.keys, self.hidden):
            seen.clear()
        with torch.no_grad():
            given = {name: torch.from_numpy(value) for name, value in read.items()}
            made = self.reference.model.get_image_features(**given).pooler_output
        batched = {name: value if self._is_flat(name) else value[0] for name, value in read.items()}
        return self.eyes.encode(batched), torch.cat([part.flatten(0, -2) for part in made]), batched

    def _is_flat(self, name: str) -> bool:
        """Whether transformers puts several images' rows into one array."""
        return name == "pixel_values" and self.family in ("llava", "qwen2_vl", "qwen2_5_vl")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp(request.param)
    reference: Any = save_vlm(folder, request.param)
    made = Model(request.param, load(folder), reference)
    base = reference.model
    vit = next(getattr(base, name) for name in ("vision_tower", "visual", "vision_model") if hasattr(base, name))
    layers = vit.blocks if hasattr(vit, "blocks") else vit.encoder.layers
    module = sys.modules[type(layers[0]).__module__]
    eager: Callable[..., tuple[Tensor, Tensor]] = module.eager_attention_forward

    def recording(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, weights = eager(*args, **kwargs)
        made.attention.append(weights)
        return out, weights

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "eager_attention_forward", recording)
    for layer in layers:
        layer.register_forward_hook(lambda _, __, out: made.hidden.append(out))
        attention = layer.attn if hasattr(layer, "attn") else layer.self_attn
        keys = attention.qkv if hasattr(attention, "qkv") else attention.k_proj
        keys.register_forward_hook(lambda _, __, out: made.keys.append(out))
    yield made
    patch.undo()


@pytest.mark.parametrize("size", SIZES)
def test_features(model: Model, size: tuple[int, int]) -> None:
    features, expected, _ = model.see(*size)
    assert features.embeddings.dtype == torch.float32
    torch.testing.assert_close(features.embeddings, expected, atol=1e-5, rtol=1e-5)
    assert features.places.shape == (len(expected), 3)
    if features.crop_grid is not None:
        rows, columns = features.crop_grid
        assert int(features.places[:, 0].max()) == rows * columns
        assert columns > rows or size != (20, 90)
        assert rows > columns or size != (130, 60)
    assert (features.crop_grid is not None) is (model.family in ("llava_next", "llava_onevision"))


def test_pixels_are_not_remembered(model: Model) -> None:
    features, _, read = model.see(50, 70)
    pixels = weakref.ref(read["pixel_values"])
    del read
    assert features.signals.attention(-1).shape == (len(features.places),)
    assert pixels() is None


def to_tokens(model: Model, x: Tensor, read: dict[str, np.ndarray], mark: float = 0.0) -> Tensor:
    """[crops, patches, D] -> [N, D], by transformers' own packing."""
    base, width = model.reference.model, x.shape[-1]
    if model.family == "llava":
        return x.flatten(0, 1)
    if model.family.startswith("llava"):
        sizes, newline = torch.from_numpy(read["image_sizes"])[None], torch.full((width,), mark)
        more = {"vision_feature_select_strategy": "default"} if model.family == "llava_next" else {}
        if model.family == "llava_onevision":
            more = {"vision_aspect_ratio": model.reference.config.vision_aspect_ratio}
        packed: Tensor = base.pack_image_features([x], sizes, image_newline=newline, **more)[0][0]
        return packed
    if model.family in ("idefics3", "smolvlm"):
        return (
            torch.cat([base.connector.pixel_shuffle(part[..., None], 2).mean(-1) for part in x.unbind(-1)], 0)
            .view(width, -1)
            .T
        )
    return x.view(-1, 4, width).mean(1)


def in_order(model: Model, x: Tensor, read: dict[str, np.ndarray]) -> Tensor:
    """Rows of Qwen's layers as the grid's own order is: 2.5's go by windows of 2x2 squares."""
    if model.family != "qwen2_5_vl":
        return x
    _, height, width = read["image_grid_thw"].tolist()
    cells = [(row, column) for row in range(height // 2) for column in range(width // 2)]
    cells.sort(key=lambda cell: (cell[0] // 2, cell[1] // 2, *cell))
    own = torch.tensor([row * (width // 2) + column for row, column in cells])
    out = torch.empty_like(x).view(-1, 4, x.shape[-1])
    out[own] = x.view(-1, 4, x.shape[-1])
    return out.flatten(0, 1)


def paid(model: Model, features: Features, layer: int, rows: int) -> Tensor:
    """[rows] of the layer's eager attention: what patches are paid."""
    if model.family.startswith("qwen"):
        calls, ends = [], 0
        for weights in model.attention:  # a call for each window, or for the image: layers end where rows do
            calls.append(weights)
            ends += weights.shape[-1]
        assert ends == rows * features.signals.layers
        sums = torch.cat([weights[0].mean(0).sum(0) for weights in calls])
        return sums.view(features.signals.layers, rows)[layer] / rows
    weights = model.attention[: features.signals.layers][layer]
    if model.family in ("llava", "llava_next"):
        return weights[:, :, 0, 1:].mean(1)
    return weights.mean((1, 2))


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("size", SIZES[:3])
def test_signals(model: Model, size: tuple[int, int], layer: int) -> None:
    features, _, read = model.see(*size)
    signals, family = features.signals, model.family
    layers = signals.layers
    assert layers == (2 if family in ("llava", "llava_next") else 3)  # LLaVA takes the last but one
    hidden, keys = model.hidden[:layers][layer], model.keys[:layers][layer]
    width = hidden.shape[-1]
    if family.startswith("qwen"):
        rows = len(hidden)
        keys, attention = keys[:, width : 2 * width], paid(model, features, layer, rows)[:, None]
        hidden, keys, attention = (in_order(model, x, read) for x in (hidden, keys, attention))
    else:
        attention = paid(model, features, layer, 0)[..., None]
        if family in ("llava", "llava_next"):
            hidden, keys = hidden[:, 1:], keys[:, 1:]
    for seen, of_patches in (
        (signals.hidden(layer), hidden),
        (signals.keys(layer), keys),
        (signals.attention(layer)[:, None], attention),
    ):
        torch.testing.assert_close(seen, to_tokens(model, of_patches, read), atol=1e-5, rtol=1e-5)
    assert signals.nbytes == (layers + 1) * model.hidden[0].nbytes
    with pytest.raises(IndexError):
        signals.hidden(0)


@pytest.mark.parametrize("size", SIZES)
def test_places(model: Model, size: tuple[int, int]) -> None:
    features, _, read = model.see(*size)
    places = features.places
    grid = places[places[:, 0] >= 0]
    assert len({tuple(place) for place in grid.tolist()}) == len(grid), "two tokens at one place"
    if model.family in ("llava", "llava_next"):
        crops, side = len(read["pixel_values"]), 4
        cells = [(crop, row, column) for crop in range(crops) for row in range(side) for column in range(side)]
        of_patches = torch.tensor(cells, dtype=torch.float32).view(crops, side * side, 3)
        assert torch.equal(places, to_tokens(model, of_patches, read, mark=-1).long())
    elif model.family == "llava_onevision":
        assert torch.equal(places[:9], torch.tensor([(0, row, column) for row in range(3) for column in range(3)]))
        # Of the crops' joint rectangle rows and columns ascend, and a mark ends each row.
        side, (height, width) = 3, size
        marks = (places[:, 0] < 0).nonzero().squeeze(1).tolist()
        rows = [places[a + 1 : b] for a, b in zip([8, *marks], marks, strict=False)]
        assert {len(row) for row in rows} == {len(rows[0])}
        columns = (rows[0][:, 0] - 1) * side + rows[0][:, 2]
        assert (columns.diff() > 0).all(), (height, width)
        crops_across = int(rows[0][:, 0].max())
        down = torch.stack([(row[0, 0] - 1) // crops_across * side + row[0, 1] for row in rows])
        assert (down.diff() > 0).all()
    elif model.family.startswith("qwen"):
        _, height, width = read["image_grid_thw"].tolist()
        cells = [(0, row, column) for row in range(height // 2) for column in range(width // 2)]
        assert torch.equal(places, torch.tensor(cells))
    else:
        crops = len(read["pixel_values"])
        cells = [(0, row, column) for row in range(2) for column in range(2)]
        assert places[-4:].tolist() == [list(cell) for cell in cells], "the whole image comes last"
        assert places[:-4, 0].tolist() == [crop for crop in range(1, crops) for _ in range(4)]


def test_bfloat16(model: Model, tmp_path: Path) -> None:
    """As on a GPU: close, and what policies are shown is float32 in host memory."""
    exact, _, read = model.see(50, 70)
    save_vlm(tmp_path, model.family)
    eyes: Any = load_eyes(tmp_path, torch.device("cpu"), torch.bfloat16)
    rough = eyes.encode(read)
    for signal in ("attention", "keys", "hidden"):
        one, other = (getattr(features.signals, signal)(-1) for features in (rough, exact))
        assert one.dtype == torch.float32
        assert torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1] > 0.99
    assert rough.embeddings.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(rough.embeddings, exact.embeddings).min() > 0.98
    assert 1.8 * rough.signals.nbytes < exact.signals.nbytes < 2.2 * rough.signals.nbytes


def test_column_sums_in_blocks(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    features, _, _ = model.see(50, 70)
    whole = features.signals.attention(-1)
    monkeypatch.setattr("winnow.engine.models.vision.signals._SCORES", 64)
    torch.testing.assert_close(features.signals.attention(-1), whole, atol=1e-6, rtol=1e-5)


def test_the_language_model_is_not_there(model: Model) -> None:
    parts = _without_language_model(model.reference.config)
    names = {name.removeprefix("model.") for name, _ in model.reference.named_parameters()}
    of_tower = {name for name in names if not name.startswith(("language_model", "text_model", "lm_head"))}
    assert {name for name, _ in parts.named_parameters()} == of_tower


@pytest.mark.parametrize(
    ("family", "wrong", "message"),
    [
        ("llava", {"pixel_values": np.zeros((1, 3, 8, 8), np.float32)}, "crops of"),
        ("llava", {}, "crops of"),
        ("llava_next", {"pixel_values": np.zeros((4, 3, 32, 32), np.float32)}, "'image_sizes'"),
        (
            "llava_next",
            {"pixel_values": np.zeros((4, 3, 32, 32), np.float32), "image_sizes": np.array([50, 70])},
            "crops, not 3",
        ),
        ("qwen2_vl", {"image_grid_thw": np.array([1, 3, 4])}, "squares of 2"),
        ("qwen2_vl", {"image_grid_thw": np.array([1, 0, 4])}, "three counts"),
        (
            "qwen2_vl",
            {"image_grid_thw": np.array([1, 4, 4]), "pixel_values": np.zeros((15, 96), np.float32)},
            "96 numbers",
        ),
        ("smolvlm", {"pixel_values": np.zeros((0, 3, 32, 32), np.float32)}, "crops of"),
    ],
)
def test_inputs_are_checked(family: str, wrong: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    save_vlm(tmp_path, family)
    with pytest.raises(RequestError, match=message):
        load(tmp_path).encode(wrong)


def test_names_of_older_checkpoints(tmp_path: Path) -> None:
    """LLaVA's as on the hub, and with all parts under `model`, as newer ones are."""
    save_vlm(tmp_path, "llava_next")
    read = image_processor("llava_next")(image_of(50, 70), return_tensors="np")
    inputs = {name: value[0] for name, value in read.items()}
    expected = load(tmp_path).encode(inputs).embeddings
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    newer = {name if "lm_head" in name else f"model.{name}".replace(".model.", "."): x for name, x in tensors.items()}
    newer = {name.replace("language_model.lm_head", "lm_head"): x for name, x in newer.items()}
    newer["model.vision_tower.embeddings.position_ids"] = torch.arange(17)
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): x for name, x in tensors.items()}
    for names in (newer, older):
        assert names.keys() != tensors.keys()
        save_file(names, path)
        assert torch.equal(load(tmp_path).encode(inputs).embeddings, expected)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("image_newline", None, "image_newline is missing"),
        ("image_newline", torch.zeros(5), "image_newline has shape .5.; the config asks for .64."),
        ("vision_tower.more.weight", torch.zeros(5), "unexpected tensor vision_tower.more.weight"),
    ],
)
def test_tensors_are_checked(name: str, tensor: Tensor | None, message: str, tmp_path: Path) -> None:
    save_vlm(tmp_path, "llava_next")
    path = tmp_path / "model.safetensors"
    tensors = {**load_file(path), name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_a_tower_that_is_not_known(tmp_path: Path) -> None:
    save_vlm(tmp_path, "llava")
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("clip_vision_model", "pixtral"))
    with pytest.raises(ModelError, match="vision tower of type 'pixtral' is not supported"):
        load(tmp_path)


IMAGE, VIDEO = 7, 8


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_with_three_axes(family: str) -> None:
    reference: Any = random_vlm(family)
    text, seconds = [1, 2, 3], 1.7
    grids = {"image": [(1, 2, 3), (1, 4, 2)], "video": [(3, 2, 2)]}
    tokens = [*text, *[IMAGE] * 6, 2, *[VIDEO] * 12, 5, 5, *[IMAGE] * 8]
    kinds = torch.tensor([[{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in tokens]])
    patches = {kind: torch.tensor([(t, 2 * h, 2 * w) for t, h, w in shapes]) for kind, shapes in grids.items()}
    more = {"second_per_grid_ts": torch.tensor([seconds])} if family == "qwen2_5_vl" else {}
    expected, delta = reference.model.get_rope_index(
        torch.tensor([tokens]), kinds, image_grid_thw=patches["image"], video_grid_thw=patches["video"], **more
    )
    interval = 2 * seconds if family == "qwen2_5_vl" else 1.0
    in_order = [Grid(1, 2, 3), Grid(3, 2, 2, interval), Grid(1, 4, 2)]
    made = positions(np.array(tokens, np.int32), {"image": IMAGE, "video": VIDEO}, in_order)
    assert made.tolist() == expected[:, 0].tolist()
    assert made.max() + 1 - len(tokens) == int(delta)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, IMAGE, IMAGE], "other than 4 placeholders"),
        ([1, 2], "other than 4 placeholders"),
        ([IMAGE, IMAGE, 1, IMAGE, IMAGE], "other than 4 placeholders"),
        ([IMAGE] * 4 + [1, IMAGE], "no picture goes with"),
    ],
)
def test_positions_of_what_does_not_fit(tokens: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        positions(np.array(tokens, np.int32), {"image": IMAGE}, [Grid(1, 2, 2)])
