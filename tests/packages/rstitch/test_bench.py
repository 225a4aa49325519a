from dataclasses import replace

import pytest
from hone_rstitch import bench as module
from hone_rstitch.bench import BenchReport, bench
from hone_rstitch.config import BenchConfig


def test_steps_gaps_and_rates(packaged, start):
    cfg = BenchConfig(context=6, gaps=(1, 5), tokens=8, share=0.5, rounds=2)
    with start(cfg) as run:
        report = bench(cfg, run)
    read = {(row.variant, row.labels["gap"]) for row in report.rows if row.metric == "read"}
    assert read == {(name, gap) for name in ("small", "large") for gap in (1, 5)}
    rates = {row.variant: row.value for row in report.rows if row.metric == "rate"}
    assert rates.keys() == {"large, transformers", "large, this loop", "small, this loop", "stitched"}
    assert all(rate > 0 for rate in rates.values())
    share = next(row.value for row in report.rows if row.metric == "large_share")
    assert share * 8 == int(share * 8)
    again = start(cfg)
    assert str(BenchReport.of(again)) == str(report)


def test_nothing_is_timed_of_loops_that_write_different_texts(packaged, start, monkeypatch):
    write = module.stitch_generate

    def other(*args, **kwargs):
        output = write(*args, **kwargs)
        output.sequences[:, -1] += 1
        return output

    monkeypatch.setattr(module, "stitch_generate", other)
    cfg = BenchConfig(context=6, tokens=8, rounds=2)
    with pytest.raises(RuntimeError, match="different texts"), start(cfg) as run:
        bench(cfg, run)
    assert not [row for row in run.rows if row.metric == "rate"]


def test_published_shapes():
    # Weights of a step: everything but the embedding's rows, in 16 bits, in GB.
    sizes = {}
    for name, shape in module.SHAPES.items():
        h, layers, kv = shape["hidden_size"], shape["num_hidden_layers"], shape["num_key_value_heads"] * 128
        layer = 2 * h * h + 2 * h * kv + 3 * h * shape["intermediate_size"]
        sizes[name] = round(2 * (layers * layer + h * shape["vocab_size"]) / 1e9, 2)
    assert sizes == {"1.5b": 3.09, "7b": 14.14, "14b": 27.98, "32b": 63.97}


def test_the_engine_beside_transformers(packaged, start):
    cfg = BenchConfig(loop="engine", context=6, gaps=(1, 5), tokens=8, batches=(1, 4), share=0.5, rounds=2)
    cfg = replace(cfg, peers=("eager", "static", "assisted"))
    with start(cfg) as run:
        report = bench(cfg, run)
    graphs = {
        (row.variant, row.labels["batch"], row.labels["launches"]) for row in report.rows if row.metric == "graph"
    }
    ways = ((1, "plain"), (1, "fused"), (4, "plain"))
    assert graphs == {(name, *way) for name in ("small", "large") for way in ways}
    found = {}
    for row in report.rows:
        found.setdefault(row.metric, {})[row.variant, row.labels.get("batch"), row.labels.get("gap")] = row.value
    assert found["step"].keys() == {(name, batch, None) for name in ("small", "large") for batch in (1, 4)}
    assert found["read"].keys() == {(name, 1, gap) for name in ("small", "large") for gap in (1, 5)}
    whose = {"small", "large", "stitched", "small, transformers", "large, transformers"}
    once = {"small, transformers, static cache", "large, transformers, static cache", "large, assisted decoding"}
    assert {variant for variant, batch, _ in found["rate"] if batch == 1} == whose | once
    assert {variant for variant, batch, _ in found["rate"] if batch == 4} == whose | {"stitched, large from 2"}
    assert found["formula_rate"].keys() == {("stitched", 1, None)}
    assert all(value > 0 for values in found.values() for value in values.values())
    # Nothing is known of a CPU's bandwidth, so no limit is told.
    assert "floor" not in found
    assert "4 x stitched, large from 2" in str(report)


def test_the_engine_is_compared_before_it_is_timed(packaged, start, monkeypatch):
    from hone_rstitch.decoder import Decoder

    forward = Decoder.__call__
    monkeypatch.setattr(
        Decoder, "__call__", lambda self, *args, **kw: tuple(1.1 * x for x in forward(self, *args, **kw))
    )
    cfg = BenchConfig(loop="engine", context=6, gaps=(1,), tokens=8, batches=(1,), rounds=2)
    with pytest.raises(RuntimeError, match="logits on pages is wrong"), start(cfg) as run:
        bench(cfg, run)
    assert not run.rows


def test_ways_of_different_values_are_not_timed(packaged, start, monkeypatch):
    from hone_rstitch.decoder import Decoder

    forward = Decoder.__call__

    def wrong(self, *args, fused=True):
        return tuple(x if fused else 1.1 * x for x in forward(self, *args, fused=fused))

    monkeypatch.setattr(Decoder, "__call__", wrong)
    cfg = BenchConfig(loop="engine", context=6, gaps=(1,), tokens=8, batches=(1,), rounds=2)
    with pytest.raises(RuntimeError, match="logits in fewer launches is wrong"), start(cfg) as run:
        bench(cfg, run)
    assert "graph" not in {row.metric for row in run.rows}


def test_the_engine_packs_short_gaps():
    with pytest.raises(ValueError, match="gaps of up to 64 tokens; got 65"):
        BenchConfig(loop="engine", gaps=(65,))
