"""Making a profile: a calibrator chooses what the model reads, watches it read, and sums up what it saw."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol

import torch

from winnow.engine.calibration.registry import CALIBRATED
from winnow.engine.calibration.store import Profile
from winnow.engine.calibration.watch import Glimpse, watch
from winnow.engine.models.config import ModelConfig
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model, resolve_model
from winnow.engine.models.tokenizer import Tokenizer, load_tokenizer
from winnow.kernels.dispatch import WeightKind, backend


def load(model: str, weights: WeightKind, threads: int | None) -> tuple[Path, Decoder, Tokenizer]:
    """The files of a model (see `resolve_model`), the model, and its tokenizer. ModelError where that cannot be."""
    from winnow.kernels import cpu

    path = resolve_model(model)
    torch.set_num_threads(threads or os.cpu_count() or 1)
    cpu.set_threads(torch.get_num_threads())
    return path, load_model(model, backend("cpu"), weights), load_tokenizer(model)


class Calibrator(Protocol):
    """Makes the profile of one model for one method. A new one is a file here and a line in the registry."""

    def __init__(self, config: ModelConfig): ...

    def prompts(self, text: Sequence[int]) -> list[list[int]]:
        """What the model is to read, made of the tokens of a text or of none of them."""

    def see(self, glimpse: Glimpse) -> None:
        """Called for every layer of every prompt."""

    def profile(self) -> Profile:
        """What was seen, when all prompts were read."""


def calibrate(
    decoder: Decoder,
    method: str,
    text: Sequence[int],
    advance: Callable[[int, int], None] = lambda read, prompts: None,
) -> Profile:
    """The profile of a model for a method.

    Args
        text: tokens of a text; what a calibrator does not need of it is not read
        advance: told (prompts read, prompts in all) before the first and after each
    """
    module, attribute = CALIBRATED[method].split(":")
    calibrator: Calibrator = getattr(import_module(module), attribute)(decoder.config)
    prompts = calibrator.prompts(text)
    advance(0, len(prompts))
    for read, prompt in enumerate(prompts, 1):
        watch(decoder, prompt, calibrator.see)
        advance(read, len(prompts))
    return calibrator.profile()
