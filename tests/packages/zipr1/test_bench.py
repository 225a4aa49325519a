from types import SimpleNamespace

import pytest
from hone_zipr1.bench import SHAPES, bench, decode_bound, prefill_bound
from hone_zipr1.config import BenchConfig

SEVEN = SimpleNamespace(**SHAPES["qwen2.5-vl-7b"])


@pytest.mark.parametrize(("tokens", "gain"), [(4096, 1.06), (16384, 1.23), (20480, 1.29), (65536, 1.89)])
def test_most_that_prefill_can_gain(tokens, gain):
    # 6.53e9 weights; worked out apart from the code.
    assert prefill_bound(SEVEN, tokens, 0.25) == pytest.approx(gain, abs=0.011)
    assert prefill_bound(SEVEN, tokens, 1.0) == 1


@pytest.mark.parametrize(("batch", "gain"), [(1, 1.0645), (8, 1.4485), (32, 2.2385), (64, 2.753)])
def test_most_that_decoding_can_gain(batch, gain):
    # 13.05 GB of weights, 57344 bytes a token.
    assert decode_bound(SEVEN, 20_000, batch, 0.25, 2) == pytest.approx(gain, abs=0.005)


def test_rows_of_every_variant(start):
    cfg = BenchConfig(tokens=(48,), batches=(2,), ratios=(0.25, 0.5), rounds=2)
    with start(cfg) as run:
        report = bench(cfg, run)
    values = {(row.metric, row.variant): row.value for row in run.rows}
    for name in ("dense", "tau 0.25", "tau 0.5"):
        assert values["prefill", name] > 0
        assert values["decode", name] > 0
    assert values["cache", "tau 0.25"] == pytest.approx(values["cache", "dense"] / 4)
    assert values["cache", "tau 0.5"] == pytest.approx(values["cache", "dense"] / 2)
    assert "of at most" in str(report)
    assert "one layer: choosing" in str(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": (0,)}, "must be positive"),
        ({"batches": ()}, "at least one of each"),
        ({"ratios": (1.5,)}, "distinct shares"),
        ({"tokens": (2048,)}, "1024 positions"),
        ({"recent": 0}, "recent must be positive"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**change)
