"""What kernels become on a GPU that is not there.

Launchers run as they are, on CPU tensors, before a driver that stands in for a GPU. What they would launch is recorded
instead, specialized as for a real launch: alignment of pointers, numbers that are known, warps, stages. A recorded
launch is then compiled to machine code, and that is read with the disassembler that comes with Triton.

The kernels' results are never computed: a launcher that looks at one sees what its memory held before. Not in a process
with TRITON_INTERPRET, and one architecture a process, since what a module chose for one may be remembered.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource
from triton.runtime import driver

SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block may have, by architecture (CUDA programming guide, compute capabilities)"""

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class StandIn(DriverBase):
    """Triton's idea of a GPU, as far as it goes before a launch."""

    def __init__(self, arch: int):
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is launched")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Launch:
    """A variant of a kernel: what a launch specializes it for."""

    kernel: Any
    arch: int
    signature: dict[str, str]
    """argument -> type, or "constexpr" where its value is known"""
    constants: dict[tuple[int, ...], Any]
    """path of an argument -> its value, where that is known"""
    attributes: dict[tuple[int, ...], Any]
    """path of an argument -> what is known of it, such as its divisibility"""
    options: dict[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def constexprs(self) -> dict[str, Any]:
        """Values of the kernel's compile-time parameters, by name."""
        return {self.kernel.arg_names[path[0]]: value for path, value in self.constants.items() if len(path) == 1}

    def compile(self) -> Machine:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=self.options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
            binary.write(compiled.asm["cubin"])
            binary.flush()
            usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary.name)
            code = _output(knobs.nvidia.nvdisasm.path, "-c", binary.name)
        resources = _RESOURCES.search(usage)
        if resources is None:
            raise RuntimeError(f"cuobjdump says nothing of {self.name}'s resources: {usage}")
        registers, stack, static, local = map(int, resources.groups())
        return Machine(
            name=self.name,
            arch=self.arch,
            warps=compiled.metadata.num_warps,
            stages=self.options["num_stages"],
            registers=registers,
            stack=stack,
            local=local,
            shared=max(static, compiled.metadata.shared),
            instructions=dict(Counter(_INSTRUCTION.findall(code))),
        )


@dataclass(frozen=True)
class Machine:
    """A compiled variant. Sizes in bytes: stack and local by thread, shared by block."""

    name: str
    arch: int
    warps: int
    stages: int
    registers: int
    """by thread"""
    stack: int
    local: int
    shared: int
    instructions: dict[str, int] = field(repr=False)
    """Instruction with its modifiers -> how often it stands in the code"""

    def count(self, pattern: str) -> int:
        """Instructions whose name with modifiers begins with a match of `pattern`."""
        return sum(count for name, count in self.instructions.items() if re.match(pattern, name))

    @property
    def spills(self) -> int:
        """Loads and stores of local memory, where registers go that do not fit."""
        return self.count("LDL|STL")

    @property
    def loads(self) -> int:
        """Loads of global memory, those that go straight to shared memory included."""
        return self.count("LDG|LDGSTS|UTMALDG")

    @property
    def wide_loads(self) -> int:
        """Those of 16 bytes a thread or more."""
        return self.count(r"(LDG|LDGSTS)\S*\.(128|256)|UTMALDG")

    @property
    def tensor_core(self) -> int:
        """Matrix instructions: of a warp, a warp group, or Blackwell's own."""
        return self.count("HMMA|HGMMA|IMMA|QMMA|QGMMA|UTC.*MMA")


@contextmanager
def recording(arch: int) -> Iterator[Callable[[], list[Launch]]]:
    """Kernels are recorded instead of launched. Yields a function that returns what was since it was last called.

    Of launches that share a variant the first is recorded.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled")
    seen: set[Any] = set()
    launches: list[Launch] = []

    def record(fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernel = fn.jit_function
        if (kernel, compile["key"]) not in seen:
            seen.add((kernel, compile["key"]))
            options = json.loads(compile["specialization_data"])["options"]
            options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
            (attributes,) = compile["configs"]
            launches.append(Launch(kernel, arch, compile["signature"], compile["constants"], attributes, options))
        return True  # Triton neither compiles nor launches what its hook takes

    def take() -> list[Launch]:
        taken = launches.copy()
        launches.clear()
        return taken

    driver.set_active(StandIn(arch))
    knobs.runtime.jit_cache_hook = record
    try:
        yield take
    finally:
        knobs.runtime.jit_cache_hook = None


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
