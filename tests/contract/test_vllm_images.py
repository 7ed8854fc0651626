"""Images and videos to `winnow serve --engine vllm`: tiny random models, and what transformers says of them.

It needs what test_vllm.py needs, and there a torchvision that loads: vLLM's models that see import it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai import BadRequestError
from PIL import Image
from torch import Tensor

from winnow.engine.models.tokenizer import load_tokenizer
from winnow.engine.models.vision.processor import load_processor

from ..models.vision_checkpoints import IDS, config_of, image_of, image_processor, save_vlm
from ..server.pictures import data_uri, image_part, text_part, video_part
from ..server.test_image_decode import encoded
from . import test_vllm
from .serving import Serving
from .test_vllm import PYTHON, api, vllm_serving

pytestmark = test_vllm.pytestmark
NEW = 6
IMAGES = [image_of(40, 60, 1), image_of(64, 32, 2)]
Film = list[Image.Image]
WIDE = [image_of(16, 48, frame // 2) for frame in range(6)]
"""Three steps of two frames"""
TALL = [image_of(48, 16, frame // 2) for frame in range(10, 16)]
LONG = [image_of(16, 16, frame // 2) for frame in range(20, 36)]
"""Eight steps, two positions apart: more than it has rows and columns"""
QUESTION = "what is this a red circle and two blue ? " * 8
"""With a film, more than the blocks of 32 tokens that caches of prefixes go by"""
SEEN = [IDS["<|image_pad|>"], IDS["<|video_pad|>"]]


@pytest.fixture(scope="module", autouse=True)
def _loads() -> None:
    assert PYTHON is not None
    said = subprocess.run([PYTHON, "-c", "import torchvision"], capture_output=True, text=True)
    if said.returncode:
        pytest.skip(f"the torchvision beside vLLM does not load: {said.stderr.splitlines()[-1]}")


def save(folder: Path, family: str) -> Any:
    """A checkpoint with heads as wide as vLLM has kernels for on a CPU, and transformers' model of it."""
    text = config_of(family)["text_config"] | {"num_attention_heads": 2, "num_key_value_heads": 1}
    if "rope_parameters" in text:
        text |= {"rope_parameters": text["rope_parameters"] | {"mrope_section": [4, 6, 6]}}
    return save_vlm(folder, family, text_config=text)


@dataclass
class Seeing:
    server: Serving
    folder: Path
    family: str
    model: Any

    def ask(self, *parts: dict[str, Any], **fields: Any) -> Any:
        """Greedily; with the logprobs of what was said."""
        body = {"logprobs": True, "max_tokens": NEW, "temperature": 0, "extra_body": {"ignore_eos": True} | fields}
        with api(self.server) as client:
            return client.chat.completions.create(model=self.folder.name, messages=said(*parts), **body)

    def prompt(self, *parts: dict[str, Any]) -> Tensor:
        """[1, t], as the server writes it"""
        with self.server.http() as http:
            told = http.post("/tokenize", json={"messages": said(*parts)}).raise_for_status().json()
        return torch.tensor([told["tokens"]])

    def inputs(self, prompt: Tensor, images: Sequence[Image.Image], films: Sequence[Film] = ()) -> dict[str, Tensor]:
        """What transformers' model reads."""
        read: dict[str, Any] = {}
        if images:
            read |= dict(image_processor(self.family)(list(images), return_tensors="np"))
        if films:
            processor = load_processor(str(self.folder), load_tokenizer(str(self.folder)))
            assert processor is not None
            each = [processor.video(film).inputs for film in films]
            for name in each[0]:
                join = np.concatenate if name.startswith("pixel") else np.stack
                read[name] = join([inputs[name] for inputs in each])
        if read:
            read["mm_token_type_ids"] = np.select([prompt == token for token in SEEN], [1, 2])
        return {name: torch.as_tensor(np.asarray(value)) for name, value in read.items()}

    @torch.no_grad()
    def expected(self, prompt: Tensor, inputs: dict[str, Tensor]) -> tuple[list[int], list[float]]:
        """The likeliest tokens, and their logprobs."""
        made = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=-1,
            output_logits=True,
            return_dict_in_generate=True,
            **inputs,
        )
        logprobs = torch.cat(made.logits).log_softmax(-1).amax(-1)
        return made.sequences[0, prompt.shape[1] :].tolist(), logprobs.tolist()

    @torch.no_grad()
    def expected_pruned(self, prompt: Tensor, inputs: dict[str, Tensor], keep: float) -> tuple[list[int], list[float]]:
        """Of Qwen2.5-VL, where EVS leaves a share of each film and all that is left stands where it would in the whole
        prompt, text behind the last row, column and moment of a picture."""
        base, seen = self.model.model, {}
        for kind, token in zip(("image", "video"), SEEN, strict=True):
            if f"{kind}_grid_thw" in inputs:
                see = base.get_image_features if kind == "image" else base.get_video_features
                pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
                grids = inputs[f"{kind}_grid_thw"]
                shown = torch.cat(list(see(pixels, grids).pooler_output))
                tokens = (grids.prod(1) // 4).tolist()
                seen[token] = list(zip((grids // torch.tensor([1, 2, 2])).tolist(), shown.split(tokens), strict=True))
        embedded, positions, position = [], [], 0
        for token, run in groupby(prompt[0].tolist()):
            if token not in seen:
                for one in run:
                    embedded.append(self.model.get_input_embeddings()(torch.tensor([one])))
                    positions.append(torch.full((3, 1), position))
                    position += 1
                continue
            (steps, rows, columns), shown = seen[token].pop(0)
            ticks = 2 * torch.arange(steps)
            places = torch.cartesian_prod(ticks, torch.arange(rows), torch.arange(columns)).T + position
            position = int(places.max()) + 1
            left = torch.arange(len(shown))
            if token == IDS["<|video_pad|>"]:
                frames = shown.view(steps, rows * columns, -1)
                change = 1 - torch.nn.functional.cosine_similarity(frames[1:], frames[:-1], dim=-1)
                score = torch.cat([torch.full(frames.shape[1:2], torch.inf), change.flatten()])
                left = score.topk(max(frames.shape[1], int(len(score) * keep))).indices.sort().values
            embedded.append(shown[left])
            positions.append(places[:, left])
        read, at = torch.cat(embedded), torch.cat(positions, 1)
        tokens: list[int] = []
        logprobs: list[float] = []
        for _ in range(NEW):
            out = base.language_model(inputs_embeds=read[None], position_ids=at[:, None], use_cache=False)
            likeliest = self.model.lm_head(out.last_hidden_state[0, -1]).log_softmax(-1).max(-1)
            tokens.append(int(likeliest.indices))
            logprobs.append(float(likeliest.values))
            read = torch.cat([read, self.model.get_input_embeddings()(likeliest.indices[None])])
            at = torch.cat([at, (at.max() + 1).expand(3, 1)], 1)
        return tokens, logprobs

    def check(self, answer: Any, wanted: tuple[list[int], list[float]]) -> None:
        with self.server.http() as http:
            words = [http.post("/detokenize", json={"tokens": [token]}).json()["prompt"] for token in wanted[0]]
        said = answer.choices[0].logprobs.content
        assert [entry.logprob for entry in said] == pytest.approx(wanted[1], abs=2e-3)
        assert [entry.token for entry in said] == words


def said(*parts: dict[str, Any]) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


def shown(image: Image.Image) -> dict[str, Any]:
    return image_part(data_uri(encoded(image)))


def film_part(film: Film) -> dict[str, Any]:
    return video_part(*map(encoded, film))


def details(answer: Any) -> tuple[int, int]:
    counted = answer.usage.prompt_tokens_details.model_dump()
    return counted.get("image_tokens") or 0, counted.get("image_tokens_kept") or 0


def placeholders(prompt: Tensor) -> int:
    return int(np.isin(prompt, SEEN).sum())


def seeing(folder: Path, family: str, *options: str) -> Iterator[Seeing]:
    model = save(folder / "tiny", family)
    with vllm_serving(folder, "--model", str(folder / "tiny"), "--weights", "f32", *options) as server:
        yield Seeing(server, folder / "tiny", family, model)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeing]:
    yield from seeing(tmp_path_factory.mktemp("vllm-qwen"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def pruning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeing]:
    """Its vLLM leaves half of each video, and reads prompts in steps that cut videos."""
    options = ("--vllm-arg", "video_pruning_rate=0.5", "--vllm-arg", "block_size=32", "--max-step-tokens", "24")
    yield from seeing(tmp_path_factory.mktemp("vllm-pruning"), "qwen2_5_vl", *options)


@pytest.mark.parametrize(
    ("images", "films"), [(IMAGES[:1], []), (IMAGES, []), ([], [WIDE]), ([], [TALL, WIDE]), (IMAGES[:1], [TALL])]
)
def test_answers_are_those_of_transformers(qwen: Seeing, images: Film, films: list[Film]) -> None:
    parts = [*map(shown, images), *map(film_part, films), text_part(QUESTION)]
    prompt = qwen.prompt(*parts)
    wanted = qwen.expected(prompt, qwen.inputs(prompt, images, films))
    for _ in range(2):  # read, and from the caches
        answer = qwen.ask(*parts)
        qwen.check(answer, wanted)
        assert details(answer) == (placeholders(prompt), placeholders(prompt))


def test_text_of_a_model_that_sees(qwen: Seeing) -> None:
    prompt = qwen.prompt(text_part(QUESTION))
    answer = qwen.ask(text_part(QUESTION))
    qwen.check(answer, qwen.expected(prompt, {}))
    assert details(answer) == (0, 0)


def test_text_stands_behind_the_last_moment(qwen: Seeing) -> None:
    """As in Qwen's own code; transformers has it stand behind rows and columns alone."""
    parts = [film_part(LONG), text_part("what is this ?")]
    prompt = qwen.prompt(*parts)
    qwen.check(qwen.ask(*parts), qwen.expected_pruned(prompt, qwen.inputs(prompt, [], [LONG]), 1.0))


def test_what_it_says_of_itself(qwen: Seeing, pruning: Seeing) -> None:
    for server, can in ((qwen.server, "video_pruning_rate"), (pruning.server, '{"policy": "evs", "keep": 0.5}')):
        with server.http() as http:
            card = http.get("/v1/models/tiny").json()
        assert card["sees"] == ["image", "video"]
        assert can in card["compression"]["refused"]["compression.vision"]


def test_videos_are_pruned(pruning: Seeing) -> None:
    """As the policy says, whether it is asked for or is what the server does of itself; and so it is reported."""
    parts = [film_part(WIDE), text_part(QUESTION)]
    prompt = pruning.prompt(*parts)
    wanted = pruning.expected_pruned(prompt, pruning.inputs(prompt, [], [WIDE]), 0.5)
    for fields in ({}, {"compression": {"vision": {"policy": "evs", "keep": 0.5}}}):
        answer = pruning.ask(*parts, **fields)
        pruning.check(answer, wanted)
        assert details(answer) == (36, 18)
        assert answer.usage.prompt_tokens == prompt.shape[1]
        report = answer.usage.model_dump()["compression"]
        assert report["plan"]["vision"] == {"policy": "evs", "keep": 0.5, "positions": "original"}
        assert report["tokens_seen"] - report["tokens_kept"]["mean"] == 18
        assert report["bytes_held"] < report["bytes_uncompressed"]
    assert answer.usage.prompt_tokens_details.cached_tokens >= 32


@pytest.mark.parametrize(
    ("order", "question"),
    [
        ("t", "what ?"),  # fewer tokens than are dropped
        ("l", "what ?"),
        ("wi", QUESTION),  # a picture behind a pruned video
        ("itw", QUESTION),
        ("li", QUESTION),
        ("i", QUESTION),  # nothing to prune
        ("", QUESTION),
    ],
)
def test_what_stays_stands_where_it_would(pruning: Seeing, order: str, question: str) -> None:
    """What follows a video is neither lost nor moved, wherever the video is cut between steps or found in a cache."""
    films = [{"w": WIDE, "t": TALL, "l": LONG}[one] for one in order if one != "i"]
    images = IMAGES[: order.count("i")]
    parts = [shown(IMAGES[0]) if one == "i" else film_part(films[order.replace("i", "").index(one)]) for one in order]
    prompt = pruning.prompt(*parts, text_part(question))
    inputs = pruning.inputs(prompt, images, films) if order else {}
    wanted = pruning.expected_pruned(prompt, inputs, 0.5)
    for _ in range(2):
        answer = pruning.ask(*parts, text_part(question))
        pruning.check(answer, wanted)
        whole = placeholders(prompt)
        assert details(answer) == (whole, whole - sum({"w": 18, "t": 18, "l": 16, "i": 0}[one] for one in order))


def test_no_other_pruning(qwen: Seeing, pruning: Seeing) -> None:
    evs = {"policy": "evs", "keep": 0.5}
    for seeing, plan in ((qwen, {"vision": evs}), (pruning, {"vision": evs | {"keep": 0.25}}), (pruning, {})):
        with pytest.raises(BadRequestError, match="vLLM") as refused:
            seeing.ask(film_part(WIDE), text_part("what ?"), compression=plan)
        assert refused.value.param == "compression.vision"


def test_qwen2_vl(tmp_path: Path) -> None:
    for model in seeing(tmp_path, "qwen2_vl"):
        for images, films in ((IMAGES, []), ([], [WIDE, TALL])):
            parts = [*map(shown, images), *map(film_part, films), text_part("what is this ?")]
            prompt = model.prompt(*parts)
            model.check(model.ask(*parts), model.expected(prompt, model.inputs(prompt, images, films)))


def test_others_read_text_only(tmp_path: Path) -> None:
    for model in seeing(tmp_path, "llava"):
        prompt = model.prompt(text_part(QUESTION))
        model.check(model.ask(text_part(QUESTION)), model.expected(prompt, {}))
        with pytest.raises(BadRequestError, match="this model reads no images"):
            model.ask(shown(IMAGES[0]))
