"""Compile a Triton or Gluon kernel for a GPU that is not there, and read what came out.

The machine code of every shipped configuration can so be checked on a machine without a GPU: that it uses the matrix
units it is meant to use, and that nothing spills.
"""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Compiled", "Launch", "compile_launch", "record_launches"]

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: its name, function, arguments by name, and options such as ``num_warps``."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch.

    Attributes:
        name: The kernel.
        sass: Disassembled machine code.
        registers: Per thread.
        spills: Bytes of local memory stored and loaded by register spills.
        shared_bytes: Shared memory of a program.
        serialized: Whether the assembler had to wait after each warpgroup matrix product (its warning C7510 or C7512).
        ptx: What the machine code was assembled from.
    """

    name: str
    sass: str
    registers: int
    spills: int
    shared_bytes: int
    serialized: bool
    ptx: str

    def count(self, instruction: str) -> int:
        """How often an instruction (``HGMMA``, ``UTMALDG`` ...) stands in the machine code."""
        return len(re.findall(rf"\b{instruction}\b", self.sass))


class _Recorder:
    def __init__(self, name: str, kernel: Any, launches: list[Launch]) -> None:
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        names = self.kernel.arg_names

        def launch(*args: Any, **kwargs: Any) -> None:
            arguments = dict(zip(names, args, strict=False))
            arguments.update({k: v for k, v in kwargs.items() if k in names})
            options = {k: v for k, v in kwargs.items() if k not in names}
            self.launches.append(Launch(self.name, self.kernel, arguments, options))

        return launch


@contextmanager
def record_launches(module: ModuleType, *kernels: str) -> Iterator[list[Launch]]:
    """Inside the context these kernels of ``module`` note their launches instead of running."""
    launches: list[Launch] = []
    originals = {name: getattr(module, name) for name in kernels}
    try:
        for name, kernel in originals.items():
            setattr(module, name, _Recorder(name, kernel, launches))
        yield launches
    finally:
        for name, kernel in originals.items():
            setattr(module, name, kernel)


def compile_launch(launch: Launch, sm: int = 90) -> Compiled:
    """Compile one recorded launch for compute capability ``sm / 10``."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        special = not param.do_not_specialize
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1 and special):
            signature[param.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, (TensorDescriptor, GluonTensorDescriptor)):
            block = f"{_TYPES[value.base.dtype]}{list(value.block_shape)}".replace(" ", "")
            layout = f",{value.layout!r}" if isinstance(value, GluonTensorDescriptor) else ""
            signature[param.name] = f"tensordesc<{block}{layout}>"
        elif isinstance(value, torch.Tensor):
            signature[param.name] = "*" + _TYPES[value.dtype]
            if not param.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and special:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32"
    make = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = make(launch.kernel, signature, constants, attributes)
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch.options)
    report = log.getvalue()
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        if "registers" not in report:  # it came from Triton's cache, and the assembler did not run
            ptx.write_text(built.asm["ptx"])
            arch = f"sm_{sm}a" if sm >= 90 else f"sm_{sm}"
            report = _run(tools / "ptxas", "-lineinfo", "-v", "--gpu-name", arch, ptx, "-o", cubin)
        sass = _run(tools / "nvdisasm", cubin)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    registers = int(re.search(r"Used (\d+) registers", report).group(1))
    return Compiled(launch.name, sass, registers, spills, built.metadata.shared, "wgmma" in report, built.asm["ptx"])


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr
