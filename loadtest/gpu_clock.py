"""How long device work takes: CUDA graphs replayed between events, so that neither launches nor the host are measured.

Where there is no GPU the same calls are timed once by the wall clock: the benchmark is rehearsed there, not run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

Call = Callable[[], object]
TARGET_S = 0.04
"""Of measuring, for each figure"""
SLEEP_CYCLES = 30_000_000
"""Of a clock of one to two GHz: longer than launching what is timed without a graph"""
HAS_GPU = torch.cuda.is_available()


def seconds_replayed(calls: Sequence[Call]) -> float:
    """Median seconds of one of `calls`, which are captured one after the other. They should read different memory, more
    in all than the cache holds, and have run before. RuntimeError where they cannot be captured."""
    if not HAS_GPU:
        return seconds(calls[0], repeats=1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # so that no call's output takes the place of another's
    graph.replay()
    replays = max(3, min(50, int(TARGET_S / max(_between(graph.replay), 1e-6))))
    result = median(_between(graph.replay) for _ in range(replays)) / len(calls)
    graph.reset()
    del kept
    return result


def seconds_launched(calls: Sequence[Call]) -> float:
    """The same without a graph, for calls that copy from the host: the device sleeps until all have been launched."""
    if not HAS_GPU:
        return seconds(calls[0], repeats=1)

    def after_sleep() -> float:
        torch.cuda._sleep(SLEEP_CYCLES)
        return _between(lambda: [call() for call in calls])

    return median(after_sleep() for _ in range(5)) / len(calls)


def seconds(call: Call, repeats: int = 7, before: Call = lambda: None) -> float:
    """Median seconds of a call, the host's part included, until the device is done; `before` each is not counted."""
    taken = []
    for _ in range(repeats):
        before()
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        taken.append(time.perf_counter() - began)
    return median(taken)


def first(calls: Sequence[Call]) -> float:
    """Seconds of running each once: compilation is in there."""
    began = time.perf_counter()
    for call in calls:
        call()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    if HAS_GPU:
        torch.cuda.synchronize()


def _between(call: Call) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000
