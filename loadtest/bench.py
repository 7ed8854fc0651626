"""`make bench`: Winnow over HTTP, transformers beside it, in one run.

    python loadtest/bench.py                     everything: about 25 minutes on two cores
    python loadtest/bench.py --quick             a few minutes, smaller sizes
    python loadtest/bench.py --only decode --only plans --rounds 5
    python loadtest/bench.py --peer llama.cpp=http://127.0.0.1:8080

A peer must serve the same model with as many threads. It joins the scenarios that need nothing but OpenAI's API
(decode, prefill, together) and is left out, with the reason, of what it cannot do. All contenders stay up for the whole
run and are asked one at a time; the report says how busy the machine is when nobody is asked.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from client import Ask, BenchError, Client
from contenders import Contender, Server, Transformers, transformers
from machine import ROOT, busy_cores, cores, facts
from report import Report
from scenarios import F32, INT8, QUICK, TARGETS, Bench, Sizes
from serving import arena_gib, winnow
from winnow.engine.evaluation.text import PromptBook, corpus, digest
from winnow.engine.models.tokenizer import Tokenizer, load_tokenizer

OVER_HTTP = ("decode", "prefill", "together")
SCENARIOS = (*OVER_HTTP, "plans", "methods", "speculation", "endless", "capacity")
KV_GIB = 3.0
PEER_KEY = "WINNOW_BENCH_PEER_KEY"


class Field:
    """Starts whom a scenario needs, once; all end with the run."""

    def __init__(self, stack: ExitStack, model: str, threads: int, tokenizer: Tokenizer, peers: dict[str, str]):
        self._stack = stack
        self._model = model
        self._threads = threads
        self._tokenizer = tokenizer
        self._servers: dict[str, Server] = {}
        self._baseline: Transformers | None = None
        self.busy_cores: list[float | None] = []
        """When nobody is asked, before each scenario that compares"""
        self.peers = [Server(name, self._client(url, os.environ.get(PEER_KEY))) for name, url in peers.items()]

    def _client(self, url: str, api_key: str | None = None) -> Client:
        client = Client(url, lambda tokens: self._tokenizer.decode(tokens, skip_special_tokens=False), api_key)
        client.probe()
        return client

    def server(self, name: str) -> Server:
        if name not in self._servers:
            self._servers[name] = Server(name, self.winnow(name, kv_memory_gib=KV_GIB), plan={})
        return self._servers[name]

    def winnow(self, name: str, **settings: str | float | bool) -> Client:
        weights = "f32" if name == F32 else "int8"
        settings |= {"model": self._model, "threads": self._threads, "weights": weights}
        return self._client(self._stack.enter_context(winnow(name, **settings)))

    def baseline(self) -> Transformers:
        if self._baseline is None:
            started = transformers(self._model, self._threads, lambda tokens: self._tokenizer.decode(tokens))
            self._baseline = self._stack.enter_context(started)
        return self._baseline

    def contenders(self, *servers: str) -> list[Contender]:
        """The baseline, our servers, the peers; each has run before anything is measured."""
        everyone: list[Contender] = [self.baseline(), *map(self.server, servers), *self.peers]
        for contender in everyone:
            contender.together([list(range(1000, 1128))] * 2, 8)
        time.sleep(1)  # threads that wait for more work stop soon
        self.busy_cores.append(busy_cores())
        return everyone


def run(bench: Bench, field: Field, wanted: tuple[str, ...]) -> None:
    for peer in field.peers:
        for name in wanted:
            if name not in OVER_HTTP:
                bench.report.leave_out(peer.name, name, "it asks for what OpenAI's API does not have")
    if "decode" in wanted:
        bench.decode(field.contenders(INT8, F32))
    if "prefill" in wanted:
        bench.prefill(field.contenders(INT8))
    if "together" in wanted:
        bench.together(field.contenders(INT8))
    if "plans" in wanted:
        bench.plans(field.server(INT8))
    if "methods" in wanted:
        bench.methods(field.server(INT8))
    if "speculation" in wanted:
        bench.speculation(field.server(INT8).client)
    if "endless" in wanted:
        bench.endless(field.server(INT8).client)
    if "capacity" in wanted:
        sizes = bench.sizes
        gib = arena_gib(field.server(INT8).client, sizes.capacity_fits, sizes.capacity_context)
        client = field.winnow("of little memory", kv_memory_gib=gib, prefix_caching=False)
        client.complete([Ask(list(range(1000, 1128)), 8, {})])
        bench.capacity(client)


def main(
    name: Annotated[str | None, typer.Option(help="Of the result; the date if unset.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes: smaller sizes, one round.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SCENARIOS)}; repeatable.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of batch-1 measurements.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Of the scenario 'methods', as for `winnow eval`; all but those with a draft if unset."),
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help=f"NAME=URL of another server; its API key in {PEER_KEY}. Repeatable.")
    ] = None,
    model: Annotated[str, typer.Option(help="As for `winnow serve`.")] = "default",
    threads: Annotated[int | None, typer.Option(min=1, help="Of every contender; all cores if unset.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the JSON file.")] = ROOT / "loadtest" / "results",
) -> None:
    """Measures Winnow beside transformers; prints tables and writes JSON."""
    if unknown := set(only or ()) - set(SCENARIOS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not among {', '.join(SCENARIOS)}", param_hint="--only")
    peers = dict(part.split("=", 1) for part in peer or () if "=" in part)
    if len(peers) != len(peer or ()):
        raise typer.BadParameter("write NAME=URL, each name once", param_hint="--peer")
    sizes = QUICK if quick else Sizes()
    if rounds is not None:
        sizes = replace(sizes, rounds=rounds)
    if method:
        sizes = replace(sizes, methods=tuple(method))

    console, began = Console(width=None if sys.stdout.isatty() else 140), time.monotonic()
    tokenizer = load_tokenizer(model)
    text = corpus()
    book = PromptBook(lambda part: tokenizer.encode(part, add_special_tokens=False), text)
    known = facts()
    threads = threads or cores()
    known |= {"model": model, "threads": threads, "text": digest(text), "sizes": asdict(sizes)}
    report = Report(name or known["date"].replace(":", "").replace("+0000", "Z"), known, targets=TARGETS)
    console.print(f"{known['machine']['cpu']}, {known['machine']['cores']} cores, {known['machine']['isa']}")

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - began:6.0f} s  {text}", highlight=False, soft_wrap=True)
        report.facts["seconds"] = round(time.monotonic() - began)
        report.write(results)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left running
    try:
        with ExitStack() as stack:
            field = Field(stack, model, threads, tokenizer, peers)
            report.facts["peers"] = {one.name: {"url": one.client.url, **one.client.about()} for one in field.peers}
            report.facts["busy_cores_when_nobody_is_asked"] = field.busy_cores
            run(Bench(sizes, book, report, say), field, tuple(only or SCENARIOS))
    except BenchError as error:
        console.print(f"stopped: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    finally:
        if report.tables:
            report.show(console)
            console.print(f"written to {report.write(results)}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
