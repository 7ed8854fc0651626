"""transformers in a process of its own: JSON commands on stdin, JSON answers on stdout, a line each.

    {"do": "decode", "key": ..., "prompt": [...], "tokens": n}      -> {"tok_s", "tokens", "way", "held_bytes"}
    {"do": "prefill", "prompt": [...]}                              -> {"seconds"}
    {"do": "together", "prompts": [[...], ...], "tokens": n}        -> {"seconds", "prefill_seconds", "way"}

It gets the best of what it has: prompts are read with sdpa or eager attention, whichever reads a long one faster; each
context is decoded with either of them and a cache that grows or one that was allocated at full length, whichever is
fastest there. Only wanted logits are computed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import gguf
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from winnow.engine.models.files import DEFAULT, resolve_model

Attention = Literal["sdpa", "eager"]
ATTENTIONS: tuple[Attention, ...] = ("sdpa", "eager")
CacheKind = Literal["dynamic", "static"]
TRIAL_PROMPT = 2048
TRIAL_TOKENS = 6
"""No request asks for fewer."""

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}


def load(name: str) -> Any:
    """The model in float32, from the same file that the server reads."""
    path = resolve_model(name)
    if name != DEFAULT:
        where = {"gguf_file": path.name} if path.is_file() else {}
        folder = path.parent if path.is_file() else path
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()
    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)  # asked for once per module: seconds each time
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    return model


@dataclass
class Context:
    """Prompts that were read once, in a cache that can be wound back to their end."""

    model: Any
    cache: Cache
    kind: CacheKind
    first: Tensor
    """[B, 1] token after each prompt"""
    attention: Attention

    @classmethod
    def read(cls, model: Any, prompts: Tensor, attention: Attention) -> Context:
        """Reads prompts [B, length] into a cache that grows."""
        cache = DynamicCache(config=model.config)
        model.set_attn_implementation(attention)
        return cls(model, cache, "dynamic", _next(model, prompts, cache), attention)

    @property
    def way(self) -> str:
        return f"{self.attention} attention, {self.kind} cache"

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token of every sequence."""
        return sum(part[:, :, :1].nbytes for layer in self.cache.layers for part in (layer.keys, layer.values))

    def fastest(self, room: int) -> Context:
        """The same state in the way that decodes fastest, with room for so many more tokens."""
        static = StaticCache(self.model.config, max_cache_len=self.cache.get_seq_length() + room)
        for i, layer in enumerate(self.cache.layers):
            static.update(layer.keys, layer.values, i)
        ways = [replace(self, attention=attention) for attention in ATTENTIONS]
        ways += [replace(way, cache=static, kind="static") for way in ways]
        return min(ways, key=lambda way: min(way.decode(TRIAL_TOKENS)[0] for _ in range(2)))

    def decode(self, count: int) -> tuple[float, list[int]]:
        """Seconds for `count` tokens after the first, and the first sequence's tokens, the first included."""
        token, out = self.first, [self.first]
        self.model.set_attn_implementation(self.attention)
        began = time.perf_counter()
        for _ in range(count):
            token = _next(self.model, token, self.cache)
            out.append(token)
        seconds = time.perf_counter() - began
        self._rewind(count)
        return seconds, torch.cat(out, 1)[0].tolist()

    def _rewind(self, count: int) -> None:
        if self.kind == "dynamic":
            self.cache.crop(-count)
            return
        for layer in self.cache.layers:
            layer.cumulative_length.sub_(count)


def _next(model: Any, tokens: Tensor, cache: Cache) -> Tensor:
    """[B, 1] likeliest tokens after these."""
    logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
    return logits[:, -1].argmax(-1, keepdim=True)


class Worker:
    def __init__(self, name: str):
        self.model = load(name)
        self.contexts: dict[str, Context] = {}
        self.reading: Attention = "sdpa"
        seconds = {}
        for self.reading in ATTENTIONS:
            seconds[self.reading] = min(self.prefill(list(range(1000, 1000 + TRIAL_PROMPT)))["seconds"] for _ in "ab")
        self.reading = min(ATTENTIONS, key=lambda name: seconds[name])

    def decode(self, key: str, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Decodes after a prompt, which is read only when its key is new."""
        if key not in self.contexts:
            self.contexts[key] = Context.read(self.model, torch.tensor([prompt]), self.reading).fastest(room=tokens)
        context = self.contexts[key]
        seconds, out = context.decode(tokens - 1)
        held = (len(prompt) + tokens - 1) * context.token_bytes
        return {"tok_s": (tokens - 1) / seconds, "tokens": out, "way": context.way, "held_bytes": held}

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        began = time.perf_counter()
        Context.read(self.model, torch.tensor([prompt]), self.reading)
        return {"seconds": time.perf_counter() - began}

    def together(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """One batch of equally long prompts, with no padding: all start and end at once."""
        began = time.perf_counter()
        context = Context.read(self.model, torch.tensor(prompts), self.reading)
        prefill_seconds = time.perf_counter() - began
        context = context.fastest(room=tokens)  # not timed
        seconds, _ = context.decode(tokens - 1)
        return {"seconds": prefill_seconds + seconds, "prefill_seconds": prefill_seconds, "way": context.way}


def main() -> None:
    # Libraries may print: what they print goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    with torch.inference_mode():
        worker = Worker(name)
        print(json.dumps({"reading": worker.reading}), file=answers)
        commands: dict[str, Callable[..., dict[str, Any]]] = {
            "decode": worker.decode,
            "prefill": worker.prefill,
            "together": worker.together,
        }
        for line in sys.stdin:
            command = json.loads(line)
            answer: dict[str, Any] = commands[command.pop("do")](**command)
            print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
