"""How fine the blocks of int2 must be: KL divergence by block, on real text, from the uncompressed model.

    python loadtest/int2_blocks.py loadtest/results/smollm2-135m-int2-blocks.json

Keys share a scale and a zero by channel over G tokens, values by token over H channels: two float16 for each block,
which makes 2 + 32 / G and 2 + 32 / H bits a number. transformers runs the model with f32 weights and a cache that went
through the codec's own rounding, so that blocks can be tried that no page has.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from winnow.engine.evaluation.facts import facts
from winnow.engine.evaluation.measures import Mean
from winnow.engine.evaluation.result import write_text
from winnow.engine.evaluation.text import PromptBook, corpus, digest
from winnow.engine.models.export import export_directory
from winnow.engine.models.tokenizer import load_tokenizer
from winnow.kernels.formats import PageFormat
from winnow.kernels.layout import BLOCK
from winnow.kernels.reference.integers import quantize

KEYS = (16, 32, 64, 128)
"""Tokens of a block"""
VALUES = (16, 32, 64)
"""Channels of a block"""
RESIDUAL = 32
"""Newest tokens that stay as they are"""


def rounded(x: Tensor, group: int) -> Tensor:
    """x [..., n] as int2 stores it in blocks of `group` along the last dimension; what fills no block stays."""
    whole = x.shape[-1] // group * group
    codes, scale, zero = quantize(x[..., :whole].unflatten(-1, (-1, group)), PageFormat.INT2)
    back = codes * scale.float()[..., None] + zero.float()[..., None]
    return torch.cat([back.flatten(-2), x[..., whole:]], dim=-1)


@torch.inference_mode()
def foretold(model: Any, cache: DynamicCache, text: list[int], keys: int | None, values: int | None) -> Tensor:
    """[text - 1, vocab] logprobs after each token of the text but the last, with keys and values in such blocks."""
    cache, start = deepcopy(cache), cache.get_seq_length()
    for layer in cache.layers:
        if keys is not None:
            old = layer.keys[..., :-RESIDUAL, :].transpose(-1, -2)
            layer.keys[..., :-RESIDUAL, :] = rounded(old, keys).transpose(-1, -2)
        if values is not None:
            layer.values[..., :-RESIDUAL, :] = rounded(layer.values[..., :-RESIDUAL, :], values)
    positions = torch.arange(start, start + len(text) - 1)[None]
    out = model(input_ids=torch.tensor([text[:-1]]), past_key_values=cache, position_ids=positions)
    logprobs: Tensor = out.logits[0].log_softmax(-1)
    return logprobs


def main(
    out: Annotated[Path, typer.Argument(help="The JSON file.")],
    model: Annotated[str, typer.Option(help="As for `winnow serve`.")] = "default",
    prompts: Annotated[int, typer.Option(min=1)] = 4,
    context: Annotated[int, typer.Option(min=64, help="Tokens that are stored.")] = 1024,
    new: Annotated[int, typer.Option(min=2, help="Tokens of text after them.")] = 65,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Writes how far int2 is from the uncompressed model, by the size of its blocks."""
    torch.set_num_threads(threads)
    tokenizer, text = load_tokenizer(model), corpus()
    book = PromptBook(lambda part: tokenizer.encode(part, add_special_tokens=False), text)
    cases = [(keys, None) for keys in KEYS] + [(None, values) for values in VALUES]
    cases += [(keys, values) for keys in KEYS for values in VALUES]
    found: dict[tuple[int | None, int | None], list[float]] = {case: [] for case in cases}
    with TemporaryDirectory() as folder:
        path = export_directory(model, Path(folder) / "model")
        exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for tokens in book.prompts("eval/text", prompts, context + new):
        cache = DynamicCache()
        with torch.inference_mode():
            exact.model(input_ids=torch.tensor([tokens[:context]]), past_key_values=cache)
        truth = foretold(exact, cache, tokens[context:], None, None)
        for case, values in found.items():
            other = foretold(exact, cache, tokens[context:], *case)
            values.append(float((truth.exp() * (truth - other)).sum(-1).mean()))
    table = Table("keys: tokens", "values: channels", "bits a number", "KL, nats", title="int2 by block")
    rows = []
    for (keys, values), kl in found.items():
        bits = float(np.mean([32.0 if group is None else 2 + 32 / group for group in (keys, values)]))
        mean = Mean.of(kl)
        rows.append({"keys": keys, "values": values, "bits": bits, "kl": mean.value, "error": mean.error})
        table.add_row(
            str(keys or "f32"), str(values or "f32"), f"{bits:.2f}", f"{mean.value:.4f} ± {mean.error or 0:.4f}"
        )
    Console().print(table)
    about = {"model": model, "text": digest(text), "prompts": prompts, "context": context, "new": new, "served": BLOCK}
    write_text(out, json.dumps({**facts(), **about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
