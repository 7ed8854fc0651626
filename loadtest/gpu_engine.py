"""The engine section of `make bench-gpu`: a model of Llama-3.1-8B's shape in an engine of this process.

Prompts are not read before decoding is measured: their pages hold random numbers, while plans seal and evict them as
ever. The model then reads the same bytes as after a real prompt, which would take most of the time. How fast prompts
are read is measured by itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType

import plans
from gpu_clock import HAS_GPU, synchronize
from gpu_lanes import fill_pages
from gpu_model import random_model
from gpu_section import Section
from winnow.engine.config import EngineSettings
from winnow.engine.engine import Engine
from winnow.engine.messages import Rejected, SamplingParams, Submit
from winnow.engine.pages import PageArena
from winnow.engine.runner import Runner
from winnow.engine.scheduler import ScheduledBatch
from winnow.kernels.dispatch import Backend

PLANS = {name: plans.SPEED[name] for name in (plans.OFF, "int8", "int4", "snapkv 0.25", plans.SMALLEST)}
PROFILED, KERNELS = 4, 14
"""Steps that are profiled, and the kernels of most time that are named"""
ROOM = 256
"""Tokens that a request may generate: more than are ever measured"""


class Field:
    """The engine, and what is done with it."""

    def __init__(self, section: Section, ops: Backend):
        sizes = section.sizes
        self.section = section
        began = time.monotonic()
        self.model = random_model(sizes.model, ops, sizes.weights)
        settings = EngineSettings(
            device="cuda",
            weights=sizes.weights,
            kv_memory_gib=sizes.arena_gib,
            max_seqs=sizes.max_seqs,
            prefix_caching=False,
            cuda_graphs=True,
        )
        self.engine = Engine(settings, self.model, ops)
        synchronize()
        section.first_run(time.monotonic() - began)
        self._ids = count()
        self._rng = torch.Generator().manual_seed(1)

    # Measurements ----------------------------------------------------------------------------------------------------

    def decode(self, plan: str, sequences: int, context: int, graphs: bool = True) -> None:
        """Tokens a second of so many sequences whose prompts have been read."""
        with self._requests(plan, sequences, context):
            if self._decoding < sequences:
                row = f"{sequences} x {context}"
                self.section.left_out.append(f"decode {row} {plan}: {self._decoding} fit")
                return
            if graphs:
                self._add_decode(plan, sequences, context, self._step_s())
                return
            engine, recorded = self.engine, self.engine.runner
            engine.runner = Runner(self.model, engine.arena)
            try:
                self._add_decode(f"{plan}, no graphs", sequences, context, self._step_s())
            finally:
                engine.runner = recorded

    def _add_decode(self, column: str, sequences: int, context: int, step_s: float) -> None:
        row = f"{sequences} x {context}"
        title = "Decode: tokens a second of so many sequences, Llama-3.1-8B in bf16"
        speeds = self.section.table("engine decode", title, base_column=plans.OFF)
        speeds.add(row, column, "tok/s", sequences / step_s)
        self.section.table("engine step", "The same: a step").add(row, column, "ms", 1e3 * step_s)

    def prefill(self, plan: str, prompts: int, context: int) -> None:
        """Prompt tokens a second, from submission to the first token of each."""
        taken = []
        for _ in range(2):  # the first compiles
            self._submit(plan, prompts, context, tokens=1)
            synchronize()
            began = time.perf_counter()
            while not self.engine.is_idle:
                self._step()
            taken.append(time.perf_counter() - began)
        table = self.section.table("engine prefill", "Prompts read, Llama-3.1-8B in bf16", base_column=plans.OFF)
        table.add(f"{prompts} x {context}", plan, "tok/s", prompts * context / taken[1])

    def capacity(self, plan: str, context: int) -> None:
        """How many sequences a part of the arena holds, and how fast all of them are."""
        arena, sizes = self.engine.arena, self.section.sizes
        kept_back = arena.take(arena.free_count - int(sizes.capacity_gib * 2**30) // arena.layout.page_bytes)
        try:
            with self._requests(plan, sizes.max_seqs, context, fit_all=False):
                step_s, held = self._step_s(), self._decoding
                title = f"Sequences of {context} tokens in {sizes.capacity_gib} GiB of pages, Llama-3.1-8B in bf16"
                table = self.section.table("engine capacity", title, base_row=plans.OFF)
                table.add(plan, "together", "", held, "no more were asked for" if held == sizes.max_seqs else "")
                table.add(plan, "speed", "tok/s", held / step_s)
                table.add(plan, "a step", "ms", 1e3 * step_s)
        finally:
            arena.release(kept_back)

    def profile(self, plan: str, sequences: int, context: int) -> None:
        """What the device does in a step, kernel by kernel, and how much of the step it does nothing."""
        with self._requests(plan, sequences, context):
            self._step_s()
            synchronize()
            began = time.perf_counter()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                for _ in range(PROFILED):
                    self._step()
                synchronize()
            step_ms = 1e3 * (time.perf_counter() - began) / PROFILED
        kernels = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
        by_time = sorted(kernels, key=lambda kernel: -kernel.self_device_time_total)
        title = f"A step of {sequences} x {context}, {plan}: where the device's time goes"
        table = self.section.table(f"engine profile {sequences} x {context} {plan}", title)
        table.add("the step, with the profiler", "a step", "ms", step_ms)
        busy_ms = sum(kernel.self_device_time_total for kernel in by_time) / 1e3 / PROFILED
        table.add("the device, in all", "a step", "ms", busy_ms)
        for kernel in by_time[:KERNELS]:
            row, launches = kernel.key[:60], f"{kernel.count / PROFILED:g} launches"
            table.add(row, "a step", "ms", kernel.self_device_time_total / 1e3 / PROFILED, launches)

    # How -------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _requests(self, plan: str, sequences: int, context: int, fit_all: bool = True) -> Iterator[None]:
        """Sequences that decode, as many as there is memory for; gone at the end."""
        ids = self._submit(plan, sequences, context, ROOM)
        try:
            self._pretend(fit_all)
            yield
        finally:
            for request_id in ids:
                self.engine.abort(request_id)
            self.engine.step()
            assert self.engine.is_idle

    def _submit(self, plan: str, sequences: int, context: int, tokens: int) -> list[str]:
        vocab = self.engine.config.vocab_size
        ids = [f"{plan} {next(self._ids)}" for _ in range(sequences)]
        for request_id in ids:
            prompt = torch.randint(vocab, (context,), generator=self._rng).tolist()
            sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, seed=1)
            self.engine.submit(Submit(request_id, prompt, sampling, PLANS[plan]))
        return ids

    def _pretend(self, fit_all: bool) -> None:
        """Takes prompts for read until all sequences decode, or no other one can."""
        engine, sizes = self.engine, self.section.sizes
        runner, budget = engine.runner, engine.scheduler._max_step_tokens
        pretended = torch.rand(sizes.max_seqs, engine.config.vocab_size, device=engine.arena.kv.device)
        engine.runner = _Pretending(engine.arena, pretended)  # type: ignore[assignment]
        engine.scheduler._max_step_tokens = 1 << 16
        held, since = -1, 0
        try:
            while engine.scheduler.waiting or self._decoding < len(engine.scheduler.running):
                self._step()
                held, since = self._decoding, 0 if self._decoding > held else since + 1
                if since == 4 and (not fit_all or engine.scheduler.counters.preemptions or engine.scheduler.waiting):
                    break
        finally:
            engine.runner, engine.scheduler._max_step_tokens = runner, budget
        self._drop_others()

    def _drop_others(self) -> None:
        """Ends whoever does not decode: there is no memory for them, and they would try in every step."""
        for seq in list(self.engine.scheduler.sequences()):
            if not (seq.is_running and seq.is_decoding):
                self.engine.abort(seq.request_id)

    @property
    def _decoding(self) -> int:
        return sum(seq.is_decoding for seq in self.engine.scheduler.running)

    def _step_s(self) -> float:
        began = time.perf_counter()
        for _ in range(self.section.sizes.warm_steps):
            self._step()
        self.section.first_run(time.perf_counter() - began)
        self._drop_others()
        taken = []
        for _ in range(self.section.sizes.steps):
            began = time.perf_counter()
            self._step()
            taken.append(time.perf_counter() - began)
        return median(taken)

    def _step(self) -> None:
        for output in self.engine.step():
            if isinstance(output, Rejected):
                raise RuntimeError(f"{output.request_id}: {output.message}")


class _Pretending:
    """A runner that computes nothing: a prompt's pages hold numbers, but not its own."""

    def __init__(self, arena: PageArena, logits: Tensor):
        self._arena = arena
        self._logits = logits

    def run(self, batch: ScheduledBatch, unread_ids: Tensor | None = None) -> Tensor:
        arena = self._arena
        slots, column = batch.slots, np.arange(arena.table.shape[-1])
        full, end = (arena.sealed[slots] + arena.rest[slots])[..., None], arena.columns[slots][..., None]
        # One row may have come into a fresh page.
        first = np.where((batch.counts > 1)[:, None, None, None], full, np.maximum(full, end - 1))
        pages = arena.table[slots][(column >= first) & (column < end)]
        fill_pages(arena.kv.data, arena.layout, torch.from_numpy(pages.astype(np.int64)))
        return self._logits[: len(batch.seqs)]


def engine(section: Section, ops: Backend) -> None:
    """All of it, what matters most first."""
    sizes = section.sizes
    made: list[Field] = []
    section.run("make the engine", lambda: made.append(Field(section, ops)))
    for field in made:
        for sequences, context in sizes.engine_decode:
            for plan in PLANS:
                section.run(f"decode {sequences} x {context} {plan}", partial(field.decode, plan, sequences, context))
        for sequences, context in sizes.engine_decode[:2]:
            name = f"decode {sequences} x {context} without graphs"
            section.run(name, partial(field.decode, plans.OFF, sequences, context, graphs=False))
        for plan in (plans.OFF, "int4") if HAS_GPU else ():
            sequences, context = sizes.engine_decode[1]
            section.run(f"profile {sequences} x {context} {plan}", partial(field.profile, plan, sequences, context))
        for plan in (plans.OFF, "snapkv 0.25", plans.SMALLEST):
            for prompts, context in sizes.engine_prefill:
                section.run(f"prefill {prompts} x {context} {plan}", partial(field.prefill, plan, prompts, context))
        for plan in PLANS:
            section.run(f"capacity {plan}", partial(field.capacity, plan, sizes.capacity_context))
