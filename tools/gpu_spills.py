"""Compile configurations of the attention kernels without a GPU and print what spills.

    uv run --all-packages python tools/gpu_spills.py --sm 90 --dtypes float32 --dims 128 --blocks 128x128,32x32

Every combination of what is named is compiled: forward, dq and dkv, with and without pooled keys, of whole, ragged and
padded sequences. A combination takes one to ten seconds; the tests compile a selection (test_compile.py).
"""

from __future__ import annotations

import argparse
import itertools

import torch
from hone_kernels.attention import SUPPORT
from hone_kernels.compile import attention_launches, compile_launch, gluon_launches

TOKENS = {"whole": (2048, False), "ragged": (2056, False), "padded": (2056, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    support = SUPPORT["triton"]
    parser.add_argument("--backend", choices=("triton", "gluon"), default="triton")
    parser.add_argument("--sm", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--dtypes", default=",".join(str(x).removeprefix("torch.") for x in support.dtypes))
    parser.add_argument("--dims", default=",".join(map(str, support.head_dims)))
    parser.add_argument("--blocks", default=",".join(f"{q}x{k}" for q in support.blocks for k in support.blocks))
    parser.add_argument("--tokens", default=",".join(TOKENS), help=", ".join(TOKENS))
    parser.add_argument("--all", action="store_true", help="print also what does not spill")
    args = parser.parse_args()
    seen: set[str] = set()
    print("dtype, head size, blocks, tokens, pooled, kernel: spilled bytes, registers, shared bytes")
    for dtype, dim, blocks, tokens, pooled in itertools.product(
        args.dtypes.split(","), args.dims.split(","), args.blocks.split(","), args.tokens.split(","), (False, True)
    ):
        block_q, block_k = map(int, blocks.split("x"))
        count, padded = TOKENS[tokens]
        record = attention_launches if args.backend == "triton" else gluon_launches
        shape = (getattr(torch, dtype), int(dim), block_q, block_k)
        for launch in record(*shape, tokens=count, pooled=pooled, padded=padded, sm=args.sm):
            constants = {k: v for k, v in launch.arguments.items() if isinstance(v, (bool, str)) or k.isupper()}
            key = f"{dtype} {dim} {launch.name} {sorted(constants.items())} {launch.options}"
            if key in seen:
                continue
            seen.add(key)
            code = compile_launch(launch, args.sm)
            if code.spills or args.all:
                what = f"{dtype}, {dim}, {blocks}, {tokens}, {'pooled' if pooled else '-'}, {launch.label}"
                print(f"{what}: {code.spills}, {code.registers}, {code.shared_bytes}", flush=True)


if __name__ == "__main__":
    main()
