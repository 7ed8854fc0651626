"""Runs kvpress: `PYTHON kvpress_worker.py JOB.json OUT.npz`, with the interpreter of an environment that has it.

It stands alone: that environment has neither Winnow nor its transformers. The job is {model, threads, prompts, texts,
cases}, where a case is {name, press, knobs, ratio, attention, sums}. For each case and prompt it compresses the prompt
as kvpress does, reads the text after it, and writes how likely the text was, how far the distributions are from the
uncompressed ones, and the tokens that were kept. It says a line for each case that is done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kvpress
import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache


@contextmanager
def recorded(press: Any, sums: bool) -> Iterator[list[Tensor]]:
    """The scores [kv_heads, tokens] that a press gives, layer by layer; means over the queries that could see a token
    are made sums again where they are wanted."""
    scores: list[Tensor] = []
    score = press.score

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


@torch.inference_mode()
def read(
    model: Any, prompt: list[int], text: list[int], press: Any | None = None, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """[text - 1, vocab] logprobs after each token of the text but the last, and the kept tokens.

    Kept are [layers, kv_heads, kept] positions, ascending; None without a press.
    """
    cache = DynamicCache()
    if press is None:
        model.model(input_ids=torch.tensor([prompt]), past_key_values=cache)
        kept = None
    else:
        with recorded(press, sums) as scores, press(model):
            model.model(input_ids=torch.tensor([prompt]), past_key_values=cache)
        size = cache.get_seq_length()
        kept = torch.stack([layer.topk(size, dim=-1).indices.sort(-1).values for layer in scores])
    positions = torch.arange(len(prompt), len(prompt) + len(text) - 1)[None]
    logits = model(input_ids=torch.tensor([text[:-1]]), past_key_values=cache, position_ids=positions).logits[0]
    return logits.float().log_softmax(-1), kept


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
    for case in job["cases"]:
        model.set_attn_implementation(case["attention"])
        press = getattr(kvpress, case["press"])(compression_ratio=case["ratio"], **case["knobs"])
        for i, (prompt, text) in enumerate(pairs):
            logprobs, kept = read(model, prompt, text, press, case["sums"])
            key = f"{case['name']}/{i}"
            out[f"{key}/true"] = chosen(logprobs, text)
            out[f"{key}/kl"] = (exact[i].exp() * (exact[i] - logprobs)).sum(-1).mean().item()
            out[f"{key}/agreement"] = (exact[i].argmax(-1) == logprobs.argmax(-1)).float().mean().item()
            assert kept is not None
            out[f"{key}/kept"] = kept.numpy().astype(np.int32)
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
