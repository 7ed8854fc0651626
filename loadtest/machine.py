"""Facts that a result is worthless without."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# In a process of its own: the benchmark's never imports torch.
_PROBE = """
import json, torch, transformers
from winnow.kernels import cpu
print(json.dumps({"isa": cpu.target(), "torch": torch.__version__, "transformers": transformers.__version__}))
"""


def facts() -> dict[str, Any]:
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "has_uncommitted_changes": bool(_git("status", "--porcelain")),
        "machine": {
            "cpu": _line("/proc/cpuinfo", "model name") or platform.processor(),
            "cores": cores(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "load_at_start": round(os.getloadavg()[0], 2),
            "system": platform.platform(),
            "python": platform.python_version(),
            **json.loads(probe.stdout),
        },
    }


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_cores(seconds: float = 2.0) -> float | None:
    """How many cores somebody used meanwhile; None where the system does not tell."""

    def busy_s() -> float | None:
        ticks = _line("/proc/stat", "cpu ", " ").split()
        # user, nice, system, idle, iowait, irq, softirq, steal: what a neighbour took is not ours to use either
        return (sum(map(int, ticks[:8])) - int(ticks[3]) - int(ticks[4])) / os.sysconf("SC_CLK_TCK") if ticks else None

    before = busy_s()
    time.sleep(seconds)
    after = busy_s()
    return None if before is None or after is None else round((after - before) / seconds, 2)


def _git(*arguments: str) -> str:
    """What git says; empty without a repository."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def _line(path: str, key: str, separator: str = ":") -> str:
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(separator)[2].strip() for line in lines if line.startswith(key)), "")
