"""`winnow calibrate`: measures what some methods must know of a model, with a progress bar.

The measuring is in winnow.engine.calibration and needs torch; it is imported when the command runs.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from winnow.engine.calibration.registry import CALIBRATED
from winnow.engine.errors import EvalError, ModelError


def calibrate(
    model: Annotated[str, typer.Option(help="Directory, .gguf file or Hugging Face name.")] = "default",
    method: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable: {', '.join(CALIBRATED)}. All of them if none is named.")
    ] = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Measure what plans cost in quality instead, for `quality` in requests.")
    ] = False,
    prompts: Annotated[int, typer.Option(min=2, help="Parts of the text that the frontier is measured on.")] = 8,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text file to read; Python's language reference if unset.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of profiles; by default `winnow/calibration` in the user's cache.")
    ] = None,
    weights: Annotated[str, typer.Option(help="How weights are held: f32 or int8.")] = "int8",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if unset.")] = None,
) -> None:
    """Measure the profiles that some compression methods need of a model.

    A profile is kept by the hash of the model's weights; a server of that model finds it when it starts.
    """
    methods = list(dict.fromkeys(method or CALIBRATED))
    try:
        if unknown := [name for name in methods if name not in CALIBRATED]:
            raise ModelError(f"--method {unknown[0]} needs no calibration; one of {', '.join(CALIBRATED)}")
        if weights not in ("f32", "int8"):
            raise ModelError(f"--weights is f32 or int8, not {weights}")
        if frontier and method:
            raise ModelError("--frontier measures plans; --method measures the model: one or the other")
        if frontier:
            _measure_frontier(model, prompts, text, out, weights, threads)
        else:
            _run(model, methods, text, out, weights, threads)
    except (ModelError, EvalError) as error:
        typer.echo(f"winnow: {error}", err=True)
        raise typer.Exit(2) from error


def _run(
    model: str, methods: list[str], text: Path | None, out: Path | None, weights: str, threads: int | None
) -> None:
    from winnow.engine.calibration.run import calibrate as measure
    from winnow.engine.calibration.run import load
    from winnow.engine.calibration.store import cache_folder, save_profile
    from winnow.engine.calibration.text import read_text

    console = Console()
    words, source = read_text(text)
    with console.status(f"loading {model}"):
        path, decoder, tokenizer = load(model, "f32" if weights == "f32" else "int8", threads)
        tokens = tokenizer.encode(words, add_special_tokens=False)
    if not tokens:
        raise ModelError(f"{source} has no text")
    facts = _facts(model, source, weights)
    with _progress(console) as progress:
        for name in methods:
            task = progress.add_task(name, total=None)

            def advance(read: int, prompts: int, task: TaskID = task) -> None:
                progress.update(task, completed=read, total=prompts)

            profile = measure(decoder, name, tokens, advance)
            file = save_profile(out or cache_folder(), path, name, profile, facts)
            progress.console.print(f"{name}: {file} ({file.stat().st_size / 1024:.0f} KiB)", highlight=False)


def _measure_frontier(
    model: str, prompts: int, text: Path | None, out: Path | None, weights: str, threads: int | None
) -> None:
    from winnow.engine.calibration.frontier import save_frontier
    from winnow.engine.calibration.measure import CONTEXT, NEW, measure
    from winnow.engine.calibration.store import cache_folder
    from winnow.engine.calibration.text import read_text
    from winnow.engine.evaluation.targets import EngineTarget
    from winnow.engine.models.files import resolve_model

    console = Console()
    words, source = read_text(text)
    with console.status(f"loading {model}"):
        target = EngineTarget(model, weights, threads, kv_memory_gib=1.0)
    with _progress(console) as progress:
        task = progress.add_task("frontier", total=prompts)
        points = measure(target, words, prompts, advance=lambda read, _: progress.update(task, completed=read))
    facts = _facts(model, source, weights) | {"prompts": prompts, "context": CONTEXT, "new": NEW}
    file = save_frontier(out or cache_folder(), resolve_model(model), points, facts)
    table = Table("plan", "quality", "±", "memory")
    for point in sorted(points, key=lambda point: -point.memory):
        table.add_row(point.name, f"{point.quality:.1%}", f"{point.error:.1%}", f"{point.memory:.1%}")
    console.print(table)
    console.print(f"frontier: {file}", highlight=False)


def _facts(model: str, source: str, weights: str) -> dict[str, Any]:
    return {"model": model, "text": source, "weights": weights, "made": datetime.now(UTC).strftime("%Y-%m-%d")}


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
