"""Compile a Triton or Gluon kernel for a GPU that is not there, and read what came out.

The machine code of every shipped configuration can so be checked on a machine without a GPU: that it uses the matrix
units it is meant to use, and that nothing spills.
"""

from __future__ import annotations

import functools
import io
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from .attention import BlockLayout

__all__ = [
    "Compiled",
    "Launch",
    "attention_launches",
    "compile_launch",
    "gluon_backward_launches",
    "gluon_launches",
    "pyramid_launches",
    "record_launches",
]

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

    @property
    def label(self) -> str:
        """``forward``, ``dq`` ...; ``dkv pooled`` for the gradients of pooled keys."""
        return self.name.strip("_").removesuffix("_kernel") + " pooled" * bool(self.arguments.get("DENSE"))


@dataclass(frozen=True, eq=False)
class Compiled:
    """What the compiler made of a launch.

    Attributes:
        name: The kernel.
        cubin: Machine code.
        registers: Per thread.
        spills: Bytes of local memory stored and loaded by register spills.
        shared_bytes: Shared memory of a program.
        serialized: Whether the assembler had to wait after each warpgroup matrix product (its warning C7510 or C7512).
        ptx: What the machine code was assembled from.
    """

    name: str
    cubin: bytes
    registers: int
    spills: int
    shared_bytes: int
    serialized: bool
    ptx: str

    @functools.cached_property
    def sass(self) -> str:
        """Disassembled machine code; it costs as much time as to compile a small kernel."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(self.cubin)
            return _run("nvdisasm", "-c", "-ndf", file)

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


_Pooled = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _inputs(
    dtype: torch.dtype, dim: int, block_q: int, block_k: int, heads_k: int, tokens: int, pooled: bool, padded: bool
) -> tuple[torch.Tensor, torch.Tensor, BlockLayout, torch.Tensor | None, _Pooled]:
    from .attention import BlockLayout

    q, k = (torch.empty(1, heads, tokens, dim, dtype=dtype) for heads in (4, heads_k))
    layout = BlockLayout.dense(tokens, tokens, block_q=block_q, block_k=block_k)
    valid = torch.ones(1, layout.num_k_blocks, dtype=torch.int32) if padded else None
    extra: _Pooled = (None, None, None)
    if pooled:
        far = torch.empty(1, heads_k, 100, dim, dtype=dtype)
        extra = (far, far, torch.empty(1, heads_k, 100))
    return q, k, layout, valid, extra


def attention_launches(
    dtype: torch.dtype,
    dim: int,
    block_q: int = 128,
    block_k: int = 128,
    *,
    tokens: int = 2056,
    pooled: bool = False,
    padded: bool = False,
    sm: int = 90,
    tiles: Any = None,
    from_lse: bool = True,
) -> list[Launch]:
    """What the Triton attention launches, forward and backward, for inputs of this kind.

    Args:
        dtype: Of q, k and v.
        dim: Head size.
        block_q: Queries in a block.
        block_k: Keys in a block.
        tokens: Of queries and of keys; a last block that is not full is masked.
        pooled: With pooled keys and their bias.
        padded: With ``k_valid``.
        sm: Compute capability times ten.
        tiles: Of the forward, instead of the shipped ones.
        from_lse: With a gradient from the log-sum-exp.
    """
    from .attention import triton as module

    q, k, layout, valid, extra = _inputs(dtype, dim, block_q, block_k, 4, tokens, pooled, padded)
    lse = torch.empty(q.shape[:3])
    columns = layout.transpose()
    lists = (layout.kv_num, layout.kv_idx)
    kernels = ("_forward_kernel", "_rows_kernel", "_dq_kernel", "_dkv_kernel")
    with mock.patch.object(module, "_sm", return_value=sm), record_launches(module, *kernels) as launches:
        module.attention_forward(q, k, k, *lists, valid, *extra, block_q, block_k, 0.1, tiles)
        module.attention_backward(
            q, lse if from_lse else None, q, k, k, q, lse, *lists, columns.kv_num, columns.kv_idx, valid, *extra,
            block_q, block_k, 0.1,
        )  # fmt: skip
    return launches


def gluon_launches(
    dtype: torch.dtype,
    dim: int,
    block_q: int = 128,
    block_k: int = 128,
    *,
    tokens: int = 1000,
    pooled: bool = False,
    padded: bool = False,
    sm: int = 90,
    config: Any = None,
) -> list[Launch]:
    """What the Gluon forward launches; arguments as for :func:`attention_launches`."""
    from .attention import gluon_sm90 as module

    q, k, layout, valid, extra = _inputs(dtype, dim, block_q, block_k, 2, tokens, pooled, padded)
    kernels = ("_count_kernel", "_schedule_kernel", "_bias_kernel", "_forward_kernel")
    with mock.patch.object(module, "_multiprocessors", return_value=132), record_launches(module, *kernels) as launches:
        module.attention_forward(q, k, k, layout.kv_num, layout.kv_idx, valid, *extra, block_q, block_k, 0.1, config)
    return launches


def gluon_backward_launches(
    dtype: torch.dtype,
    dim: int,
    block_q: int = 128,
    *,
    heads_k: int = 4,
    tokens: int = 2048,
    pooled: bool = False,
    padded: bool = False,
    config: Any = None,
    fixed: bool = True,
    from_lse: bool = True,
) -> list[Launch]:
    """What the Gluon backward launches, with blocks of 128 keys; arguments as for :func:`attention_launches`.

    ``fixed``: with sums in fixed point.
    """
    from .attention import gluon_backward_sm90 as module

    q, k, layout, valid, extra = _inputs(dtype, dim, block_q, 128, heads_k, tokens, pooled, padded)
    lse = torch.empty(q.shape[:3])
    columns = layout.transpose()
    lists = (layout.kv_num, layout.kv_idx, columns.kv_num, columns.kv_idx)
    kernels = ("_extent_kernel", "_bounds_kernel", "_statistics_kernel", "_backward_kernel", "_order_kernel")
    with record_launches(module, *kernels) as launches:
        module.attention_backward(
            q, lse if from_lse else None, q, k, k, q, lse, *lists, valid, *extra, block_q, 128, 0.1, config, fixed=fixed
        )
    return launches


def pyramid_launches(dtype: torch.dtype, dim: int, *, tokens: int = 2056, sm: int = 90) -> list[Launch]:
    """What attention over a pyramid of keys launches, both forwards and the backward; arguments as above."""
    from .pyramid_attention import gluon_sm90 as gluon
    from .pyramid_attention import triton as module

    q, lse = torch.empty(1, 4, tokens, dim, dtype=dtype), torch.empty(1, 4, tokens)
    blocks = -(-tokens // 128)
    factors = torch.empty(1, 4, blocks, blocks, dtype=torch.int32)
    kernels = ("_lists_kernel", "_pool_kernel", "_forward_kernel", "_rows_kernel", "_dq_kernel", "_dkv_kernel",
               "_spread_kernel")  # fmt: skip
    with (
        mock.patch.object(module, "_sm", return_value=sm),
        mock.patch.object(gluon, "_multiprocessors", return_value=132),
        mock.patch.object(gluon, "schedule", return_value=factors.new_empty(4 * blocks + 1, 2)),
        record_launches(module, *kernels) as launches,
        record_launches(gluon, "_pyramid_kernel") as others,
    ):
        num, tiles, idx = module.lists(factors, tokens // 128)
        pooled, _ = module.pool(q, q, 128)
        module.attention_forward(q, q, q, pooled, pooled, num, idx, 128, 0.1)
        module.attention_backward(q, lse, q, q, q, pooled, pooled, q, lse, num, idx, num, idx, 128, 0.1)
        if sm >= 90 and dtype.itemsize == 2 and dim in (64, 128):
            gluon.attention_forward(q, q, q, pooled, pooled, num, idx, tiles[1], 0.1)
            rest = (num, idx, num, idx, 128, 0.1, (q, q, q))
            module.attention_backward(q, lse, q, q, q, pooled, pooled, q, lse, *rest)
    return launches + others


def compile_launch(launch: Launch, sm: int = 90) -> Compiled:
    """Compile one recorded launch for compute capability ``sm / 10``; equal ones once in a process."""
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
    key = (launch.kernel, sm, repr((signature, constants, attributes, sorted(launch.options.items()))))
    if key not in _compiled:
        make = GluonASTSource if launch.kernel.is_gluon() else ASTSource
        _compiled[key] = _compile(make(launch.kernel, signature, constants, attributes), launch, sm)
    return _compiled[key]


_compiled: dict[tuple[Any, int, str], Compiled] = {}


def _compile(source: Any, launch: Launch, sm: int) -> Compiled:
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch.options)
    report, cubin = log.getvalue(), built.asm["cubin"]
    if "registers" not in report:  # it came from Triton's cache, and the assembler did not run
        with tempfile.TemporaryDirectory() as folder:
            ptx, file = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
            ptx.write_text(built.asm["ptx"])
            arch = f"sm_{sm}a" if sm >= 90 else f"sm_{sm}"
            report = _run("ptxas", "-lineinfo", "-v", "--gpu-name", arch, ptx, "-o", file)
            cubin = file.read_bytes()
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    used = re.search(r"Used (\d+) registers", report)
    assert used is not None, report
    registers = int(used[1])
    shared, ptx = built.metadata.shared, built.asm["ptx"]
    return Compiled(launch.name, cubin, registers, spills, shared, "wgmma" in report, ptx)


def _run(tool: str, *arguments: str | Path) -> str:
    """Run a tool that comes with Triton."""
    command = [Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool, *arguments]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr
