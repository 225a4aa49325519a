"""The bench on a CPU with the reference for a backend: what is measured and checked. Only the clock is replaced."""

from functools import partial

import hone_kernels.attention.bench as attention_module
import hone_kernels.pyramid_attention.bench as pyramid_module
import pytest
import torch
from hone_core.runs import Run
from hone_core.timing import Timing


@pytest.fixture
def on_cpu(monkeypatch):
    """Calls run once, in 2 ms."""

    def clock(named, *, warmup, rounds, seed):
        for call in named.values():
            call()
        return {name: Timing(ms_p20=1.0, ms_p50=2.0, ms_p80=5.0, n=rounds) for name in named}

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(attention_module, "_DEVICE", "cpu")
    monkeypatch.setattr(pyramid_module, "measure_interleaved", clock)
    dense = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    monkeypatch.setattr(attention_module, "cudnn", dense)
    return monkeypatch


def test_a_pyramid_is_timed_beside_lists_of_as_many_keys(on_cpu):
    found = Run.start(package="hone-kernels", verb="bench")
    pyramid_module.bench(found, ["2x2600x16"], rounds=3)
    errors = {row.variant: row.value for row in found.rows if row.metric == "error"}
    assert set(errors) == {"hone pyramid", "hone pyramid, by levels"}
    assert all(0 < value < 0.01 for value in errors.values())
    rates = {row.variant: row.value for row in found.rows if (row.metric, row.split) == ("rate", "forward")}
    # Of 20 whole blocks rows read 2 as they are, 2, 4 and 8 at the higher factors; and all the short one of 40 tokens.
    pairs = 2600 * (128 * (2 + 2 / 2 + 4 / 4 + 8 / 8) + 40)
    assert rates["hone pyramid"] == pytest.approx(4 * 16 * 2 * pairs / 2.0 / 1e9)
    assert {row.split for row in found.rows} == {"forward", "backward"}


@pytest.mark.parametrize("which", [1, 2])
def test_a_wrong_pyramid_is_not_timed(on_cpu, which):
    def wrong(q, k, v, factors):
        tensors = [q, k, v]
        tensors[which] = tensors[which] * 1.1
        return pyramid_module.pyramid_attention(*tensors, factors)

    on_cpu.setattr(pyramid_module, "by_levels", wrong)
    found = Run.start(package="hone-kernels", verb="bench")
    with pytest.raises(RuntimeError, match="by levels is wrong"):
        pyramid_module.bench(found, ["2x600x16"], rounds=3)
    assert not found.rows
