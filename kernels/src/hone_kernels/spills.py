"""The verb ``spills``: configurations of the attention kernels compiled without a GPU, and what spills.

Forward, dq and dkv, with and without pooled keys. A combination takes one to ten seconds; the tests compile a part.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from typing import Any

import torch
from hone_core.runs import Report, Run

from hone_kernels.attention import SUPPORT
from hone_kernels.compile import attention_launches, compile_launch, gluon_launches
from hone_kernels.config import SpillsConfig

__all__ = ["prepare", "spills"]

TOKENS = {"whole": (2048, False), "ragged": (2056, False), "padded": (2056, True)}
_log = logging.getLogger(__name__)


def prepare(cfg: SpillsConfig) -> SpillsConfig:
    """Complete the config by what the backend takes.

    Raises:
        ValueError: The backend does not take a dtype, a head size or a block.
    """
    support = SUPPORT[cfg.backend]
    names = tuple(str(dtype).removeprefix("torch.") for dtype in support.dtypes)
    known: dict[str, Any] = dict(dtypes=names, dims=support.head_dims or (), blocks=support.blocks or ())
    for name, values in known.items():
        if unknown := [value for value in getattr(cfg, name) if value not in values]:
            raise ValueError(f"{cfg.backend} takes {name} in {values}; got {unknown[0]}")
    return dataclasses.replace(cfg, **{name: getattr(cfg, name) or values for name, values in known.items()})


def spills(cfg: SpillsConfig, run: Run) -> Report:
    """Compile, and write a row of spilled bytes per kernel into the run; equal kernels once.

    Args:
        cfg: What to compile, complete (see ``prepare``).
        run: The run, entered.
    """
    record = attention_launches if cfg.backend == "triton" else gluon_launches
    seen = set()
    for dtype, dim, block_q, block_k, tokens, pooled in itertools.product(
        cfg.dtypes, cfg.dims, cfg.blocks, cfg.blocks, cfg.tokens, (False, True)
    ):
        count, padded = TOKENS[tokens]
        sizes = (getattr(torch, dtype), dim, block_q, block_k)
        for launch in record(*sizes, tokens=count, pooled=pooled, padded=padded, sm=cfg.sm):
            code = compile_launch(launch, cfg.sm)
            if id(code) in seen:
                continue
            seen.add(id(code))
            labels: dict[str, Any] = dict(
                dtype=dtype, dim=dim, block_q=block_q, block_k=block_k, tokens=tokens, pooled=str(pooled),
                registers=code.registers, shared_bytes=code.shared_bytes,
            )  # fmt: skip
            fields: dict[str, Any] = dict(variant=launch.label, split=f"sm_{cfg.sm}", labels=labels)
            run.row("spills", code.spills, unit="bytes", better="lower", **fields)
            _log.info("%s %s: %d bytes spilled", launch.label, labels, code.spills)
    return Report.of(run)
