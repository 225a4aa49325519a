from pathlib import Path

import pytest
from hone_core.config import to_dict
from hone_zipr1.config import (
    PRESETS,
    BenchConfig,
    DemoConfig,
    EvalConfig,
    GenerateConfig,
    HostConfig,
    ReinforceConfig,
    ReproduceConfig,
    SparseConfig,
    TrainConfig,
    TrainHostConfig,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseConfig(p=0), r"p is a share of attention mass in \(0, 1\]; got 0"),
        (lambda: SparseConfig(p=1.2), "got 1.2"),
        (lambda: SparseConfig(policy="best"), "policy must be one of top-p, top-k, random, fastv"),
        (lambda: SparseConfig(cache="drop"), "cache must be one of evict, retrieve; got 'drop'"),
        (lambda: SparseConfig(compute="flash"), "compute must be one of gather, varlen, mask; got 'flash'"),
        (lambda: SparseConfig(recent=0), "recent must be positive"),
        (lambda: SparseConfig(recent=64.5), "recent is a number of rows, or below 1 a share of the prompt; got 64.5"),
        (lambda: SparseConfig(random=1.5), "random is a number of rows, or below 1 a share"),
        (lambda: SparseConfig(policy="top-k"), "ratio belongs to"),
        (lambda: SparseConfig(ratio=0.5), "ratio belongs to"),
        (lambda: SparseConfig(policy="fastv", ratio=2.0), "share of the prompt"),
        (lambda: SparseConfig(policy="fastv", ratio=0.5, fastv_layer=0), "at least 1"),
        (lambda: SparseConfig(dense_layers=(-1,)), "counted from 0"),
        (
            lambda: TrainConfig(model="m", data=Path("d"), shard=True, sparse=SparseConfig(captured=True)),
            "leave shard or captured out",
        ),
        (lambda: HostConfig(cells=9), "cells must lie in 2 .. 8"),
        (lambda: HostConfig(width=20), "multiple of heads"),
        (lambda: TrainHostConfig(minutes=0), "minutes must be positive"),
        (lambda: TrainHostConfig(decay=0), "decay is a share"),
        (lambda: TrainHostConfig(warmup_steps=0), "warmup_steps must be positive; got 0"),
        (lambda: TrainConfig(log_every=0), "log_every must be at least 1; got 0"),
        (lambda: ReinforceConfig(objective="soft-ratio"), "soft_weight is positive with soft-ratio"),
        (lambda: ReinforceConfig(objective="supervised", soft_weight=-1.0), "got -1.0 with supervised"),
        (lambda: ReinforceConfig(micro_batch=-1), "micro_batch not negative; got .* and -1"),
        (lambda: EvalConfig(model="m", data=Path("d"), limit=0), "must be positive; got 32, 64 and 0"),
        (lambda: BenchConfig(ratios=(1.5,)), r"ratios are distinct shares in \(0, 1\]"),
        (lambda: DemoConfig(ps=(0.5, 0.5)), "thresholds are distinct shares"),
        (lambda: DemoConfig(shown=0), "1 .. items shown"),
        (lambda: GenerateConfig(ask=" "), "question is empty"),
        (lambda: GenerateConfig(ask="a", model="m"), "needs an image or a video"),
        (lambda: GenerateConfig(ask="a", image="i"), "makes its own"),
        (lambda: GenerateConfig(ask="a", model="m", image="i", video="v"), "not both"),
        (lambda: GenerateConfig(ask="a", preset="none"), "preset must be one of paper"),
        (lambda: GenerateConfig(ask="a", p=2.0), "got 2.0"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_papers_preset():
    assert PRESETS["paper"].config.p == 0.975
    assert PRESETS["paper"].config.label == "top-p 0.975"


def test_a_run_goes_on_with_other_workers():
    assert to_dict(ReproduceConfig(workers=5)) == to_dict(ReproduceConfig())
