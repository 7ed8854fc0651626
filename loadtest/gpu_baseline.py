"""The baseline section of `make bench-gpu`: transformers with a model of the same shape, in bf16 with torch's SDPA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from gpu_clock import HAS_GPU, seconds, seconds_replayed
from gpu_section import Section
from winnow.kernels.dispatch import Backend


class Baseline:
    def __init__(self, section: Section, device: torch.device):
        self.section = section
        self.device = device
        stated = {key: value for key, value in section.sizes.model.items() if key != "architectures"}
        config = LlamaConfig(**stated, attn_implementation="sdpa", dtype=torch.bfloat16)
        with device, _default_dtype(torch.bfloat16):
            self.model: Any = LlamaForCausalLM(config).eval()

    def decode(self, kind: str, sequences: int, context: int) -> None:
        """The way is a cache that grows, one of full length, or the latter in a CUDA graph."""
        tokens = torch.ones(sequences, 1, dtype=torch.long, device=self.device)
        cache = self._filled(DynamicCache if kind == "dynamic" else StaticCache, sequences, context)
        call = partial(self._next, tokens, cache)
        call()
        call()
        taken = seconds_replayed([call]) if kind == "graph" else seconds(call, repeats=12)
        title = "Decode of transformers: tokens a second of so many sequences, the same shape in bf16"
        table = self.section.table("baseline decode", title)
        note = f"{1e3 * taken:.1f} ms a step"
        table.add(
            f"{sequences} x {context}",
            f"{kind} cache" if kind != "graph" else "CUDA graph",
            "tok/s",
            sequences / taken,
            note,
        )

    def prefill(self, prompts: int, context: int) -> None:
        tokens = torch.ones(prompts, context, dtype=torch.long, device=self.device)
        read: Callable[[], object] = lambda: self._next(tokens, DynamicCache(config=self.model.config))  # noqa: E731
        read()
        taken = seconds(read, repeats=3)
        table = self.section.table("baseline prefill", "Prompts read by transformers, the same shape in bf16")
        table.add(f"{prompts} x {context}", "transformers", "tok/s", prompts * context / taken)

    def _next(self, tokens: Tensor, cache: Cache) -> Tensor:
        """[B, 1] likeliest tokens after these."""
        logits = self.model(tokens, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def _filled(self, make: type[Cache], sequences: int, context: int) -> Cache:
        """A cache of random keys and values."""
        config = self.model.config
        cache = make(config=config) if make is DynamicCache else make(config=config, max_cache_len=context + 128)
        for layer in range(config.num_hidden_layers):
            size = (2, sequences, config.num_key_value_heads, context, config.head_dim)
            keys, values = torch.randn(size, device=self.device, dtype=torch.bfloat16)
            cache.update(keys, values, layer)
        return cache


class _default_dtype:
    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self._before)


def baseline(section: Section, ops: Backend) -> None:
    sizes = section.sizes
    made: list[Baseline] = []
    section.run("make the baseline", lambda: made.append(Baseline(section, ops.device())))
    for one in made:
        for sequences, context in sizes.baseline:
            for kind in ("dynamic", "static"):
                section.run(f"decode {sequences} x {context} {kind}", partial(one.decode, kind, sequences, context))
        for prompts, context in sizes.engine_prefill:
            section.run(f"prefill {prompts} x {context}", partial(one.prefill, prompts, context))
        for sequences, context in sizes.baseline if HAS_GPU else ():  # at the end: what cannot be captured may do harm
            section.run(f"decode {sequences} x {context} graph", partial(one.decode, "graph", sequences, context))
