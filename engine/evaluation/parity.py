"""The same methods in kvpress, on the same prompts, with the same weights: who keeps what, and what it costs.

kvpress (NVIDIA) pins an older transformers, so it runs in an environment of its own, which `make parity` sets up; see
`kvpress_worker.py`. What is compared says `parity_methods.py`.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from winnow.engine.errors import EvalError
from winnow.engine.evaluation.measures import Mean, Whole, distance
from winnow.engine.evaluation.parity_methods import METHODS, cases_of, plan_of
from winnow.engine.evaluation.result import write_text
from winnow.engine.evaluation.targets import Ask, EngineTarget
from winnow.engine.pages import PageArena
from winnow.engine.recital import FIRST, LATER
from winnow.kernels.formats import PageFormat

Bools = NDArray[np.bool_]
WORKER = Path(__file__).with_name("kvpress_worker.py")
TURN = "\n"
"""What kvpress has before a repetition where there is no chat template"""


@dataclass(frozen=True)
class Side:
    """One implementation's results for one method and budget, by prompt."""

    kl: list[float]
    agreement: list[float]
    loss: list[float]


@dataclass(frozen=True)
class Row:
    method: str
    budget: float
    ours: Side
    theirs: Side
    common: list[float]
    """Share of the kept tokens, or channels, that both kept, by prompt"""
    apart: float
    """Largest difference of a logprob of the text, over all prompts, in nats"""

    @property
    def kl_difference(self) -> Mean:
        return Mean.of([a - b for a, b in zip(self.ours.kl, self.theirs.kl, strict=True)])

    @property
    def differs(self) -> bool:
        """Whether the KL of both is more apart than the noise between prompts explains."""
        mean = self.kl_difference
        return abs(mean.value) > max(2 * (mean.error or 0.0), 1e-3)


@dataclass
class Parity:
    rows: list[Row]
    baseline: float
    """Largest difference of a logprob of the text, in nats, where neither compresses"""
    versions: list[str]
    """Of kvpress, transformers and torch on the other side"""

    def as_dict(self) -> dict[str, Any]:
        def side(of: Side) -> dict[str, Any]:
            return {name: Mean.of(getattr(of, name)).value for name in ("kl", "agreement", "loss")}

        rows = [
            {
                "method": row.method,
                "budget": row.budget,
                "winnow": side(row.ours),
                "kvpress": side(row.theirs),
                "kl_difference": vars(row.kl_difference),
                "kept_in_common": Mean.of(row.common).value,
                "largest_logprob_difference": row.apart,
                "differs": row.differs,
                "note": METHODS[row.method].note,
            }
            for row in self.rows
        ]
        return {"versions": self.versions, "largest_uncompressed_difference": self.baseline, "rows": rows}

    def show(self, console: Console) -> None:
        title = (
            f"kvpress {self.versions[0]}, transformers {self.versions[1]}; uncompressed logprobs of the text differ "
        )
        table = Table(title=title + f"by at most {self.baseline:.1g}", title_justify="left")
        table.add_column("method")
        for column in ("kept", "KL", "KL kvpress", "difference", "agree", "kvpress", "kept in common", "logprobs"):
            table.add_column(column, justify="right")
        for row in self.rows:
            kl, kl_theirs, agreement, agreement_theirs = (
                Mean.of(getattr(side, name)).value for name in ("kl", "agreement") for side in (row.ours, row.theirs)
            )
            difference = row.kl_difference
            table.add_row(
                row.method,
                f"{row.budget:.0%}",
                f"{kl:.4f}",
                f"{kl_theirs:.4f}",
                f"{difference.value:+.4f} ± {difference.error or 0:.4f}",
                f"{agreement:.1%}",
                f"{agreement_theirs:.1%}",
                f"{Mean.of(row.common).value:.2%}",
                f"{row.apart:.1g}",
                style="yellow" if row.differs else None,
            )
        console.print(table)
        for name in dict.fromkeys(row.method for row in self.rows):
            mark = "[yellow]apart[/] " if any(row.differs for row in self.rows if row.method == name) else ""
            console.print(f"{mark}{name}: {METHODS[name].note}", highlight=False)


class KeptTarget(EngineTarget):
    """An engine that also tells what its lanes kept when the prompt had been read."""

    @property
    def head_dim(self) -> int:
        return self.engine.arena.layout.head_dim

    def kept_after(self, ask: Ask) -> tuple[Whole, Bools]:
        """What a text was foretold, and what was kept: [layers, kv_heads, prompt] tokens, all where the plan left them
        alone, or [layers, kv_heads, head_dim] channels of the keys, if the plan drops some."""
        kept: list[Bools] = []
        settle, arena = self.engine.side.settle, self.engine.arena

        def watched(seq: Any) -> None:
            if seq.computed == seq.prompt_tokens and not kept:
                kept.append(_channels(arena, seq) if seq.plan.drops_channels else _tokens(arena, seq))
            settle(seq)

        self.engine.side.settle = watched  # type: ignore[method-assign]
        try:
            (answer,) = self.ask([ask])
        finally:
            self.engine.side.settle = settle  # type: ignore[method-assign]
        if isinstance(answer, Exception):
            raise EvalError(f"a plan is refused: {answer}")
        assert isinstance(answer.foretold, Whole)
        return answer.foretold, kept[0] if kept else np.ones((*self.engine.arena.kept.shape[1:], len(ask.prompt)), bool)


def compare(
    target: KeptTarget,
    model: Path,
    python: Path,
    prompts: Sequence[tuple[list[int], list[int]]],
    names: Sequence[str],
    threads: int,
    say: Callable[[str], None],
) -> Parity:
    """Runs both sides one after the other.

    Args
        model: the directory of the same weights
        python: interpreter of an environment that has kvpress
        prompts: prompts, each with the text after it
        say: is told what has been done, once for each of `cases_of` and once more, by each side
    Raises
        EvalError: kvpress' side failed
    """
    cases = cases_of(names, target.head_dim)
    theirs = _kvpress(target, model, python, prompts, cases, threads, say)
    off = [target.kept_after(Ask(prompt, {}, text, foretells=True))[0] for prompt, text in prompts]
    say("off")
    baseline = max(float(np.abs(_true(whole) - theirs[f"off/{i}/true"]).max()) for i, whole in enumerate(off))
    rows = []
    for name, budget in cases:
        row = Row(name, budget, Side([], [], []), Side([], [], []), [], 0.0)
        apart = 0.0
        for i, (prompt, text) in enumerate(prompts):
            whole, kept = target.kept_after(Ask(prompt, plan_of(name, budget, len(prompt)), text, foretells=True))
            far = distance(off[i], whole)
            key = f"{case_name(name, budget)}/{i}"
            true = theirs[f"{key}/true"]
            for side, values in (
                (row.ours, (far.kl, far.agreement, far.loss)),
                (row.theirs, (float(theirs[f"{key}/kl"]), float(theirs[f"{key}/agreement"]), float(-true.mean()))),
            ):
                for measure, value in zip((side.kl, side.agreement, side.loss), values, strict=True):
                    measure.append(value)
            row.common.append(common_share(kept, theirs[f"{key}/kept"]))
            apart = max(apart, float(np.abs(_true(whole) - true).max()))
        rows.append(Row(name, budget, row.ours, row.theirs, row.common, apart))
        say(case_name(name, budget))
    return Parity(rows, baseline, [str(version) for version in theirs["versions"]])


def case_name(name: str, budget: float) -> str:
    return f"{name}:{budget}"


def common_share(ours: Bools, theirs: Bools) -> float:
    """Of the tokens [layers, kv_heads, prompt], or channels, that each keeps, the share of ours that are theirs too."""
    if ours.shape != theirs.shape:
        raise EvalError(f"the two models have lanes {ours.shape} and {theirs.shape}")
    return float((ours & theirs).sum() / ours.sum())


def write(parity: Parity, facts: dict[str, Any], path: Path) -> Path:
    return write_text(path, json.dumps({**facts, **parity.as_dict()}, indent=1, ensure_ascii=False) + "\n")


def _tokens(arena: PageArena, seq: Any) -> Bools:
    """[layers, kv_heads, prompt]: those that its lanes hold."""
    counts = arena.kept[seq.slot]
    held = np.arange(counts.max()) < counts[..., None]
    layer, head, _ = np.nonzero(held)
    kept = np.zeros((*counts.shape, seq.prompt_tokens), bool)
    kept[layer, head, arena.kv.positions[seq.slot][..., : held.shape[-1]].numpy()[held]] = True
    return kept


def _channels(arena: PageArena, seq: Any) -> Bools:
    """[layers, kv_heads, head_dim]: those that its keys keep."""
    return arena.kv.channels[seq.slot].bool().numpy()


def _true(whole: Whole) -> NDArray[np.float32]:
    return whole.logprobs[np.arange(len(whole.text)), whole.text]


def _kvpress(
    target: KeptTarget,
    model: Path,
    python: Path,
    prompts: Sequence[tuple[list[int], list[int]]],
    cases: Sequence[tuple[str, float]],
    threads: int,
    say: Callable[[str], None],
) -> dict[str, NDArray[Any]]:
    layout = target.engine.arena.layout
    job = {
        "model": str(model),
        "threads": threads,
        "prompts": [prompt for prompt, _ in prompts],
        "texts": [text for _, text in prompts],
        "lead_ins": dict(zip((FIRST, LATER, TURN), target.lead_ins, strict=True)),
        "cases": [
            {
                "name": case_name(name, budget),
                "press": METHODS[name].press,
                "knobs": {**METHODS[name].press_knobs, METHODS[name].ratio: 1 - budget},
                "attention": METHODS[name].attention,
                "sums": METHODS[name].sums,
                "wrapper": METHODS[name].wrapper,
                "page": layout.capacity(PageFormat.parse(METHODS[name].policy)) if METHODS[name].spares else 0,
            }
            for name, budget in cases
        ],
    }
    with tempfile.TemporaryDirectory(prefix="winnow-parity-") as folder:
        job_path, out_path, log_path = (Path(folder) / name for name in ("job.json", "out.npz", "log"))
        job_path.write_text(json.dumps(job), "utf-8")
        with log_path.open("w") as log:
            command = [str(python), "-I", str(WORKER), str(job_path), str(out_path)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    say(f"kvpress {line.strip()}")
        if process.returncode:
            raise EvalError(f"kvpress' side failed:\n{log_path.read_text('utf-8')[-2000:]}")
        with np.load(out_path) as arrays:
            return dict(arrays)
