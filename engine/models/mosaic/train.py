"""Trains the shipped vision model.

    python -m winnow.engine.models.mosaic.train --out DIR --minutes 110      # two CPU cores
    python -m winnow.engine.models.mosaic.train --out DIR --minutes 6 --batch 256 --device cuda

Run again with the same arguments it goes on where it was stopped. A step's data follow from seed and step alone.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration

from winnow.engine.models.mosaic import checkpoint
from winnow.engine.models.mosaic.conversations import Batch, conversations
from winnow.engine.models.mosaic.evaluate import Score, evaluate, pixel_values
from winnow.engine.models.mosaic.scenes import KINDS, PATCH, PLACES, SIDE, Bank, load_bank

TURNS = 6
WARM_UP = 200
MEASURED = (20, 60)
"""Steps by whose speed `--minutes` becomes a number of steps."""
PATCH_WEIGHT, PLACE_WEIGHT, PRESENCE_WEIGHT, LOOK_WEIGHT = 0.5, 0.5, 0.5, 0.3
LOOKING = (2, 3, 4)
"""Layers of the language model of which half the heads (those of the first group) are told where to look."""
WEIGHT_DECAY, CLIP = 0.05, 1.0
LOG_EVERY, EVALUATE_EVERY = 20, 500
QUICK, WHOLE = 64, 560
"""Test mosaics of an evaluation on the way and of the last one."""


class Losses(NamedTuple):
    answers: Tensor
    right: Tensor
    """Part of the answers' tokens that are predicted."""
    patches: Tensor
    places: Tensor
    presence: Tensor
    looks: Tensor


class Student(nn.Module):
    """The model with what teaches its tower: what each patch shows, in which cell it is, and, from the class token,
    what the image shows. Nothing but its position's embedding says where a patch is: from answers alone the model
    learns what is there long before it learns where.

    The class token's task makes its attention mean something, by which some policies prune; it is set at the layer
    that is read and at the last one. The heads are left out of the checkpoint.

    Some attention heads of the language model are told which patches show the answer that is being given.
    """

    def __init__(self) -> None:
        super().__init__()
        config = checkpoint.model_config()
        self.llava = LlavaForConditionalGeneration(config)
        width = config.vision_config.hidden_size
        embeddings = self.llava.model.vision_tower.get_submodule("embeddings")
        with torch.no_grad():
            embeddings.position_embedding.weight[1:] = _positions(width)
        self.patches = nn.Linear(width, 1 + KINDS)
        self.places = nn.Linear(width, PLACES)
        self.presence = nn.ModuleList(nn.Linear(width, KINDS) for _ in range(2))

    def forward(self, batch: Batch) -> Losses:
        model = self.llava.model
        tower = model.vision_tower(pixel_values(batch.pixels), output_hidden_states=True).hidden_states
        read = tower[-2]
        features = model.multi_modal_projector(read[:, 1:])
        embeddings = model.get_input_embeddings()(batch.tokens)
        image = (batch.tokens == checkpoint.IMAGE).unsqueeze(-1)
        embeddings = embeddings.to(features.dtype).masked_scatter(image, features)
        # Conversations are padded behind their end, where causal attention does not see it: no mask is needed.
        read_by = model.language_model(inputs_embeds=embeddings, use_cache=False, output_hidden_states=True)
        hidden = read_by.last_hidden_state
        answers = batch.targets >= 0
        logits = self.llava.lm_head(hidden[answers]).float()
        targets = batch.targets[answers]
        presence = [
            F.binary_cross_entropy_with_logits(head(layer[:, 0]).float(), batch.presence)
            for head, layer in zip(self.presence, tower[-2:], strict=True)
        ]
        return Losses(
            answers=F.cross_entropy(logits, targets),
            right=(logits.argmax(-1) == targets).float().mean(),
            patches=F.cross_entropy(self.patches(read[:, 1:]).float().flatten(0, 1), batch.patches.flatten()),
            places=F.cross_entropy(self.places(read[:, 1:]).float().flatten(0, 1), batch.places.flatten()),
            presence=torch.stack(presence).mean(),
            looks=torch.stack([self._look(batch, index, read_by.hidden_states[index]) for index in LOOKING]).mean(),
        )

    def _look(self, batch: Batch, index: int, hidden: Tensor) -> Tensor:
        """Cross entropy of a layer's attention, where a word of an answer is chosen, to an even look at what shows it.

        `hidden`: what the layer reads, [conversations, tokens, width].
        """
        text = self.llava.config.text_config
        layer = self.llava.model.language_model.layers[index]
        is_answer = (batch.targets >= 0) & (batch.targets != checkpoint.END)
        rows, places = is_answer.nonzero(as_tuple=True)
        turns = (batch.tokens == checkpoint.ASSISTANT).cumsum(1)[rows, places] - 1
        shown = batch.looks[rows, turns]
        some = shown.any(-1)
        rows, places, shown = rows[some], places[some], shown[some].float()
        normed = layer.input_layernorm(hidden)
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        cos, sin = self.llava.model.language_model.rotary_emb(hidden, positions[None])
        heads = text.num_attention_heads // text.num_key_value_heads
        queries = layer.self_attn.q_proj(normed[rows, places]).unflatten(-1, (-1, text.head_dim))[:, :heads]
        keys = layer.self_attn.k_proj(normed).unflatten(-1, (-1, text.head_dim))[:, :, 0]
        queries = _turned(queries.float(), cos[0, places, None].float(), sin[0, places, None].float())
        keys = _turned(keys.float(), cos.float(), sin.float())
        logits = torch.einsum("nhd,ntd->nht", queries, keys.index_select(0, rows)) * text.head_dim**-0.5
        logits = logits.masked_fill((positions > places[:, None])[:, None], -torch.inf)
        first = (batch.tokens == checkpoint.IMAGE).int().argmax(1)[rows]
        image = first[:, None] + torch.arange(checkpoint.PATCHES, device=first.device)
        looked = logits.log_softmax(-1).gather(-1, image[:, None].expand(-1, heads, -1))
        return -((looked.mean(1) * shown).sum(-1) / shown.sum(-1)).sum() / max(1, len(rows))


def _positions(width: int) -> Tensor:
    """[144, width]: what position embeddings begin with: waves along rows, and along columns.

    CLIP begins them at a deviation of 0.02, beside which what a bright shape's patch adds is large: after 500 steps the
    tower told the cells of only 70 % of the patches that show a shape.
    """
    side = SIDE // PATCH
    angles = torch.arange(side)[:, None] * torch.arange(1, width // 4 + 1) * (math.pi / side)
    waves = 0.7 * torch.cat([angles.sin(), angles.cos()], -1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves.expand(side, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


def _turned(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, as Llama's attention has it: halves are turned against each other."""
    left, right = vectors.chunk(2, -1)
    return vectors * cos + torch.cat([-right, left], -1) * sin


class Steps(Dataset[Batch]):
    """The batch of each step, from the seed and the step."""

    def __init__(self, bank: Bank, seed: int, batch: int):
        self.bank, self.seed, self.batch = bank, seed, batch

    def __getitem__(self, step: int) -> Batch:
        return conversations(self.bank, [self.seed, step], self.batch, TURNS, varied=True)


class Trainer:
    def __init__(
        self,
        bank: Bank,
        test: Bank,
        out: Path,
        state: Path,
        device: str,
        batch: int,
        rate: float,
        seed: int,
        weights: Path | None = None,
    ):
        self.device, self.rate, self.seed, self.batch = torch.device(device), rate, seed, batch
        self.out, self.state, self.bank, self.test = out, state, bank, test
        torch.manual_seed(seed)
        self.student = Student().to(self.device)
        if weights is not None:
            odd = self.student.llava.load_state_dict(load_file(weights), strict=False)
            if odd.unexpected_keys or odd.missing_keys != ["lm_head.weight"]:  # which is tied to the embeddings
                raise ValueError(f"{weights}: not the weights of this model")
        decayed = [weight for weight in self.student.parameters() if weight.ndim > 1]
        others = [weight for weight in self.student.parameters() if weight.ndim < 2]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
        self.step, self.steps, self.spent_s = 0, 0, 0.0
        if state.is_file():
            self._resume()

    def train(self, steps: int | None, minutes: float | None, workers: int) -> None:
        """All that is left of `steps`, or of as many as fit into `minutes`; then the last evaluation."""
        self.steps = self.steps or steps or 0
        marks: list[float] = []
        for batch in self._batches(workers):
            started = time.perf_counter()
            losses = self._one(batch)
            if self.step % LOG_EVERY == 0:
                self._log({name: round(value.item(), 4) for name, value in losses._asdict().items()})
            self.spent_s += time.perf_counter() - started
            if not self.steps and self.step in MEASURED:
                marks.append(time.perf_counter())
                if len(marks) == len(MEASURED):
                    self.steps = self._fitting((marks[1] - marks[0]) / (MEASURED[1] - MEASURED[0]), minutes or 0.0)
            if self.step == self.steps:
                break
            if self.step % EVALUATE_EVERY == 0:
                self._evaluate(QUICK)
                self.save()
        self._evaluate(WHOLE)
        self.save()

    def save(self) -> None:
        """The checkpoint as transformers loads it, and the state to go on from."""
        checkpoint.write_settings(self.out)
        weights = self.student.llava.state_dict()
        del weights["lm_head.weight"]  # tied to the embeddings
        halves = {name: weight.half().cpu().contiguous() for name, weight in weights.items()}
        save_file(halves, self.out / "model.safetensors", metadata={"format": "pt"})
        state = {
            "step": self.step,
            "steps": self.steps,
            "spent_s": self.spent_s,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        self.state.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.state.with_suffix(".new"))
        os.replace(self.state.with_suffix(".new"), self.state)

    def _resume(self) -> None:
        state = torch.load(self.state, map_location=self.device)
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.steps, self.spent_s = state["step"], state["steps"], state["spent_s"]

    def _batches(self, workers: int) -> Iterator[Batch]:
        """Batches of the steps from here on, made ahead by `workers` processes; without any, when they are wanted."""
        if self.step == self.steps and self.steps:
            return iter(())
        how: dict[str, Any] = {}
        if workers:
            how = {"num_workers": workers, "multiprocessing_context": "spawn", "prefetch_factor": 4}
        steps = Steps(self.bank, self.seed, self.batch)
        return iter(DataLoader(steps, batch_size=None, sampler=itertools.count(self.step), **how))

    def _one(self, batch: Batch) -> Losses:
        rate = self.rate * self._pace()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = Batch(*(part.to(self.device, non_blocking=True) for part in batch))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            losses: Losses = self.student(batch)
        self.optimizer.zero_grad(set_to_none=True)
        taught = PATCH_WEIGHT * losses.patches + PLACE_WEIGHT * losses.places + PRESENCE_WEIGHT * losses.presence
        total = losses.answers + taught + LOOK_WEIGHT * losses.looks
        total.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.optimizer.step()
        self.step += 1
        return losses

    def _pace(self) -> float:
        """Part of the learning rate: linear warm-up, then half a cosine down to a hundredth."""
        if self.step < WARM_UP or not self.steps:
            return min(1.0, (self.step + 1) / WARM_UP)
        done = (self.step - WARM_UP) / max(1, self.steps - WARM_UP)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))

    def _fitting(self, seconds_per_step: float, minutes: float) -> int:
        left = minutes * 60 - self.spent_s
        return max(self.step + 1, self.step + int(0.9 * left / seconds_per_step))  # a tenth is for evaluations

    def _evaluate(self, mosaics: int) -> None:
        started = time.perf_counter()
        model = self.student.llava.eval()
        scores = {
            "test": evaluate(model, self.test, mosaics),
            "test, no image": evaluate(model, self.test, mosaics, blind=True),
            "test, conversations": evaluate(model, self.test, mosaics, turns=TURNS),
        }
        self.student.train()
        self._log({"mosaics": mosaics, **{name: _rounded(score) for name, score in scores.items()}})
        self.spent_s += time.perf_counter() - started

    def _log(self, record: dict[str, Any]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"step": self.step, "steps": self.steps, "seconds": round(self.spent_s, 1), **record})
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def _rounded(score: Score) -> dict[str, float]:
    return {name: round(right, 4) for name, right in score.items()}


def main(
    out: Annotated[Path, typer.Option(help="folder of the checkpoint and of log.jsonl")],
    state: Annotated[Path | None, typer.Option(help="file to go on from; OUT/state.pt if not given")] = None,
    images: Annotated[Path | None, typer.Option(help="cache of easy-vqa's images; written if missing")] = None,
    device: str = "cpu",
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    minutes: Annotated[float | None, typer.Option(help="instead of steps: as many as fit by measured speed")] = None,
    batch: Annotated[int, typer.Option(min=1, help="mosaics a step, each with six questions")] = 32,
    rate: Annotated[float, typer.Option(help="highest learning rate")] = 1e-3,
    workers: Annotated[int, typer.Option(min=0, help="processes that make data ahead")] = 0,
    seed: int = 0,
    weights: Annotated[
        Path | None, typer.Option(help="model.safetensors to begin with where there is no state")
    ] = None,
) -> None:
    if (steps is None) == (minutes is None):
        raise typer.BadParameter("give either --steps or --minutes")
    torch.set_float32_matmul_precision("high")
    test, bank = load_bank("test", images), load_bank("train", images, flips=True)
    trainer = Trainer(bank, test, out, state or out / "state.pt", device, batch, rate, seed, weights)
    trainer.train(steps, minutes, workers)


if __name__ == "__main__":
    typer.run(main)
