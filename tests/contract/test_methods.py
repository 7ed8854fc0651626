"""Every method of the registry over HTTP, all in one batch: what each frees, or reads, of the same prompt."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import OpenAI

from winnow.engine.compression.mix import mix_model
from winnow.engine.compression.part import FORMATS
from winnow.engine.compression.policy import LooksAhead
from winnow.engine.compression.registry import EVICTION, MERGE, MIX, READ, eviction_policy

from .serving import Serving
from .test_openai_client import MODEL, compression_of

PROMPT = "The old lighthouse keeper climbed the stairs and looked at the grey sea. " * 16
EVICT = {"policy": "h2o", "budget": 0.4}


def mix_of(name: str) -> dict[str, Any]:
    """A method that chooses tokens itself, or that goes by an eviction policy."""
    chooses = mix_model(name)(policy=name).choice is not None
    return {"mix": {"policy": name}} | ({} if chooses else {"evict": EVICT | {"budget": 0.2}})  # the rest fills a page


FREEING: dict[str, dict[str, Any]] = {
    name: {"evict": {"policy": name, "budget": 0.4}}
    for name in EVICTION
    if not isinstance(eviction_policy(name), LooksAhead)  # needs a draft model: test_draft.py
}
FREEING |= {f"{name}, merged": {"evict": EVICT | {"merge": {"policy": name}}} for name in MERGE}
FREEING |= {name: mix_of(name) | {"residual": 0} for name in MIX}
FREEING |= {name: {"format": name, "residual": 0} for name in FORMATS if name != "f32"}
READING: dict[str, dict[str, Any]] = {
    name: {"read": {"policy": name, "tokens": 32, "recent": 16, "dense_layers": 0}} for name in READ
}


def test_each_method_in_one_batch(server: Serving, client: OpenAI) -> None:
    def ask(kv: dict[str, Any]) -> dict[str, Any]:
        plan = {"compression": {"kv": kv}}
        made = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3, temperature=0, extra_body=plan)
        return compression_of(made.usage)

    plans = FREEING | READING
    with ThreadPoolExecutor(len(plans)) as pool:
        reports = dict(zip(plans, pool.map(ask, plans.values()), strict=True))
    for name in FREEING:
        assert reports[name]["bytes_held"] < 0.8 * reports[name]["bytes_uncompressed"], name
    for name in READING:
        assert reports[name]["bytes_held"] >= reports[name]["bytes_uncompressed"], name
        read = reports[name]["read"]
        assert 0 < read["bytes_per_token"] != read["bytes_per_token_dense"], name
    server.until_idle()
