"""The same methods in kvpress, on the same prompts, with the same weights: who keeps what, and what it costs.

kvpress (NVIDIA) pins an older transformers, so it runs in an environment of its own, which `make parity` sets up; see
`kvpress_worker.py`. Here every plan is written as kvpress has the method: with no sinks where it knows none.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from winnow.engine.compression.registry import EVICTION
from winnow.engine.errors import EvalError
from winnow.engine.evaluation.measures import Mean, Whole, distance
from winnow.engine.evaluation.result import write_text
from winnow.engine.evaluation.targets import Ask, EngineTarget
from winnow.engine.recital import FIRST, LATER

Bools = NDArray[np.bool_]
WORKER = Path(__file__).with_name("kvpress_worker.py")
BUDGETS = (0.25, 0.5, 0.75)
TURN = "\n"
"""What kvpress has before a repetition where there is no chat template"""


@dataclass(frozen=True)
class Method:
    """One method as both have it."""

    policy: str
    knobs: dict[str, Any]
    """Of ours"""
    press: str
    press_knobs: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    """What transformers must run for it"""
    sums: bool = False
    """Whether the press' means over the queries that could see a token are made sums again"""
    wrapper: str = ""
    """A press that takes the other one as its own"""
    note: str = ""
    """Why the two may differ"""


ROUNDING = "sums in another order move scores in their last bits, so tokens at the threshold may swap"
SAME = f"same rule; {ROUNDING}"
METHODS: dict[str, Method] = {
    "random": Method("random", {"sinks": 0}, "RandomPress", {"seed": 1}, note="other random numbers"),
    "streaming_llm": Method("streaming_llm", {"sinks": 4}, "StreamingLLMPress", {"n_sink": 4}, note="same rule"),
    "knorm": Method("knorm", {"sinks": 0}, "KnormPress", note=SAME),
    "keydiff": Method("keydiff", {"sinks": 0}, "KeyDiffPress", note=SAME),
    "tova": Method("tova", {"sinks": 0}, "TOVAPress", note=SAME),
    "snapkv": Method("snapkv", {"sinks": 0, "recent": 64}, "SnapKVPress", {"window_size": 64}, note=SAME),
    "h2o": Method(
        "h2o",
        {"sinks": 0, "recent": 0},
        "ObservedAttentionPress",
        attention="eager",
        sums=True,
        note="same rule: ObservedAttention, its means made sums again, with no recent tokens protected; " + ROUNDING,
    ),
    "h2o as served": Method(
        "h2o",
        {},
        "ObservedAttentionPress",
        attention="eager",
        note="another rule: h2o sums the attention that a token received and protects the newest half, as its paper "
        "says; ObservedAttention divides by the number of queries that could see the token and protects none",
    ),
    "lagkv": Method(
        "lagkv",
        {},
        "LagKVPress",
        note="same rule; ranks are equal between partitions, and of equals at the threshold the earlier stays here, "
        "whichever topk likes there. Sinks, the last full partition and what follows it have one score there: where "
        "they alone are more than the budget, as at 25 % of these prompts, topk keeps any of them, the sinks or not; "
        "here the sinks and the newest stay",
    ),
    "expected_attention": Method("expected_attention", {}, "ExpectedAttentionPress", note=SAME),
    "kvzip": Method("kvzip", {"sinks": 4}, "KVzipPress", note=SAME + "; the same words ask for the repetition"),
    "snapkv adaptive": Method(
        "snapkv",
        {"sinks": 0, "recent": 64, "head_budget": "adaptive"},
        "SnapKVPress",
        {"window_size": 64},
        wrapper="AdaKVPress",
        note=SAME,
    ),
    "snapkv pyramid": Method(
        "snapkv",
        {"sinks": 0, "recent": 64, "layer_budget": "pyramid"},
        "PyramidKVPress",
        {"window_size": 64},
        note="another rule: here the protected window comes on top of every layer's share, as in the paper, and layers "
        "keep what the budget says in all; PyramidKVPress counts the window as a part of the share, and where the last "
        "layer would keep less than the window it falls back to SnapKV, as at 25 % of these prompts",
    ),
    "snapkv merging": Method(
        "snapkv",
        {"sinks": 0, "recent": 64, "merge": {"policy": "kv_merging"}},
        "SnapKVPress",
        {"window_size": 64},
        wrapper="MergingPress",
        note=SAME,
    ),
}


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
    """Share of the kept tokens that both kept, by prompt"""
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

    def kept_after(self, ask: Ask) -> tuple[Whole, Bools]:
        """What a text was foretold, and [layers, kv_heads, prompt] the tokens that were kept; all where the plan left
        them alone."""
        kept: list[Bools] = []
        settle, arena = self.engine.side.settle, self.engine.arena

        def watched(seq: Any) -> None:
            if seq.computed == seq.prompt_tokens and not kept:
                counts, most = arena.kept[seq.slot], int(arena.kept[seq.slot].max())
                held = np.arange(most) < counts[..., None]
                lane, head, _ = np.nonzero(held)
                kept.append(np.zeros((*counts.shape, seq.prompt_tokens), bool))
                kept[0][lane, head, arena.kv.positions[seq.slot][..., :most].numpy()[held]] = True
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


def plan_of(name: str, budget: float) -> dict[str, Any]:
    return {"kv": {"evict": {"policy": METHODS[name].policy, "budget": budget, **METHODS[name].knobs}}}


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
        say: is told what has been done, len(names) * len(BUDGETS) + 1 times by each side
    Raises
        EvalError: kvpress' side failed
    """
    names = [name for name in names if METHODS[name].policy in EVICTION]
    cases = [(name, budget) for name in names for budget in BUDGETS]
    theirs = _kvpress(target, model, python, prompts, cases, threads, say)
    off = [target.kept_after(Ask(prompt, {}, text, foretells=True))[0] for prompt, text in prompts]
    say("off")
    baseline = max(float(np.abs(_true(whole) - theirs[f"off/{i}/true"]).max()) for i, whole in enumerate(off))
    rows = []
    for name, budget in cases:
        row = Row(name, budget, Side([], [], []), Side([], [], []), [], 0.0)
        apart = 0.0
        for i, (prompt, text) in enumerate(prompts):
            whole, kept = target.kept_after(Ask(prompt, plan_of(name, budget), text, foretells=True))
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
    """Of the tokens [layers, kv_heads, prompt] that each keeps, the share of ours that are theirs too."""
    if ours.shape != theirs.shape:
        raise EvalError(f"the two models have lanes {ours.shape} and {theirs.shape}")
    return float((ours & theirs).sum() / ours.sum())


def write(parity: Parity, facts: dict[str, Any], path: Path) -> Path:
    return write_text(path, json.dumps({**facts, **parity.as_dict()}, indent=1, ensure_ascii=False) + "\n")


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
                "knobs": METHODS[name].press_knobs,
                "ratio": 1 - budget,
                "attention": METHODS[name].attention,
                "sums": METHODS[name].sums,
                "wrapper": METHODS[name].wrapper,
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
