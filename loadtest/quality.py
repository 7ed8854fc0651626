"""What compression costs in quality: how far the distribution of the next token moves, on real text.

    python loadtest/quality.py            int8 weights against f32; each plan against none, under f32 weights

Every token is the text's own, whatever the model would have said, so that all variants are asked the same questions.
KL is in nats, from the exact model to the compressed one; agreement is how often their likeliest token is the same.
Unlike bench.py this runs the engine in its own process, without a server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor

import plans
from machine import ROOT, cores, facts
from prompts import PromptBook, corpus
from report import Report, Table
from winnow.engine.config import EngineSettings
from winnow.engine.engine import Engine
from winnow.engine.messages import Output, SamplingParams, Submit
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.engine.models.tokenizer import load_tokenizer
from winnow.engine.process import build_engine
from winnow.engine.sampler import Sampled, Sampler
from winnow.engine.sampling import SamplingBatch
from winnow.kernels.dispatch import WeightKind, backend
from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageLayout


def prompt_logits(decoder: Decoder, prompt: Sequence[int]) -> Tensor:
    """[tokens, vocab] logits after each token of a prompt, read at once."""
    config, length = decoder.config, len(prompt)
    layout = PageLayout(config.head_dim)
    lanes, width = (1, config.layers, config.kv_heads), layout.pages(length)
    pages = config.layers * config.kv_heads * width
    kv = PagedKV.allocate(layout, pages, *lanes, width)
    kv.table.copy_(torch.arange(pages, dtype=torch.int32).view(*lanes, width))
    kv.kept[:] = length
    batch = LaneBatch(
        slots=torch.zeros(1, dtype=torch.int32),
        cu_rows=torch.tensor([0, length], dtype=torch.int32),
        positions=torch.arange(length, dtype=torch.int32),
        first_vote=torch.tensor([length], dtype=torch.int32),
    )
    return decoder.forward(torch.tensor(prompt, dtype=torch.int32), batch, kv, torch.arange(length))


class Teacher(Sampler):
    """Keeps the logits of the only sequence that runs, and says what the text says."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[int] = []
        self.logits: list[Tensor] = []

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Sampled:
        token = self.text[len(self.logits)]
        self.logits.append(logits[0].clone())
        return Sampled(np.array([token]), np.zeros(1, bool), {})


def text_logits(engine: Engine, prompt: list[int], text: list[int], plan: dict[str, Any]) -> tuple[Tensor, Output]:
    """[text, vocab] logits before each token of a text that follows a prompt under a plan, and the last output."""
    engine.sampler = teacher = Teacher()
    teacher.text = text
    sampling = SamplingParams(max_tokens=len(text), ignore_eos=True, seed=1)
    engine.submit(Submit("quality", prompt, sampling, plan))
    last: Output | None = None
    while not engine.is_idle:
        for output in engine.step():
            assert isinstance(output, Output), output
            last = output
    assert last is not None
    return torch.stack(teacher.logits), last


def compare(table: Table, row: str, exact: Tensor, other: Tensor, text: Sequence[int]) -> None:
    """Adds how far `other` is from `exact`, both [tokens, vocab] logits, and its loss on the true tokens."""
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    agreement = (p.argmax(-1) == q.argmax(-1)).float()
    loss = -q[torch.arange(len(text)), torch.tensor(text)]
    table.add(row, "mean KL", "nats", float(kl.mean()))
    table.add(row, "agreement", "%", 100 * float(agreement.mean()))
    table.add(row, "loss", "nats", float(loss.mean()))


def weights(report: Report, model: str, book: PromptBook, count: int, say: Callable[[str], None]) -> None:
    """int8 weights against f32, at every position of `count` prompts of 512 tokens."""
    table = report.table("weights", f"Weights, to f32: medians of {count} prompts")
    kinds: tuple[WeightKind, ...] = ("f32", "int8")
    exact, int8 = (load_model(model, backend("cpu"), kind) for kind in kinds)
    for prompt in book.prompts("quality/weights", count, 513):
        wanted = prompt_logits(exact, prompt[:-1])
        compare(table, "f32", wanted, wanted, prompt[1:])
        compare(table, "int8", wanted, prompt_logits(int8, prompt[:-1]), prompt[1:])
        say("weights")


def kv(
    report: Report, engine: Engine, book: PromptBook, count: int, context: int, new: int, say: Callable[[str], None]
) -> None:
    """Each plan against none, on the text that follows `count` prompts."""
    title = f"Plans, to none: {new} tokens of text after {context}; medians of {count} prompts"
    table = report.table("plans", title)
    for tokens in book.prompts("quality/plans", count, context + new):
        prompt, text = tokens[:context], tokens[context:]
        exact, _ = text_logits(engine, prompt, text, {})
        for name, plan in plans.QUALITY.items():
            logits, last = text_logits(engine, prompt, text, plan)
            compare(table, name, exact, logits, text)
            held = last.compression
            if held is not None:
                table.add(name, "held", "%", 100 * held.bytes_held / held.bytes_uncompressed)
            say(name)


def main(
    name: Annotated[str, typer.Option(help="Of the result.")] = "quality",
    model: Annotated[str, typer.Option(help="As for `winnow serve`.")] = "default",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of the comparison of plans.")] = 8,
    weight_prompts: Annotated[int, typer.Option(min=1, help="Prompts of the comparison of weights.")] = 10,
    context: Annotated[int, typer.Option(min=64, help="Tokens of the prompts that plans compress.")] = 2048,
    new: Annotated[int, typer.Option(min=2, help="Tokens of text after them.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="All cores if unset.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the JSON file.")] = ROOT / "loadtest" / "results",
) -> None:
    """Measures what int8 weights and each plan cost; prints tables and writes JSON."""
    console = Console(width=120)
    tokenizer = load_tokenizer(model)
    book = PromptBook(lambda text: tokenizer.encode(text, add_special_tokens=False), corpus())
    report = Report(name, facts() | {"model": model, "text": book.digest})
    settings = EngineSettings(
        model=model,
        weights="f32",
        kv_memory_gib=1.0,
        max_seqs=2,
        max_model_len=context + new,
        threads=threads or cores(),
    )
    with torch.inference_mode(), console.status("") as status:
        engine = build_engine(settings)
        weights(report, model, book, weight_prompts, status.update)
        kv(report, engine, book, prompts, context, new, status.update)
    report.show(console)
    console.print(f"written to {report.write(results)}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
