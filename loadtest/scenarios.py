"""What is measured. In every round the contenders take turns, so that a slow minute of the machine hits all alike."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import plans
from client import Ask, BenchError, Client, Completion, NotMeasured
from contenders import TRANSFORMERS, Contender, Server
from report import Report, Table, Target
from serving import metric
from winnow.engine.evaluation.plans import kv_plans, read_plan
from winnow.engine.evaluation.text import PromptBook

INT8, F32 = "winnow int8", "winnow f32"
MIB = 2**20
SAMPLE_S = 0.1
DRAFTED = "spec_kv"
"""Needs a draft model, which the servers here do not have"""


@dataclass(frozen=True)
class Sizes:
    """How much of each scenario is run."""

    rounds: int = 3
    contexts: tuple[int, ...] = (128, 2048, 4096, 7500)
    decode_tokens: int = 40
    prefill_tokens: int = 2048
    together: tuple[int, ...] = (8, 16)
    together_rounds: int = 2
    together_prompt: int = 512
    together_tokens: int = 128
    plans: tuple[str, ...] = tuple(plans.SPEED)
    methods: tuple[str, ...] = tuple(name for name in kv_plans((0.25,)) if not name.startswith(DRAFTED))
    """Written as for `winnow eval`"""
    plan_context: int = 7500
    plan_together: int = 16
    plan_together_rounds: int = 1
    capacity_context: int = 4096
    capacity_fits: int = 4
    capacity_requests: int = 24
    capacity_tokens: int = 256
    endless_contexts: int = 4


QUICK = Sizes(
    rounds=1,
    contexts=(128, 2048),
    decode_tokens=24,
    together=(8,),
    together_rounds=1,
    together_tokens=32,
    plans=(plans.OFF, "int4", "snapkv 0.25", plans.SMALLEST),
    plan_context=2048,
    plan_together=8,
    capacity_context=1024,
    capacity_tokens=128,
)


@dataclass
class Bench:
    """A run: its sizes, its text, where figures go, and what is said meanwhile."""

    sizes: Sizes
    book: PromptBook
    report: Report
    say: Callable[[str], None]

    # Batch 1 ---------------------------------------------------------------------------------------------------------

    def decode(self, contenders: Sequence[Contender]) -> None:
        tokens = self.sizes.decode_tokens
        title = f"Batch-1 decode after a context, first to last of {tokens} tokens"
        table = self.report.table("decode", title, base_column=TRANSFORMERS)
        held = self.report.table("held", "Keys and values held then", base_column=TRANSFORMERS)
        texts: dict[tuple[str, int], str] = {}
        for _ in range(self.sizes.rounds):
            for context in self.sizes.contexts:
                key = f"decode/{context}"
                prompt = self.book.prompt(key, context)
                row = f"{context} tokens"
                for contender in contenders:
                    with self._measuring(contender, f"decode, {row}"):
                        done = contender.decode(key, prompt, tokens)
                        texts[contender.name, context] = done.text
                        self._add(table, row, contender.name, "tok/s", done.tok_s, done.note)
                        if done.held_bytes is None:
                            self.report.leave_out(contender.name, "bytes held", "it does not say")
                        else:
                            held.add(row, contender.name, "MiB", done.held_bytes / MIB)
        self.report.facts["texts_equal_to_transformers"] = {
            one.name: sum(texts.get((one.name, c), "") == texts[TRANSFORMERS, c] for c in self.sizes.contexts)
            for one in contenders
        }

    def prefill(self, contenders: Sequence[Contender]) -> None:
        tokens = self.sizes.prefill_tokens
        table = self.report.table("prefill", f"Prefill of a new prompt of {tokens} tokens", base_column=TRANSFORMERS)
        for number in range(self.sizes.rounds):
            prompt = self.book.prompt(f"prefill/{number}", tokens)
            for contender in contenders:
                with self._measuring(contender, "prefill"):
                    seconds = contender.prefill(prompt)
                    self._add(table, "speed", contender.name, "prompt tok/s", tokens / seconds)
                    table.add("time to first token", contender.name, "s", seconds)

    # Many at once ----------------------------------------------------------------------------------------------------

    def together(self, contenders: Sequence[Contender]) -> None:
        prompt, new = self.sizes.together_prompt, self.sizes.together_tokens
        title = f"Requests at once (prompt {prompt}, {new} new tokens), all output tokens over all the time"
        table = self.report.table("together", title, base_column=TRANSFORMERS)
        for number in range(self.sizes.together_rounds):
            for count in self.sizes.together:
                prompts = self.book.prompts(f"together/{number}/{count}", count, prompt)
                row = f"{count} requests"
                for contender in contenders:
                    with self._measuring(contender, f"together, {row}"):
                        speed = contender.together(prompts, new)
                        self._add(table, row, contender.name, "tok/s", speed.tok_s, speed.note)

    # Plans -----------------------------------------------------------------------------------------------------------

    def plans(self, server: Server) -> None:
        """Every plan in the same server, beside requests without one."""
        sizes = self.sizes
        context, count, new = sizes.plan_context, sizes.plan_together, sizes.together_tokens
        table = self.report.table("plans", f"Plans in one server ({server.name})", base_row=plans.OFF)
        key = f"decode/{context}"
        prompt = self.book.prompt(key, context)
        for _ in range(sizes.rounds):
            for name in sizes.plans:
                done = server.under(name, plans.SPEED[name]).decode(key, prompt, sizes.decode_tokens)
                self._add(table, name, f"decode at {context}", "tok/s", done.tok_s, done.note)
                if done.held_bytes is not None:
                    table.add(name, f"held at {context}", "MiB", done.held_bytes / MIB)
        for number in range(sizes.plan_together_rounds):
            for name in sizes.plans:
                prompts = self.book.prompts(f"plans/{number}/{name}", count, sizes.together_prompt)
                speed = server.under(name, plans.SPEED[name]).together(prompts, new)
                self._add(table, name, f"{count} at once", "tok/s", speed.tok_s, speed.note)

    def methods(self, server: Server) -> None:
        """What decoding costs under each method alone: in every round one after another, each beside all others."""
        sizes = self.sizes
        title = f"Methods in one server ({server.name}), first to last of {sizes.decode_tokens} tokens"
        table = self.report.table("methods", title, base_row=plans.OFF)
        key = f"decode/{sizes.plan_context}"
        prompt = self.book.prompt(key, sizes.plan_context)
        named = {plans.OFF: {}, **{name: read_plan(name) for name in sizes.methods}}
        for _ in range(sizes.rounds):
            for name, plan in named.items():
                done = server.under(name, plan).decode(key, prompt, sizes.decode_tokens)
                self._add(table, name, f"decode at {sizes.plan_context}", "tok/s", done.tok_s, done.note)
                if done.held_bytes is not None:
                    table.add(name, f"held at {sizes.plan_context}", "MiB", done.held_bytes / MIB)

    # Speculation -----------------------------------------------------------------------------------------------------

    def speculation(self, client: Client) -> None:
        """A text that the model is copying, and one that goes on as it likes; answers must not differ."""
        sizes, new = self.sizes, self.sizes.together_tokens
        table = self.report.table("speculation", "Batch-1 decode with tokens guessed ahead", base_row=plans.OFF)
        excerpt = self.book.prompt("speculation", sizes.together_prompt)
        prompts = {"a copy": excerpt + excerpt[: len(excerpt) // 2], "plain text": excerpt}
        texts: dict[str, str] = {}
        for _ in range(sizes.rounds):
            for name, speculative in plans.SPECULATION.items():
                for kind, prompt in prompts.items():
                    (done,) = client.complete([Ask(prompt, new, {}, speculative)])
                    if texts.setdefault(kind, done.text) != done.text:
                        raise BenchError(f"{name} says something else of {kind}")
                    self._add(table, name, kind, "tok/s", done.decode_tok_s)
                    table.add(name, f"{kind}: guessed", "tokens", done.accepted_tokens)

    # Endless texts ---------------------------------------------------------------------------------------------------

    def endless(self, client: Client) -> None:
        """What the model loses on a real text far beyond its context, in a window of constant size."""
        context, begin = client.get("/v1/models").json()["data"][0]["max_model_len"], 128
        part = context // 2
        title = f"Loss on one text beyond the context of {context} tokens, in nats a token"
        table = self.report.table("endless", title, base_column=plans.OFF)
        text = self.book.prompt("endless", self.sizes.endless_contexts * context)
        for name, plan in plans.ENDLESS.items():
            read = text[: context - 1] if name == plans.OFF else text
            ask = Ask(read[:begin], len(read) - begin + 1, plan, forced=read[begin:])
            (done,) = client.complete([ask])
            for first in range(0, len(done.logprobs) - 1, part):
                losses = done.logprobs[max(0, first - begin) : first - begin + part]
                self._add(table, f"tokens {first} to {first + part}", name, "nats", -sum(losses) / len(losses))
            if done.compression:
                table.add("held at the end", name, "MiB", done.compression["bytes_held"] / MIB)

    # Capacity --------------------------------------------------------------------------------------------------------

    def capacity(self, client: Client) -> None:
        """Requests that decode together in an arena made for few."""
        sizes = self.sizes
        title = (
            f"{sizes.capacity_requests} requests of {sizes.capacity_context} tokens, "
            f"with KV memory for {sizes.capacity_fits} uncompressed"
        )
        table = self.report.table("capacity", title, base_row=plans.OFF)
        length = sizes.capacity_context - sizes.capacity_tokens
        for name in (plans.OFF, plans.SMALLEST):
            prompts = self.book.prompts(f"capacity/{name}", sizes.capacity_requests, length)
            asks = [Ask(prompt, sizes.capacity_tokens, plans.SPEED[name]) for prompt in prompts]
            # Without a plan the rest of the queue would only repeat what its first members showed.
            enough = sizes.capacity_fits if name == plans.OFF else len(asks)
            seen = asyncio.run(watch(client, asks, enough))
            self._add(table, name, "decode together", "requests", seen.together)
            table.add(name, "running at most", "requests", seen.running)
            table.add(name, "preemptions", "times", seen.preemptions)
            table.add(name, "output", "tok/s", seen.tok_s)
            table.add(name, "held each", "MiB", seen.held_bytes / MIB)

    @contextmanager
    def _measuring(self, contender: Contender, what: str) -> Iterator[None]:
        """One who cannot be measured is left out, with the reason; the others go on."""
        try:
            yield
        except NotMeasured as reason:
            self.report.leave_out(contender.name, what, str(reason))
            self.say(f"{contender.name} is left out of {what}: {reason}")

    def _add(self, table: Table, row: str, column: str, unit: str, value: float, note: str = "") -> None:
        table.add(row, column, unit, value, note)
        self.say(f"{row}, {column}: {value:.1f} {unit}" + (f" ({note})" if note else ""))


@dataclass
class Seen:
    """What was seen of many requests while they ran."""

    together: int = 0
    """Most that decoded at one moment: past their first token, not finished, and running by the server's count"""
    running: int = 0
    preemptions: int = 0
    tok_s: float = 0.0
    held_bytes: float = 0.0
    completions: list[Completion] = field(default_factory=list)


async def watch(client: Client, asks: Sequence[Ask], enough: int) -> Seen:
    """Sends all requests at once and looks at them until `enough` have finished; the others are cancelled."""
    seen = Seen(completions=[Completion() for _ in asks])
    async with client.http() as http:

        async def metrics() -> str:
            return (await http.get("/metrics")).raise_for_status().text

        while metric(await metrics(), "num_requests_running"):  # whom the last run cancelled
            await asyncio.sleep(SAMPLE_S)
        before = metric(await metrics(), "num_preemptions_total")
        pairs = zip(asks, seen.completions, strict=True)
        began = time.perf_counter()
        tasks = [asyncio.create_task(client.stream(http, ask, done)) for ask, done in pairs]
        try:
            while sum(task.done() for task in tasks) < enough:
                text = await metrics()
                running = int(metric(text, "num_requests_running"))
                decoding = sum(done.is_decoding for done in seen.completions)
                seen.running = max(seen.running, running)
                seen.together = max(seen.together, min(running, decoding))
                await asyncio.sleep(SAMPLE_S)
                for task in tasks:
                    if task.done():
                        task.result()  # raises what went wrong
            seconds = time.perf_counter() - began
            after = metric(await metrics(), "num_preemptions_total")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    finished = [done for done in seen.completions if done.is_done]
    seen.preemptions = int(after - before)
    seen.tok_s = sum(len(done.arrivals) for done in seen.completions) / seconds
    seen.held_bytes = sum(done.compression["bytes_held"] for done in finished if done.compression) / len(finished)
    return seen


# Targets -------------------------------------------------------------------------------------------------------------


def _worst_decode(tables: dict[str, Table]) -> float | None:
    table = tables.get("decode", Table(""))
    ratios = [table.ratio(row, INT8) for row in table.rows]
    known = [ratio for ratio in ratios if ratio is not None]
    return min(known, default=None)


def _sixteen(tables: dict[str, Table]) -> float | None:
    figure = tables.get("together", Table("")).figures.get(("16 requests", INT8))
    return figure.median if figure else None


def _better_plan(tables: dict[str, Table]) -> float | None:
    table = tables.get("plans", Table(""))
    ratios = [table.ratio(name, "decode at 7500") for name in ("int4", "snapkv 0.25")]
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def _capacity(tables: dict[str, Table]) -> float | None:
    table = tables.get("capacity", Table(""))
    figure = table.figures.get((plans.SMALLEST, "decode together"))
    return figure.median if figure and " of 4096 tokens" in table.title else None


TARGETS = [
    Target("batch-1 decode, int8 weights, to transformers f32, at every context", 2.0, _worst_decode),
    Target("16 requests at once over HTTP, output tok/s", 60.0, _sixteen),
    Target("decode at 7.5k context with int4 or budget 0.25, to no plan, in one server", 1.3, _better_plan),
    Target("4k requests together under 0.25 + int4, in memory for 4 uncompressed", 16, _capacity),
]
