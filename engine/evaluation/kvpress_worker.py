"""Runs kvpress: `PYTHON kvpress_worker.py JOB.json OUT.npz`, with the interpreter of an environment that has it.

It stands alone: that environment has neither Winnow nor its transformers. The job is {model, threads, prompts, texts,
lead_ins, cases}, where a case is {name, press, knobs, attention, sums, wrapper, page}. For each case and prompt it
compresses the prompt as kvpress does, reads the text after it, and writes how likely the text was, how far the
distributions are from the uncompressed ones, and what was kept, tokens or channels. It says a line for each case that
is done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import kvpress
import numpy as np
import torch
import transformers
from kvpress.presses import kvzip_press
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache


@contextmanager
def recorded(press: Any, sums: bool) -> Iterator[list[Tensor]]:
    """The scores [kv_heads, tokens] that a press gives, layer by layer; means over the queries that could see a token
    are made sums again where they are wanted."""
    scores: list[Tensor] = []
    score = getattr(press, "score", None)
    if score is None:  # KVzipPress, which masks what it drops, and ThinKPress, which zeroes channels
        yield scores
        return

    def recording(*args: Any, **more: Any) -> Tensor:
        found: Tensor = score(*args, **more)
        if sums:
            found = found * torch.arange(found.shape[-1], 0, -1)
        scores.append(found[0])
        return found

    press.score = recording
    try:
        yield scores
    finally:
        press.score = score


@contextmanager
def sparing(press: Any, newest: int) -> Iterator[None]:
    """Leaves the keys of the newest tokens as they are."""
    compress = press.compress

    def spared(module: Any, hidden: Tensor, keys: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        whole = keys[:, :, keys.shape[2] - newest :].clone()
        keys, values = compress(module, hidden, keys, *more)
        return torch.cat([keys[:, :, : keys.shape[2] - newest], whole], 2), values

    press.compress = spared if newest else compress
    try:
        yield
    finally:
        press.compress = compress


class LeadIns:
    """A tokenizer of the few texts that KVzipPress has one for; without a template the whole prompt is its context."""

    chat_template = None

    def __init__(self, tokens: dict[str, list[int]]):
        self._tokens = {"": [], **tokens}

    def encode(self, text: str, **_: Any) -> Tensor:
        return torch.tensor([self._tokens[text]], dtype=torch.long)


@torch.inference_mode()
def read(
    model: Any,
    prompt: list[int],
    text: list[int],
    press: Any | None = None,
    wrapper: Any = None,
    sums: bool = False,
    page: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """[text - 1, vocab] logprobs after each token of the text but the last, and whether a token was kept: [layers,
    kv_heads, prompt], a channel, [layers, kv_heads, head_dim], or None without a press.

    Args
        page: the newest tokens that do not fill so many are spared; none if 0
    """
    cache, behind = DynamicCache(), len(prompt)
    if press is None:
        model.model(input_ids=torch.tensor([prompt]), past_key_values=cache)
        kept, is_even = None, True
    else:
        with (
            recorded(press, sums) as scores,
            sparing(press, len(prompt) % page if page else 0),
            (wrapper or press)(model),
        ):
            model.model(input_ids=torch.tensor([prompt]), past_key_values=cache)
        if isinstance(press, kvpress.ThinKPress):
            kept, is_even = kept_channels(cache), True
        else:
            kept, is_even = kept_tokens(model, cache, scores)
        if isinstance(wrapper, kvpress.KeyRerotationPress):
            behind = cache.get_seq_length()
    # Masks are made for all layers alike, and masked keys are looked for by the query: uneven lanes read one by one.
    logits = []
    for start in range(0, len(text) - 1, len(text) if is_even else 1):
        tokens = torch.tensor([text[start:-1] if is_even else text[start : start + 1]])
        positions = behind + start + torch.arange(tokens.shape[1])[None]
        logits.append(model(input_ids=tokens, past_key_values=cache, position_ids=positions).logits[0])
    return torch.cat(logits).float().log_softmax(-1), kept


def kept_channels(cache: DynamicCache) -> Tensor:
    """[layers, kv_heads, head_dim]: what is dropped is zero in all tokens, the first one included."""
    return torch.stack([layer.keys[0, :, 0] != 0 for layer in cache.layers])


def kept_tokens(model: Any, cache: DynamicCache, scores: list[Tensor]) -> tuple[Tensor, bool]:
    """[layers, kv_heads, prompt], and whether all lanes keep as many."""
    masked: list[Any] = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    sizes = {layer.keys.shape[2] for layer in cache.layers}
    if any(of is not None for of in masked):
        kept = torch.ones(len(masked), *cache.layers[0].keys.shape[1:3], dtype=torch.bool)
        for lanes, (_, heads, positions) in zip(kept, masked, strict=True):
            lanes[heads, positions] = False
        return kept, False
    kept = torch.zeros(len(scores), *scores[0].shape, dtype=torch.bool)
    for lanes, layer, score in zip(kept, cache.layers, scores, strict=True):
        lanes.scatter_(1, score.topk(layer.keys.shape[2], dim=-1).indices, True)
    return kept, len(sizes) == 1


def main(job_path: str, out_path: str) -> None:
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa").eval()
    out: dict[str, Any] = {"versions": np.array([kvpress_version(), transformers.__version__, torch.__version__])}
    pairs = list(zip(job["prompts"], job["texts"], strict=True))
    exact = [read(model, prompt, text)[0] for prompt, text in pairs]
    for i, ((_, text), logprobs) in enumerate(zip(pairs, exact, strict=True)):
        out[f"off/{i}/true"] = chosen(logprobs, text)
    print("off", flush=True)
    lead_ins = LeadIns(job["lead_ins"])
    kvzip_press.AutoTokenizer = SimpleNamespace(from_pretrained=lambda _: lead_ins)
    for case in job["cases"]:
        model.set_attn_implementation(case["attention"])
        press = getattr(kvpress, case["press"])(**case["knobs"])
        wrapper = getattr(kvpress, case["wrapper"])(press) if case["wrapper"] else None
        for i, (prompt, text) in enumerate(pairs):
            logprobs, kept = read(model, prompt, text, press, wrapper, case["sums"], case["page"])
            key = f"{case['name']}/{i}"
            out[f"{key}/true"] = chosen(logprobs, text)
            out[f"{key}/kl"] = (exact[i].exp() * (exact[i] - logprobs)).sum(-1).mean().item()
            out[f"{key}/agreement"] = (exact[i].argmax(-1) == logprobs.argmax(-1)).float().mean().item()
            assert kept is not None
            out[f"{key}/kept"] = kept.numpy()
        print(case["name"], flush=True)
    np.savez(out_path, **out)


def chosen(logprobs: Tensor, text: list[int]) -> np.ndarray:
    """[text - 1] of what the text says."""
    return logprobs.gather(1, torch.tensor(text[1:])[:, None])[:, 0].numpy()


def kvpress_version() -> str:
    from importlib.metadata import version

    return version("kvpress")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
