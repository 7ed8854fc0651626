"""Who is measured: servers over HTTP, and transformers in a process of its own. All read the same prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from client import Ask, BenchError, Client, Completion, NotMeasured

TRANSFORMERS = "transformers f32"
TOLERANCE = 0.01
"""Share of a prompt that may be counted otherwise, or be in a cache by chance: its first tokens are another's"""


@dataclass(frozen=True)
class Speed:
    """Output tokens a second, and what else is known of it."""

    tok_s: float
    note: str = ""
    text: str = ""
    held_bytes: int | None = None


class Contender(Protocol):
    name: str

    def decode(self, key: str, prompt: list[int], tokens: int) -> Speed:
        """From the first token to the last. Prompts of one key are one prompt."""

    def prefill(self, prompt: list[int]) -> float:
        """Seconds to the first token."""

    def together(self, prompts: Sequence[list[int]], tokens: int) -> Speed:
        """Of all together, from the first request to the last token."""


class Server:
    """A server over HTTP, under one plan."""

    def __init__(self, name: str, client: Client, plan: dict[str, Any] | None = None):
        self.name = name
        self.client = client
        self.plan = plan

    def under(self, name: str, plan: dict[str, Any]) -> Server:
        return Server(name, self.client, plan)

    def decode(self, key: str, prompt: list[int], tokens: int) -> Speed:
        (done,) = self._complete([prompt], tokens)
        held = done.compression["bytes_held"] if done.compression else None
        return Speed(done.decode_tok_s, f"{1000 * median(done.gaps_s):.1f} ms a token", done.text, held)

    def prefill(self, prompt: list[int]) -> float:
        (done,) = self._complete([prompt], 1)
        if done.cached_tokens > TOLERANCE * len(prompt):
            raise BenchError(f"{self.name} had {done.cached_tokens} tokens of a new prompt in its cache")
        return done.ttft_s

    def together(self, prompts: Sequence[list[int]], tokens: int) -> Speed:
        done = self._complete(prompts, tokens)
        seconds = max(one.arrivals[-1] for one in done) - min(one.sent for one in done)
        first_s = median(one.ttft_s for one in done)
        gaps = sorted(gap for one in done for gap in one.gaps_s)
        note = f"first token after {first_s:.1f} s, then {1000 * median(gaps):.0f} ms a token (median)"
        return Speed(sum(one.tokens for one in done) / seconds, note)

    def _complete(self, prompts: Sequence[list[int]], tokens: int) -> list[Completion]:
        """All answers, as long as was asked for. Raises NotMeasured where they are not."""
        completions = self.client.complete([Ask(prompt, tokens, self.plan) for prompt in prompts])
        for prompt, done in zip(prompts, completions, strict=True):
            if done.tokens != tokens:
                raise NotMeasured(f"{done.tokens} tokens came of {tokens}")
            if abs(done.prompt_tokens - len(prompt)) > TOLERANCE * len(prompt):
                raise NotMeasured(f"a prompt of {len(prompt)} tokens was read as {done.prompt_tokens}")
        return completions


class Transformers:
    """`baseline_worker.py`, which answers a line for a line."""

    name = TRANSFORMERS

    def __init__(self, process: subprocess.Popen[str], detokenize: Callable[[list[int]], str]):
        self._process = process
        self._detokenize = detokenize
        self._read()  # it is loaded

    def decode(self, key: str, prompt: list[int], tokens: int) -> Speed:
        answer = self._ask(do="decode", key=key, prompt=prompt, tokens=tokens)
        return Speed(answer["tok_s"], answer["way"], self._detokenize(answer["tokens"]), answer["held_bytes"])

    def prefill(self, prompt: list[int]) -> float:
        return float(self._ask(do="prefill", prompt=prompt)["seconds"])

    def together(self, prompts: Sequence[list[int]], tokens: int) -> Speed:
        answer = self._ask(do="together", prompts=prompts, tokens=tokens)
        note = f"one batch, {answer['way']}, prompts read in {answer['prefill_seconds']:.1f} s"
        return Speed(len(prompts) * tokens / answer["seconds"], note)

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"the transformers process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def transformers(model: str, threads: int, detokenize: Callable[[list[int]], str]) -> Iterator[Transformers]:
    """The baseline, loaded. Its threads do not spin when it has nothing to do, as those of the engine do not."""
    command = [sys.executable, str(Path(__file__).with_name("baseline_worker.py")), model, str(threads)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "2000",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
    }
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        try:
            yield Transformers(process, detokenize)
        finally:
            process.terminate()
