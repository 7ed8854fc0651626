"""What a draft model gains: accepted guesses, and CPU time for each token beside that of the same requests without.

python loadtest/drafts.py [--threads 1] [--name smollm2-135m-drafts]

No smaller model of the default model's vocabulary comes with a package, so its drafts are made of itself: its first
layers with its own norm and head, which nobody has trained to end there, and, for exact weights, itself in int8. A
model that was trained to be small gets more right than the former. Time is that of the process, which others on the
machine disturb least, from where both models have read the prompts on.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file

from machine import ROOT, facts
from winnow.engine.build import build_engine
from winnow.engine.config import EngineSettings
from winnow.engine.engine import Engine
from winnow.engine.evaluation.text import PromptBook, corpus, digest
from winnow.engine.messages import Output, SamplingParams, Submit
from winnow.engine.models.export import export_directory
from winnow.engine.models.tokenizer import load_tokenizer

PROMPT, NEW, PROMPTS = 96, 32, 4
GUESSES = (2, 4)


@dataclass(frozen=True)
class Case:
    weights: str
    draft: str
    """"" is none, a number that of the first layers, else how the whole model's weights are held"""

    @property
    def name(self) -> str:
        return f"first {self.draft} layers" if self.draft.isdigit() else f"the model in {self.draft}"


CASES = (*(Case("int8", layers) for layers in ("12", "24")), Case("int8", "int8"), Case("f32", "int8"))


def first_layers(folder: Path, layers: int) -> Path:
    """A checkpoint of the default model's first layers, with its embedding, norm, head and tokenizer."""
    whole = export_directory("default", folder / "whole")
    path = folder / f"first-{layers}"
    path.mkdir()
    with safe_open(whole / "model.safetensors", framework="pt") as file:
        names = file.keys()  # of a file, which is no dict
        wanted = [name for name in names if ".layers." not in name or int(name.split(".")[2]) < layers]
        save_file({name: file.get_tensor(name) for name in wanted}, path / "model.safetensors", {"format": "pt"})
    config = json.loads((whole / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers, "layer_types": None}))
    load_tokenizer("default").hf.save_pretrained(path)
    return path


def engine_of(case: Case, folder: Path, threads: int) -> Engine:
    settings: dict[str, Any] = {"weights": case.weights, "threads": threads, "kv_memory_gib": 0.5, "max_seqs": 16}
    settings |= {"draft_memory_gib": 0.5, "prefix_caching": False}
    if case.draft.isdigit():
        settings["draft_model"] = str(first_layers(folder, int(case.draft)))
    else:
        settings |= {"draft_model": "default", "draft_weights": case.draft}
    return build_engine(EngineSettings(**settings))


def ask(engine: Engine, prompts: list[list[int]], temperature: float, guesses: int) -> tuple[Any, float, float]:
    """(texts, CPU milliseconds for a token, share of the guesses that were right)"""
    speculative = {"method": "draft", "tokens": guesses} if guesses else {}
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=temperature, max_tokens=NEW, seed=i)
        engine.submit(Submit(str(i), prompt, sampling, speculative=speculative))
    texts = {str(i): list[int]() for i in range(len(prompts))}
    before, began, said = engine.stats, 0.0, 0
    while not engine.is_idle:
        running = engine.scheduler.running
        all_decode = len(running) == len(prompts) and all(seq.is_decoding for seq in running)
        for output in engine.step():
            assert isinstance(output, Output)
            texts[output.request_id] += output.token_ids
        if all_decode and not began:  # by now the draft model has read the prompts too
            began, said = time.process_time(), sum(map(len, texts.values()))
    seconds, after = time.process_time() - began, engine.stats
    guessed = after.draft_tokens_total - before.draft_tokens_total
    right = (after.accepted_tokens_total - before.accepted_tokens_total) / max(1, guessed)
    return texts, 1000 * seconds / (sum(map(len, texts.values())) - said), right


def main(
    name: Annotated[str, typer.Option(help="Of the result.")] = "smollm2-135m-drafts",
    threads: Annotated[int, typer.Option(min=1, help="Of the engine.")] = 1,
    results: Annotated[Path, typer.Option(help="Folder of the JSON file.")] = ROOT / "loadtest" / "results",
) -> None:
    """Measures drafts of the default model; prints a table and writes JSON."""
    tokenizer, text, console = load_tokenizer("default"), corpus(), Console()
    book = PromptBook(lambda part: tokenizer.encode(part, add_special_tokens=False), text)
    prompts = book.prompts("drafts", PROMPTS, PROMPT)
    rows: list[dict[str, Any]] = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            engine = engine_of(case, Path(folder), threads)
            ask(engine, prompts[:1], 0.0, GUESSES[0])  # what is allocated once is allocated
            for together, temperature in ((1, 0.0), (PROMPTS, 0.0), (PROMPTS, 1.0)):
                asked = prompts[:together]
                plain, alone, _ = ask(engine, asked, temperature, 0)
                for guesses in GUESSES:
                    said, guessing, right = ask(engine, asked, temperature, guesses)
                    assert said == plain
                    rows.append(
                        {
                            "weights": case.weights,
                            "draft": case.name,
                            "requests": together,
                            "temperature": temperature,
                            "tokens": guesses,
                            "accepted": round(right, 3),
                            "ms_per_token": round(guessing, 2),
                            "ms_per_token_without": round(alone, 2),
                            "speed": round(alone / guessing, 2),
                        }
                    )
                    console.print(rows[-1])
    known = facts() | {"threads": threads, "text": digest(text), "prompt_tokens": PROMPT, "new_tokens": NEW}
    path = results / f"{name}.json"
    path.write_text(json.dumps({"facts": known, "rows": rows}, indent=1) + "\n")
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
