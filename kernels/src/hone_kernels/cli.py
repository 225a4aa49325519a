"""The verbs of ``hone-kernels``."""

from __future__ import annotations

import sys
from typing import Any

try:
    from hone_core.cli import Verb, run_cli
except ModuleNotFoundError:
    print("hone-kernels: its commands need the extra bench: pip install 'hone-kernels[bench]'", file=sys.stderr)
    raise SystemExit(2) from None

__all__ = ["VERBS", "info", "main"]

PACKAGE = "hone-kernels"


def main() -> None:
    """Entry point of the script."""
    run_cli(
        PACKAGE,
        VERBS,
        "GPU kernels of hone: block-sparse attention, in FP8 too, block scores, block selection, logits, column "
        "masses, token selection, decoding, splats.",
    )


def info() -> dict[str, Any]:
    """Versions, the GPU, and which backends of each op can run on it."""
    import torch
    from hone_core.environment import installed

    from hone_kernels import (
        attention,
        attention_fp8,
        block_scores,
        block_select,
        column_mass,
        decoding,
        draw_codes,
        few_tokens,
        group_means,
        guided_draw,
        kept_tokens,
        logits,
        nearest_points,
        plane_sweep,
        prefix_attention,
        pyramid_attention,
        ragged_decode,
        splat_blend,
        token_select,
    )

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # A call that every kernel takes.
    sizes = {
        attention: dict(head_dim=128, block_q=128, block_k=128),
        attention_fp8: dict(head_dim=128, block_q=128, block_k=128),
        block_scores: dict(head_dim=128, samples=16),
        block_select: {},
        decoding: {},
        draw_codes: {},
        few_tokens: {},
        group_means: {},
        guided_draw: {},
        kept_tokens: {},
        logits: {},
        nearest_points: {},
        plane_sweep: {},
        prefix_attention: {},
        pyramid_attention: dict(head_dim=128, block=128),
        splat_blend: {},
        column_mass: dict(head_dim=128),
        token_select: {},
        ragged_decode: dict(head_dim=128),
    }
    found = installed(PACKAGE, "triton")
    for op, call in sizes.items():
        dtype = (
            torch.float32
            if op in (block_select, nearest_points, plane_sweep, splat_blend, token_select)
            else torch.bfloat16
        )
        reasons = {name: support.reason(device, dtype, **call) for name, support in op.SUPPORT.items()}
        found[op.__name__.removeprefix("hone_kernels.")] = {
            name: "runs" if reason is None else f"does not: {reason}" for name, reason in reasons.items()
        }
    return found


def _verb(name: str, words: str) -> Verb:
    module, config = f"hone_kernels.{name}", f"hone_kernels.config:{name.capitalize()}Config"
    return Verb(run=f"{module}:{name}", config=config, prepare=f"{module}:prepare", help=words)


VERBS: dict[str, Any] = {
    "info": info,
    "bench": _verb("bench", "Time an op beside cuDNN, FlexAttention and others that are installed, values first."),
    "tune": _verb("tune", "Time launch settings of a kernel against each other, values first."),
    "profile": _verb("profile", "Count how busy the matrix units are, by Nsight Compute."),
    "sanitize": _verb("sanitize", "Run every kernel under compute-sanitizer."),
    "spills": _verb("spills", "Compile kernels without a GPU and say what spills registers."),
}
