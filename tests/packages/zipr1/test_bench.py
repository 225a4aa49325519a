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
    cfg = BenchConfig(tokens=(48,), batches=(2,), ratios=(0.25, 0.5), rounds=2, captured=True)
    with start(cfg) as run:
        report = bench(cfg, run)
    values = {(row.metric, row.variant): row.value for row in run.rows}
    for name in ("dense", "tau 0.25", "tau 0.5"):
        assert values["prefill", name] > 0
        assert values["decode", name] > 0
        assert values["decode", f"{name}, captured"] > 0
    assert values["cache", "tau 0.25"] == pytest.approx(values["cache", "dense"] / 4)
    assert values["cache", "tau 0.5"] == pytest.approx(values["cache", "dense"] / 2)
    assert "of at most" in str(report)
    assert "one layer: choosing" in str(report)


def test_decoding_alone_from_caches_of_unequal_samples(start, monkeypatch):
    from hone_zipr1 import bench as module

    kept = []
    filled = module._filled

    def looked_at(*given):
        cache = filled(*given)
        kept.append([layer.valid for layer in cache.layers] if given[-1] else cache)
        return cache

    monkeypatch.setattr(module, "_filled", looked_at)
    cfg = BenchConfig(tokens=(48,), batches=(3,), ratios=(0.25,), decode_only=True, rounds=2, captured=True)
    with start(cfg) as run:
        report = bench(cfg, run)
    # What plain decoding appended is taken back; 0.5, 1 and 1.5 times 12 tokens are kept. Captured steps stay.
    assert [valid.sum(-1).tolist() for valid in kept[1]] == [[6, 12, 18]] * 6
    values = {(row.metric, row.variant): row.value for row in run.rows}
    assert values["decode", "tau 0.25, captured"] > 0
    assert values["cache", "tau 0.25"] == pytest.approx(values["cache", "dense"] * 18 / 48)
    assert values["decode_bound", "tau 0.25"] > 1
    assert ("prefill", "dense") not in values
    assert "in decode" in str(report)
    assert "prefill" not in str(report)


def test_an_installed_flash_attention_3_is_found(tmp_path, monkeypatch):
    from hone_zipr1.bench import flash_attention_3

    assert flash_attention_3() is None
    (tmp_path / "fa3_fwd_interface.py").write_text("def flash_attn_func(q, k, v, causal):\n    return q")
    monkeypatch.syspath_prepend(tmp_path)
    attend = flash_attention_3()
    assert attend is not None
    assert attend(1, 2, 3, causal=True) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": (0,)}, "must be positive"),
        ({"batches": ()}, "at least one of each"),
        ({"ratios": (1.5,)}, "distinct shares"),
        ({"tokens": (2048,)}, "1024 positions"),
        ({"recent": 0}, "recent must be positive"),
        ({"decode_only": True, "ratios": (0.7,)}, "at most 2/3"),
        ({"unequal": True}, "a model other than tiny"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**change)
