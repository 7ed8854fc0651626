"""`winnow eval`: what the command does with its options. `server/cli.py` has their help."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from winnow.engine.errors import EvalError
from winnow.engine.evaluation.facts import facts
from winnow.engine.evaluation.harness import PROTOCOLS, Harness, Protocol, Scope
from winnow.engine.evaluation.page import page
from winnow.engine.evaluation.pictures import SEED, Mosaics
from winnow.engine.evaluation.plans import BLIND, Plans, check, default_plans, default_vision_plans, read_plans
from winnow.engine.evaluation.result import Result, write_text
from winnow.engine.evaluation.server import TOP, ServerTarget
from winnow.engine.evaluation.tables import show
from winnow.engine.evaluation.targets import EngineTarget, Target
from winnow.engine.evaluation.tasks import TASKS
from winnow.engine.evaluation.text import SOURCE, PromptBook, corpus, digest
from winnow.engine.evaluation.vision_page import show_vision, vision_page
from winnow.engine.models.files import DEFAULT, MOSAIC

KEY = "WINNOW_API_KEY"
TIMED = 16
"""Prefills of each plan that are timed"""
WIDTH = 150
"""Columns of what is no terminal"""


@dataclass(frozen=True)
class Options:
    plans: str
    budgets: str
    tasks: str
    lengths: str
    samples: int
    text_prompts: int
    text_context: int
    text_new: int
    protocols: str
    model: str
    device: str
    weights: str | None
    draft_model: str | None
    against_f32: bool
    resume: bool
    url: str | None
    vision: bool
    keeps: str
    pictures: int
    kvpress: Path | None
    threads: int | None
    kv_memory_gib: float
    name: str
    out: Path


def run(options: Options, console: Console | None = None) -> None:
    """Measures, shows tables, and writes NAME.json and, of plans, NAME.html.

    Raises
        EvalError, ModelError
    """
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    if options.kvpress is not None:
        written = run_parity(options, options.kvpress, console)
    else:
        written = run_vision(options, console) if options.vision else run_plans(options, console)
    console.print("written: " + ", ".join(map(str, written)), highlight=False, soft_wrap=True)


def run_plans(options: Options, console: Console) -> list[Path]:
    scope = Scope(
        tasks=_names("tasks", options.tasks, tuple(TASKS)),
        lengths=tuple(_numbers("lengths", options.lengths, int)),
        samples=options.samples,
        text_prompts=options.text_prompts,
        text_context=options.text_context,
        text_new=options.text_new,
        protocols=_protocols(options.protocols),
    )
    if options.against_f32 and (options.url is not None or options.weights == "f32"):
        raise EvalError("--against-f32 needs an engine in this process, with weights that are not f32")
    if options.draft_model is not None and options.url is not None:
        raise EvalError("--draft-model needs an engine in this process; a server has its own")
    plans = _checked(read_plans(options.plans, default_plans(_numbers("budgets", options.budgets, float))))
    text = corpus()
    with console.status("loading the model") if console.is_terminal else nullcontext():
        target = _target(options)
    about: dict[str, Any] = {"model": options.url or options.model, "weights": target.weights, "text": digest(text)}
    if options.draft_model is not None:
        about["draft_model"] = options.draft_model
    if scope.text_prompts:
        about["text_new"] = scope.text_new
    result = _begun(options, about, plans)
    result.facts["text_of"] = SOURCE
    if options.url is not None:
        result.facts["kl"] = f"at least as much: a server tells the {TOP} likeliest tokens"

    def save() -> None:
        result.write(options.out)

    with _progress(console) as progress:
        bar = progress.add_task("", total=scope.units)
        harness = Harness(target, text, plans, result)
        if options.against_f32:
            exact = EngineTarget(options.model, "f32", options.threads, options.kv_memory_gib, options.device)
            harness.compare_weights(exact, scope, lambda what: progress.update(bar, description=what))
        harness.run(scope, _teller(progress, bar), save)
        progress.update(bar, description="done", completed=scope.units)
        result.facts["seconds"] = result.facts.get("seconds", 0) + round(progress.tasks[0].elapsed or 0.0)
    show(result, console)
    return [result.write(options.out), write_text(options.out / f"{options.name}.html", page(result))]


def run_vision(options: Options, console: Console) -> list[Path]:
    """Pictures and questions are those that the model that ships was made for."""
    if options.draft_model is not None or options.against_f32:
        raise EvalError("--draft-model and --against-f32 are not for --vision")
    keeps = _numbers("keeps", options.keeps, float)
    plans = _checked({BLIND: {}} | read_plans(options.plans, default_vision_plans(keeps)))
    model = MOSAIC if options.model == DEFAULT else options.model
    with console.status("loading the model") if console.is_terminal else nullcontext():
        target = _target(replace(options, model=model))
    about = {"model": options.url or model, "weights": target.weights, "pictures": SEED}
    result = _begun(options, about, plans)
    scope = Scope(scenes=options.pictures)
    with _progress(console) as progress:
        bar = progress.add_task("", total=scope.units + TIMED)
        harness = Harness(target, "", plans, result, Mosaics())
        say = _teller(progress, bar)

        def save() -> None:
            result.write(options.out)

        harness.run(scope, say, save)
        harness.time_prefills(TIMED, say, save)
        progress.update(bar, description="done", completed=progress.tasks[0].total)
        result.facts["seconds"] = result.facts.get("seconds", 0) + round(progress.tasks[0].elapsed or 0.0)
    show_vision(result, console)
    return [result.write(options.out), write_text(options.out / f"{options.name}.html", vision_page(result))]


def _checked(plans: Plans) -> Plans:
    for name, why in check(plans).items():
        raise EvalError(f"{name}: {why}")
    return plans


def _begun(options: Options, about: dict[str, Any], plans: Plans) -> Result:
    """A new result, or with --resume the one that is there."""
    result = Result(options.name, facts() | about, plans)
    path = options.out / f"{options.name}.json"
    return _resumed(path, result, about) if options.resume and path.exists() else result


def _resumed(path: Path, new: Result, about: dict[str, Any]) -> Result:
    """The result at `path`, to go on with if it was measured alike."""
    try:
        result = Result.from_dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, LookupError) as error:
        raise EvalError(f"--resume: {path} cannot be read: {error}") from error
    for name, value in about.items():
        if (known := result.facts.setdefault(name, value)) != value:
            raise EvalError(f"--resume: {path} was measured with another {name}: {known}, not {value}")
    commits = dict.fromkeys([*result.facts["commit"].split(", "), new.facts["commit"]])
    result.facts["commit"] = ", ".join(commits)
    result.plans |= new.plans
    for name in new.plans:
        result.refused.pop(name, None)
    return result


def run_parity(options: Options, python: Path, console: Console) -> list[Path]:
    """Both sides hold f32 weights."""
    from winnow.engine.evaluation.parity import KeptTarget, compare, write
    from winnow.engine.evaluation.parity_methods import METHODS, cases_of
    from winnow.engine.models.export import export_directory

    if options.url is not None or options.text_prompts == 0:
        raise EvalError("--kvpress needs the engine in this process, not --url, and --text-prompts")
    if not python.is_file():
        raise EvalError(f"--kvpress: {python} is no Python; `make parity` sets one up")
    text = corpus()
    threads = options.threads or len(os.sched_getaffinity(0))
    about = facts() | {"model": options.model, "weights": "f32", "text": digest(text), "text_of": SOURCE}
    about |= {"prompts": options.text_prompts, "context": options.text_context, "new": options.text_new}
    with TemporaryDirectory(prefix="winnow-weights-") as folder, _progress(console) as progress:
        bar = progress.add_task("the model's weights", total=None)
        model = export_directory(options.model, Path(folder) / "model")
        target = KeptTarget(options.model, "f32", threads, options.kv_memory_gib)
        progress.update(bar, total=2 * (1 + len(cases_of(list(METHODS), target.head_dim))))
        book = PromptBook(target.encode, text)
        size = options.text_context + options.text_new
        prompts = [
            (tokens[: options.text_context], tokens[options.text_context :])
            for tokens in book.prompts("eval/parity", options.text_prompts, size)
        ]
        parity = compare(
            target,
            model,
            python,
            prompts,
            list(METHODS),
            threads,
            lambda what: progress.update(bar, description=what, advance=1),
        )
        progress.update(bar, description="done", completed=progress.tasks[0].total)
    parity.show(console)
    return [write(parity, about, options.out / f"{options.name}.json")]


def _target(options: Options) -> Target:
    if options.url is not None:
        return ServerTarget(options.url, os.environ.get(KEY), sees=options.vision)
    return EngineTarget(
        options.model, options.weights, options.threads, options.kv_memory_gib, options.device, options.draft_model
    )


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)


def _teller(progress: Progress, bar: TaskID) -> Callable[[str], None]:
    """Told what is next, it counts what was before."""
    advances = chain([0], repeat(1))
    return lambda what: progress.update(bar, description=what, advance=next(advances))


def _names(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Some of the known names, "all" or "none"."""
    if text in ("all", "none"):
        return known if text == "all" else ()
    names = tuple(filter(None, (part.strip() for part in text.split(","))))
    for name in names:
        if name not in known:
            raise EvalError(f"--{option}: {name!r} is none of {', '.join(known)}")
    return names


def _protocols(text: str) -> tuple[Protocol, ...]:
    names = _names("protocols", text, PROTOCOLS)
    return tuple(protocol for protocol in PROTOCOLS if protocol in names)


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise EvalError(f"--{option}: {text!r} is no list of numbers") from None
    if any(number <= 0 for number in numbers):
        raise EvalError(f"--{option}: {text!r}: numbers must be positive")
    return numbers
