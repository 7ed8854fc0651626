"""`make methods`: the table of methods, from the registry and from what `winnow eval` measured.

python loadtest/methods.py loadtest/results/smollm2-135m-eval.json engine/compression/METHODS.md \
    --images loadtest/results/mosaic-vision.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.registry import (
    EVICTION,
    MERGE,
    MIX,
    PROMPT,
    READ,
    eviction_policy,
    merge_method,
    mix_method,
    prompt_policy,
    read_policy,
)
from winnow.engine.compression.vision.plan import Vision, vision_model
from winnow.engine.compression.vision.policy import stages_of
from winnow.engine.compression.vision.registry import VISION, vision_policy
from winnow.engine.errors import RequestError
from winnow.engine.evaluation.harness import PROTOCOLS, TEXT
from winnow.engine.evaluation.plans import BLIND, FORMATS, MERGED, OFF
from winnow.engine.evaluation.result import Result, write_text
from winnow.engine.evaluation.vision import keeps, losses, seen
from winnow.engine.speculation.speculation import check_combination, parse_speculation
from winnow.kernels.formats import PageFormat

BUDGETS = (0.5, 0.25)
HEAD = ("method", "what it does", "sees", "keeps half", "keeps a quarter", "answers, keeping half")
EVICTS = {"policy": "streaming_llm", "budget": 0.5}
OF_EVICTION: dict[str, dict[str, Any]] = {
    "adaptive heads": {"evict": {"head_budget": "adaptive"}},
    "pyramid layers": {"evict": {"layer_budget": "pyramid"}},
    "decode": {"evict": {"during": "decode"}},
    "compact positions": {"evict": {"budget": 64, "positions": "compact"}},
    "merging": {"evict": {"merge": {"policy": "compensation"}}},
    "mikv": {"mix": {"policy": "mikv"}},
}
OF_LANES: dict[str, dict[str, Any]] = {
    "int4": {"format": "int4"},
    "gear": {"format": "gear"},
    "quest": {"read": {"policy": "quest", "tokens": 64}},
    "documents": {"scope": "document"},
}
"""What is tried with each method, as a part of `kv`; a format and a way to read stand for those like them"""
OF_IMAGES: dict[str, dict[str, Any]] = {
    "compact positions": {"evict": EVICTS | {"budget": 64, "positions": "compact"}},
    "prompt_distill": {"evict": {"policy": "prompt_distill", "budget": 0.5}},
    "mini_cache": {"mix": {"policy": "mini_cache"}},
    "tidal_decode": {"read": {"policy": "tidal_decode", "tokens": 64}},
}
"""What is tried with each vision policy"""
WITHOUT = "goes not with"
ANSWERS_AT = 512
"""Tokens of the tasks whose answers are counted"""


def methods(result: Result, images: Result | None = None) -> str:
    """Markdown. `images`: what was measured of vision policies."""
    facts = result.facts
    texts = max((result.contexts(cell) for cell in result.values if cell[:2] == (OFF, TEXT)), default=0)
    asked = [cell for cell in result.values if (cell.plan, cell.length) == (OFF, ANSWERS_AT) and cell.protocol]
    tasks = sum(map(result.contexts, asked)) // len(PROTOCOLS)
    lines = [
        "# Methods",
        "",
        "Made by `make methods` from the registry and from a result of `winnow eval`: do not edit.",
        "",
        f"Measured on {facts.get('model')} with {facts.get('weights')} weights, on {texts} parts of real text. A cell "
        "has the share of tokens before which the plan and the uncompressed model find the same one likeliest, the KL "
        "divergence between the two, and the bytes held, of those under no plan. Answers are those found in "
        f"{tasks} generated tasks of {ANSWERS_AT} tokens, where the context was compressed before the question was "
        "read / with the question in it, of what the uncompressed model finds in the same contexts. Everything goes "
        "with everything, in one request as in one batch, but for what the last columns name: that gets a 400. "
        "(`int4` stands for formats of codes, `gear` for those that are opened before they are read, `quest` for "
        "`kv.read`, documents for `kv.scope`, pressure for `on_pressure`, guesses for `speculative`.)",
        *_table("Eviction: `kv.evict`, frees pages", (*HEAD, WITHOUT), _evictions(result)),
        *_table("Merging what was evicted: `kv.evict.merge`", (*HEAD[:3], f"with {MERGED}"), _merges(result)),
        *_table(
            "Reading a part: `kv.read`, frees nothing",
            (*HEAD[:2], "a quarter of the tokens", "reads", "answers", WITHOUT),
            _reads(result),
        ),
        *_table("Page formats: `kv.format`", ("format", *HEAD[1:2], "measured", "answers", WITHOUT), _formats(result)),
        *_table("Two formats in a lane: `kv.mix`", (*HEAD[:2], "measured", "answers", WITHOUT), _mixes(result)),
        *_table("Prompts: `prompt`, shortens what is marked as context", (*HEAD[:2], *HEAD[3:]), _prompts(result)),
        *_images(images),
    ]
    return "\n".join(lines) + "\n"


def _evictions(result: Result) -> Iterator[tuple[str, ...]]:
    for name in EVICTION:
        policy = eviction_policy(name)
        cells = (_measured(result, f"{name}:{budget}") for budget in BUDGETS)
        without = _goes_not_with({"evict": {"policy": name, "budget": 0.5}}, OF_EVICTION | OF_LANES)
        answers = _answers(result, f"{name}:{BUDGETS[0]}")
        yield f"`{name}`", _first_line(policy), _signals(policy), *cells, answers, without


def _merges(result: Result) -> Iterator[tuple[str, ...]]:
    for name in MERGE:
        method = merge_method(name)
        yield f"`{name}`", _first_line(method), _signals(method), _measured(result, f"{MERGED}:merge={name}")


def _reads(result: Result) -> Iterator[tuple[str, ...]]:
    for name in READ:
        plan = f"{name}:tokens={BUDGETS[-1]}"
        read = result.mean(plan, "read", "text")
        share = "not measured" if read is None else f"{read.value:.0%} of the bytes"
        formats = {part: OF_LANES[part] for part in ("int4", "gear")}
        without = _goes_not_with({"read": {"policy": name, "tokens": 64}}, {"eviction": {"evict": EVICTS}} | formats)
        cells = _measured(result, plan), share, _answers(result, plan)
        yield f"`{name}`", _first_line(read_policy(name)), *cells, without


def _formats(result: Result) -> Iterator[tuple[str, ...]]:
    for name in FORMATS:
        compact = {"compact positions": {"evict": EVICTS | {"budget": 64, "positions": "compact"}}}
        others = {part: OF_LANES[part] for part in ("quest", "documents")}
        without = _goes_not_with({"format": name}, {"eviction": {"evict": EVICTS}} | compact | others)
        yield f"`{name}`", PageFormat.parse(name).what, _measured(result, name), _answers(result, name), without


def _mixes(result: Result) -> Iterator[tuple[str, ...]]:
    for name in MIX:
        needs_eviction = bool(_refused({"mix": {"policy": name}}, {"alone": {}}))
        plan = f"{MERGED}+{name}" if needs_eviction else name
        base = {"mix": {"policy": name}} | ({"evict": EVICTS} if needs_eviction else {})
        others = {part: OF_LANES[part] for part in ("int4", "quest", "documents")}
        without = _goes_not_with(base, ({} if needs_eviction else {"eviction": {"evict": EVICTS}}) | others)
        cells = f"{plan}: {_measured(result, plan)}", _answers(result, plan)
        yield f"`{name}`", _first_line(mix_method(name)), *cells, without


def _prompts(result: Result) -> Iterator[tuple[str, ...]]:
    for name in PROMPT:
        cells = (_measured(result, f"{name}:{budget}") for budget in BUDGETS)
        yield f"`{name}`", _first_line(prompt_policy(name)), *cells, _answers(result, f"{name}:{BUDGETS[0]}")


def _images(result: Result | None) -> list[str]:
    kept = [] if result is None else keeps(result)
    measured = [f"keeps {100 * keep:g} %" if isinstance(keep, float) else f"keeps {keep}" for keep in kept]
    head = (*HEAD[:2], "where", "sees", "of", "knobs", "source", *measured, *["loses to"] * bool(kept), WITHOUT)
    lines = _table("Images: `vision`, tokens that the language model does not read", head, _visions(result, kept))
    notes = ["Documents, and prompts that are shortened, have no images."]
    if result is not None:
        answers = [
            f"{'shown a grey picture' if plan == BLIND else 'unpruned'} {of.score.value:.0%}"
            for plan in (OFF, BLIND)
            if (of := seen(result, plan)) is not None
        ]
        notes.append(
            f"Measured on {result.facts.get('model')}: right answers to questions about pictures that are new to it "
            f"({', '.join(answers)}). A policy that loses to a control on the whole is not worth asking for there."
        )
    lines[3:3] = [" ".join(notes), ""]
    return lines


def _visions(result: Result | None, kept: list[float | int]) -> Iterator[tuple[str, ...]]:
    for name in VISION:
        policy, model = vision_policy(name), vision_model(name)
        sees = ", ".join(sorted(policy.signals)) or "places"
        own = [knob for knob in model.model_fields if knob not in Vision.model_fields]
        defaults = {knob: model.model_fields[knob].default for knob in own}
        knobs = ", ".join(knob if value is None else f"{knob} {value}" for knob, value in defaults.items())
        kinds = ", ".join(f"{kind}s" for kind in sorted(policy.kinds))
        without = ", ".join(_refused({}, OF_IMAGES, vision={"policy": name, "keep": 0.5}))
        cells = [", ".join(stages_of(policy)), sees + ", text" * policy.reads_text, kinds, knobs, _source(policy)]
        if result is not None:
            cells += [_right_answers(result, f"vision:{name}:{keep}") for keep in kept]
            cells += [", ".join(losses(result, name))] * bool(kept)
        yield f"`{name}`", _first_line(policy), *cells, without


def _right_answers(result: Result, plan: str) -> str:
    of = seen(result, plan)
    return result.refused.get(plan, "not measured") if of is None else f"{of.score.value:.0%}"


def _measured(result: Result, plan: str) -> str:
    agreement, kl, held = (result.mean(plan, measure, "text") for measure in ("agreement", "kl", "held"))
    if agreement is None or kl is None or held is None:
        return result.refused.get(plan, "not measured")
    return f"{agreement.value:.0%}, {kl.value:.2g} nats, {held.value:.0%} held"


def _answers(result: Result, plan: str) -> str:
    """Shares by protocol, and the uncompressed model's on the contexts that were asked under the plan."""
    shares, exact = [], None
    for protocol in PROTOCOLS:
        found, more = (
            result.mean(plan, "score", length=ANSWERS_AT, protocol=protocol),
            result.beyond(plan, "score", ANSWERS_AT, protocol),
        )
        shares.append("-" if found is None else f"{found.value:.0%}")
        if found is not None and more is not None:
            exact = found.value - more.value
    if exact is None:
        return "not measured"
    asked = {cell.part for cell in result.values if (cell.plan, cell.length) == (plan, ANSWERS_AT)}
    few = f", in {', '.join(sorted(asked))} alone" if len(asked) == 1 else ""
    return f"{' / '.join(shares)} of {exact:.0%}{few}"


def _goes_not_with(kv: dict[str, Any], parts: dict[str, dict[str, Any]]) -> str:
    """Which of the parts, and what else of a request, a plan of this `kv` cannot have besides."""
    plan, refused = Plan.parse({"kv": kv}), _refused(kv, parts)
    beside: dict[str, Callable[[], object]] = {
        "pressure": lambda: Plan.parse({"kv": kv, "on_pressure": {"evict": EVICTS}}),
        "images": lambda: plan.check_pictures({"image"}),
        "guesses": lambda: check_combination(parse_speculation({"method": "prompt_lookup"}), plan),
    }
    for label, check in beside.items():
        try:
            check()
        except RequestError:
            refused.append(label)
    return ", ".join(refused)


def _refused(kv: dict[str, Any], parts: dict[str, dict[str, Any]], **others: Any) -> list[str]:
    """Which of the parts a plan of this `kv`, and of these others beside it, cannot have besides."""
    refused = []
    for label, part in parts.items():
        both = {name: kv.get(name, {}) | value if isinstance(value, dict) else value for name, value in part.items()}
        try:
            Plan.parse({"kv": kv | both, **others})
        except RequestError:
            refused.append(label)
    return refused


def _signals(method: Any) -> str:
    return ", ".join(sorted(method.signals)) or "positions"


def _source(method: Any) -> str:
    """The paper that a method's module names first."""
    found = re.search(r"arXiv:(\d{4}\.\d{5})", sys.modules[type(method).__module__].__doc__ or "")
    return f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else ""


def _first_line(method: Any) -> str:
    return (type(method).__doc__ or "").strip().partition("\n")[0]


def _table(title: str, head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    def line(cells: tuple[str, ...]) -> str:
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

    return ["", f"## {title}", "", line(head), line(("---",) * len(head)), *map(line, rows)]


def main(
    result: Annotated[Path, typer.Argument(help="What `winnow eval` wrote.")],
    out: Annotated[Path, typer.Argument(help="The page.")],
    images: Annotated[Path | None, typer.Option(help="What `winnow eval --vision` wrote.")] = None,
) -> None:
    """Writes the table of methods."""
    measured, of_images = (
        None if path is None else Result.from_dict(json.loads(path.read_text("utf-8"))) for path in (result, images)
    )
    assert measured is not None and OFF in measured.plans
    write_text(out, methods(measured, of_images))


if __name__ == "__main__":
    typer.run(main)
