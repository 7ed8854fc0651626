"""Trains the shipped vision model.

    python -m winnow.engine.models.mosaic.train --out DIR                            # on a CPU
    python -m winnow.engine.models.mosaic.train --out DIR --batch 256 --device cuda --workers 12

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
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration

from winnow.engine.models.mosaic import checkpoint
from winnow.engine.models.mosaic.conversations import Batch, conversations
from winnow.engine.models.mosaic.evaluate import Score, evaluate, pixel_values
from winnow.engine.models.mosaic.scenes import KINDS, PATCH, PLACES, SIDE, Bank, load_bank

QUESTIONS = 20
"""About each mosaic."""
TURNS = 6
"""Of the conversations that are tested."""
WARM_UP = 60
WEIGHTS = {"patches": 1.0, "cells": 1.0, "places": 1.0, "presence": 1.0, "answers": 1.0, "looks": 0.3}
"""Of the losses"""
LOOKING = (2, 3, 4)
"""Layers of the language model of which half the heads (those of the first group) are told where to look."""
WEIGHT_DECAY, CLIP = 0.05, 1.0
LOG_EVERY, EVALUATE_EVERY = 20, 500
QUICK, WHOLE = 64, 560
"""Test mosaics of an evaluation on the way and of the last one."""


Losses = dict[str, Tensor]


class Student(nn.Module):
    """The model, and heads that teach its tower and are left out of the checkpoint.

    First the tower learns alone: what each patch shows, in which cell it is and what that shows, and, from the
    class token, what the image shows. Nothing but its position's embedding says where a patch is: from answers
    alone the model learns what is there long before it learns where. The class token's task makes its attention
    mean something, by which some policies prune; it is set at the layer that is read and at the last one.

    Then projector and language model learn to answer, and the tower stays as it is. Some attention heads are told which
    patches show the answer that is being given.
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
        self.cells = nn.Linear(width, 1 + KINDS)
        self.places = nn.Linear(width, PLACES)
        self.presence = nn.ModuleList(nn.Linear(width, KINDS) for _ in range(2))

    def see(self, batch: Batch) -> Losses:
        """Losses of the tower."""
        tower = self._layers(batch.pixels)
        told = {
            name: F.cross_entropy(head(tower[-2][:, 1:]).float().flatten(0, 1), targets.flatten())
            for name, head, targets in (
                ("patches", self.patches, batch.patches),
                ("cells", self.cells, batch.cells),
                ("places", self.places, batch.places),
            )
        }
        presence = [
            F.binary_cross_entropy_with_logits(head(layer[:, 0]).float(), batch.presence)
            for head, layer in zip(self.presence, tower[-2:], strict=True)
        ]
        return {**told, "presence": torch.stack(presence).mean()}

    @torch.no_grad()
    def begin_to_read(self, pixels: Tensor) -> None:
        """Weights of projector and language model, by their width and by what the tower has come to make of images.

        transformers begins all weights at a deviation of 0.02, as models a hundred times as wide want it, and a tower's
        states grow as it learns: beside features a hundred times as large as words, no layer changed what a patch
        says, and attention stayed even.
        """
        model = self.llava.model
        model.vision_tower.requires_grad_(False)
        seen = self._layers(pixels)[-2][:, 1:].flatten(0, 1).float()
        first, second = model.multi_modal_projector.linear_1, model.multi_modal_projector.linear_2
        nn.init.normal_(first.weight, std=first.in_features**-0.5)
        first.weight /= seen.std(0) + 1e-3
        first.bias.copy_(-(first.weight @ seen.mean(0)))
        nn.init.normal_(second.weight, std=0.5 * second.in_features**-0.5)
        nn.init.zeros_(second.bias)
        layers = self.llava.config.text_config.num_hidden_layers
        for name, weight in model.language_model.named_parameters():
            if weight.ndim == 1:
                nn.init.ones_(weight)
            elif "embed" in name:
                nn.init.normal_(weight, std=0.1)
            else:
                adds = "o_proj" in name or "down_proj" in name
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5 / (math.sqrt(2 * layers) if adds else 1))

    def read(self, batch: Batch) -> Losses:
        """Losses of projector and language model; and, no loss, the part of the answers' tokens that are predicted."""
        model = self.llava.model
        with torch.no_grad():
            patches = self._layers(batch.pixels)[-2][:, 1:]
        features = model.multi_modal_projector(patches)
        embeddings = model.get_input_embeddings()(batch.tokens)
        image = (batch.tokens == checkpoint.IMAGE).unsqueeze(-1)
        embeddings = embeddings.to(features.dtype).masked_scatter(image, features)
        seen = _seen(batch.branches)
        read = model.language_model(
            inputs_embeds=embeddings,
            attention_mask=seen[:, None],
            position_ids=batch.positions,
            use_cache=False,
            output_hidden_states=True,
        )
        answers = batch.targets >= 0
        logits = self.llava.lm_head(read.last_hidden_state[answers]).float()
        targets = batch.targets[answers]
        return {
            "answers": F.cross_entropy(logits, targets),
            "looks": torch.stack(
                [self._look(batch, seen, layer, read.hidden_states[layer]) for layer in LOOKING]
            ).mean(),
            "right": (logits.argmax(-1) == targets).float().mean().detach(),
        }

    def _layers(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """What each of the tower's layers makes of [n, 96, 96, 3] bytes."""
        seen: tuple[Tensor, ...] = self.llava.model.vision_tower(
            pixel_values(pixels), output_hidden_states=True
        ).hidden_states
        return seen

    def _look(self, batch: Batch, seen: Tensor, index: int, hidden: Tensor) -> Tensor:
        """Cross entropy of a layer's attention, where a word of an answer is chosen, to an even look at what shows it.

        `hidden`: what the layer reads, [mosaics, tokens, width].
        """
        text = self.llava.config.text_config
        layer = self.llava.model.language_model.layers[index]
        is_answer = (batch.targets >= 0) & (batch.targets != checkpoint.END)
        rows, places = is_answer.nonzero(as_tuple=True)
        cells = (batch.places - batch.places.amin(1, keepdim=True))[rows]
        shown = batch.looks[rows, places].gather(1, cells)
        some = shown.any(-1)
        rows, places, shown = rows[some], places[some], shown[some].float()
        normed = layer.input_layernorm(hidden)
        cos, sin = (
            part[:, :, None].float() for part in self.llava.model.language_model.rotary_emb(hidden, batch.positions)
        )
        heads = text.num_attention_heads // text.num_key_value_heads
        queries = layer.self_attn.q_proj(normed).unflatten(-1, (-1, text.head_dim))[:, :, :heads]
        keys = layer.self_attn.k_proj(normed).unflatten(-1, (-1, text.head_dim))[:, :, :1]
        queries, keys = _turned(queries.float(), cos, sin), _turned(keys.float(), cos, sin).squeeze(2)
        scores = torch.einsum("bqhd,bkd->bqhk", queries, keys)[rows, places] * text.head_dim**-0.5
        looked = scores.masked_fill(~seen[rows, places, None], -torch.inf).log_softmax(-1)
        first = (batch.tokens == checkpoint.IMAGE).int().argmax(1)[rows]
        image = first[:, None] + torch.arange(checkpoint.PATCHES, device=first.device)
        looked = looked.gather(-1, image[:, None].expand(-1, heads, -1))
        return -((looked.mean(1) * shown).sum(-1) / shown.sum(-1)).sum() / max(1, len(rows))


def _seen(branches: Tensor) -> Tensor:
    """[mosaics, tokens, tokens] bool: which token sees which: former ones of its conversation."""
    tokens = branches.shape[1]
    formerly = torch.ones(tokens, tokens, dtype=torch.bool, device=branches.device).tril()
    return formerly & ((branches[:, None] == 0) | (branches[:, None] == branches[:, :, None]))


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
        return conversations(self.bank, [self.seed, step], self.batch, QUESTIONS)


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
        tower_steps: int,
    ):
        self.device, self.rate, self.seed, self.batch = torch.device(device), rate, seed, batch
        self.out, self.state, self.bank, self.test = out, state, bank, test
        torch.manual_seed(seed)
        self.student = Student().to(self.device)
        decayed = [weight for weight in self.student.parameters() if weight.ndim > 1]
        others = [weight for weight in self.student.parameters() if weight.ndim < 2]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
        self.tower_steps = tower_steps
        self.step, self.steps, self.spent_s = 0, 0, 0.0
        if state.is_file():
            self._resume()

    def train(self, steps: int, workers: int) -> None:
        """All that is left of `steps`, those of the tower included; then the last evaluation."""
        self.steps = self.steps or steps
        for batch in self._batches(workers):
            started = time.perf_counter()
            losses = self._one(batch)
            if self.step % LOG_EVERY == 0:
                self._log({name: round(value.item(), 4) for name, value in losses.items()})
            self.spent_s += time.perf_counter() - started
            if self.step == self.steps:
                break
            if self.step % EVALUATE_EVERY == 0:
                if self.step > self.tower_steps:
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
        if self.step == self.tower_steps:
            torch.manual_seed(self.seed)
            self.student.begin_to_read(batch.pixels)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            losses = self.student.see(batch) if self.step < self.tower_steps else self.student.read(batch)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack([WEIGHTS[name] * loss for name, loss in losses.items() if name in WEIGHTS]).sum().backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.optimizer.step()
        self.step += 1
        return losses

    def _pace(self) -> float:
        """Part of the learning rate: of tower and of what reads it, linear warm-up, then half a cosine."""
        first, last = (0, self.tower_steps) if self.step < self.tower_steps else (self.tower_steps, self.steps)
        done = (self.step - first) / max(1, last - first)
        return min(1.0, (self.step - first + 1) / WARM_UP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))

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
    steps: Annotated[int, typer.Option(min=1, help="all steps, those of the tower included")] = 5700,
    tower_steps: Annotated[int, typer.Option(min=1, help="first steps, in which the tower learns alone")] = 2500,
    batch: Annotated[int, typer.Option(min=1, help="mosaics a step")] = 16,
    rate: Annotated[float, typer.Option(help="highest learning rate")] = 1.5e-3,
    workers: Annotated[int, typer.Option(min=0, help="processes that make data ahead")] = 0,
    seed: int = 0,
) -> None:
    torch.set_float32_matmul_precision("high")
    test, bank = load_bank("test", images), load_bank("train", images, flips=True)
    trainer = Trainer(bank, test, out, state or out / "state.pt", device, batch, rate, seed, tower_steps)
    trainer.train(steps, workers)


if __name__ == "__main__":
    typer.run(main)
