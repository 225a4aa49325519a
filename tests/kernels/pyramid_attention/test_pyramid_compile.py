"""Kernels compiled ahead of time for compute capability 9.0, without a GPU, and their machine code read."""

import pytest
import torch
from hone_kernels.compile import compile_launch, pyramid_launches

triton = pytest.importorskip("triton", reason="Triton is for Linux only")


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tokens", [2048, 2056])
def test_pyramid(dim, tokens):
    """What spills lies outside of the loops; gathered tiles come by pointers, all others by tensor memory."""
    names = ["_lists_kernel", "_pool_kernel", "_forward_kernel", "_rows_kernel", "_dq_kernel", *["_dkv_kernel"] * 4]
    recorded = pyramid_launches(torch.bfloat16, dim, tokens=tokens)
    names += ["_rows_kernel", "_dq_kernel", *["_dkv_kernel"] * 3, "_spread_kernel"]
    assert [x.name for x in recorded] == [*names, "_pyramid_kernel"]
    for launch in recorded:
        code = compile_launch(launch)
        assert not code.serialized, launch
        gluon = launch.name == "_pyramid_kernel" and triton.__version__.startswith("3.6.")
        assert code.spills <= (20 * (dim == 128) if gluon else 64), launch
        if launch.name in ("_forward_kernel", "_dq_kernel", "_dkv_kernel", "_pyramid_kernel"):
            assert code.count("HGMMA") > 0, launch
            assert code.count("UTMALDG") > 0, launch
