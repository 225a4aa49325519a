from dataclasses import replace

import pytest
import torch
from hone_blade.config import Comparison, EvalConfig
from hone_blade.evaluate import (
    VARIANTS,
    EvalReport,
    _Sampler,
    attention_gflop,
    compare,
    comparison_table,
    evaluate,
    write_rows,
)
from hone_core.runs import Run, load_results
from hone_video.clips import random_labels
from hone_video.host import Host, save_host
from hone_video.host_config import HostConfig
from hone_video.means import bootstrap

# 64 tokens in 4 blocks of 16
TINY = HostConfig(
    frames=4,
    height=16,
    width=16,
    layers=2,
    heads=2,
    head_dim=32,
    ffn_dim=32,
    text_dim=16,
    steps=3,
    solver="euler",
    guidance=1.0,
)
SPARSE = Comparison(block=16, density=0.5, pool=4, samples=4)


@pytest.fixture(scope="module")
def host():
    """Random weights with an output that depends on attention, unlike an untrained host's zero."""
    host = Host.untrained(TINY, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in host.transformer.blocks:
            block.scale_shift_table[:, 2] = 1.0
            block.attn1.to_q.weight.mul_(4)
        weight = host.transformer.proj_out.weight
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    host.transformer.eval().requires_grad_(False)
    return host


def test_bootstrap_of_a_proportion():
    values = torch.tensor([1.0] * 80 + [0.0] * 20)
    low, high = bootstrap(values)
    # normal approximation: 0.8 +- 1.96 * sqrt(0.8 * 0.2 / 100)
    assert low == pytest.approx(0.8 - 0.0784, abs=0.02)
    assert high == pytest.approx(0.8 + 0.0784, abs=0.02)
    assert bootstrap(values) == (low, high)
    assert bootstrap(torch.ones(5)) == (1.0, 1.0)


def test_variants_compute_equally_many_pairs(host):
    labels = random_labels(3, torch.Generator().manual_seed(0))
    outcomes = compare(host, labels, SPARSE, batch=2, stats_every=2, quiet=True)
    assert list(outcomes) == list(VARIANTS)
    for name, outcome in outcomes.items():
        assert outcome.clips.shape == (3, 3, 4, 16, 16)
        assert outcome.density == pytest.approx(1.0 if name == "dense" else 0.5), name
        assert outcome.seconds > 0
    assert outcomes["dense"].psnr.tolist() == [100.0] * 3
    assert outcomes["dense"].recall == 1.0
    assert outcomes["psa"].recall == 1.0  # one block whole, one by halves, two by quarters
    for name in ("asa", "window", "random"):
        assert 0.4 < outcomes[name].recall < 1
        assert outcomes[name].psnr.max() < 100
    # one of four blocks fewer, for the 16 pooled tokens
    assert outcomes["asa_g"].recall < outcomes["asa"].recall
    assert outcomes["asa"].recall > outcomes["random"].recall
    again = compare(host, labels, SPARSE, batch=3, stats_every=2, quiet=True)
    for name in VARIANTS:
        torch.testing.assert_close(again[name].clips, outcomes[name].clips, atol=1e-4, rtol=0)


def test_the_host_is_left_as_it_was(host):
    before = [type(block.attn1.processor) for block in host.transformer.blocks]
    compare(host, random_labels(1), SPARSE, quiet=True)
    assert [type(block.attn1.processor) for block in host.transformer.blocks] == before


def test_full_density_is_dense(host):
    everything = Comparison(block=16, density=1.0, pool=1_000_000, samples=4)
    outcomes = compare(host, random_labels(2), everything, quiet=True)
    for name in ("asa", "psa", "window", "random"):
        assert outcomes[name].psnr.min() > 80
        assert outcomes[name].recall == pytest.approx(1.0)


def test_dense_steps_count(host):
    some = Comparison(block=16, density=0.5, pool=4, samples=4, dense_steps=1)
    labels = random_labels(1)
    outcome = compare(host, labels, some, stats_every=2, quiet=True)["asa"]
    assert outcome.density == pytest.approx(1 / 3 + 2 / 3 * 0.5)
    # one sparse step: it is measured, so that there is none to time
    outcome = compare(host, labels, replace(some, dense_steps=2), quiet=True)["asa"]
    assert outcome.density == pytest.approx(2 / 3 + 1 / 3 * 0.5)
    assert outcome.recall < 1
    assert outcome.seconds is None


def test_one_step_is_measured_and_not_timed(host, tmp_path):
    outcomes = compare(host, random_labels(2), replace(SPARSE, steps=1), quiet=True)
    for name in ("asa", "asa_g", "psa", "window", "random"):
        assert outcomes[name].density == pytest.approx(0.5), name
        assert 0 < outcomes[name].recall < 1 or name == "psa", name
        assert outcomes[name].seconds is None, name
    assert (outcomes["dense"].density, outcomes["dense"].recall) == (1.0, 1.0)
    assert outcomes["dense"].seconds > 0
    with Run.start(package="hone-blade", verb="eval", out=tmp_path / "run") as run:
        write_rows(run, outcomes)
    assert {row.variant for row in run.rows if row.metric == "seconds"} == {"dense"}
    assert "-  " in next(line for line in str(EvalReport.of(run)).splitlines() if "(ASA)" in line)


def test_time_of_measured_steps_is_that_of_other_sparse_ones(host):
    sampler = _Sampler(host, None, 3, 2, lambda: None)
    sampler.steps, sampler.sparse_from, sampler.measured, sampler.batches = 4, 1, {1}, 2
    sampler.evaluations = [1, 2, 1, 1]
    sampler.timings = {False: [(1.0, 1)] * 2, True: [(3.0, 1)] * 4}
    # two batches of one dense evaluation at 1 s, and of four sparse ones at 3 s, of which two were measured
    assert sampler.seconds() == pytest.approx(2 * (1 + 4 * 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0. Leave it out"),
        ({"steps": -2}, "steps must be at least 1; got -2"),
        ({"pool": 0}, "pool must be at least 1, .* got 0. Take a larger one"),
        ({"dense_steps": -1}, r"dense_steps must lie in \[0, steps = 1\).* got -1"),
        ({"dense_steps": 3, "steps": 3}, r"dense_steps must lie in \[0, steps = 3\).* got 3. Take fewer"),
    ],
)
def test_comparisons_without_a_sparse_step_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Comparison(**changes)


def test_the_hosts_own_steps_count_too(host):
    host = replace(host, transformer=None)
    with pytest.raises(ValueError, match=r"dense_steps must lie in \[0, steps = 3\)"):
        compare(host, random_labels(1), replace(SPARSE, dense_steps=3), quiet=True)


@pytest.mark.parametrize("density", [0.07, 0.1, 0.125, 0.2, 0.25, 0.29, 0.5, 0.77, 1.0])
@pytest.mark.parametrize(("block", "pool", "tokens"), [(32, 16, 1024), (32, 30, 1024), (16, 60, 1000)])
def test_equal_density_at_every_density(density, block, pool, tokens):
    """Blocks that each variant keeps, and pooled keys, counted in keys: never more than asked, at most a block less."""
    comparison = Comparison(density=density, block=block, pool=pool, samples=4)
    try:
        configs = comparison.configs(tokens)
    except ValueError:
        # what ASA keeps has no room for one block and the pooled keys
        assert int(density * -(-tokens // block)) * block < block + -(-tokens // pool)
        return
    blocks = -(-tokens // block)
    keys = {name: block * cfg.keep_bounds(blocks)[1] for name, cfg in configs.items() if cfg is not None}
    keys["asa_g"] += -(-tokens // pool)
    assert keys["asa"] == keys["window"] == keys["random"] <= density * blocks * block + 1e-6
    assert keys["asa"] - block < keys["asa_g"] <= keys["asa"]


def test_a_density_below_a_block_and_the_pooled_keys_is_refused(host):
    host = replace(host, transformer=None)
    # 4 blocks; 16 pooled keys are one
    with pytest.raises(ValueError, match=r"density 0.4 on 64 tokens: that is 1 of 4 blocks of 16, .* at least 0.5"):
        compare(host, random_labels(1), replace(SPARSE, density=0.4), quiet=True)


def test_the_density_reached_is_logged(host, caplog):
    with caplog.at_level("INFO", logger="hone_blade.evaluate"):
        compare(host, random_labels(1), replace(SPARSE, density=0.7), quiet=True)
    assert "asa_g: density 0.5000, asked for 0.7000" in caplog.text


def test_attention_gflop_by_hand(host):
    # 4 * 64^2 tokens * 64 channels * 2 layers * 3 steps
    dense = 4 * 64**2 * 64 * 2 * 3 / 1e9
    assert attention_gflop(host, None, density=1.0, evaluations=[1, 1, 1]) == pytest.approx(dense)
    configs = SPARSE.configs(64)
    assert attention_gflop(host, configs["random"], density=0.5, evaluations=[1, 1, 1]) == pytest.approx(dense / 2)
    # a guided step counts twice
    assert attention_gflop(host, None, density=1.0, evaluations=[2, 1]) == pytest.approx(dense)
    # 4 blocks of 4 samples: 16^2 logits
    prober = 2 * 16**2 * 64 * 2 * 3 / 1e9
    assert attention_gflop(host, configs["asa"], density=0.5, evaluations=[1, 1, 1]) == pytest.approx(
        dense / 2 + prober
    )


def test_eval_writes_a_row_per_variant_and_metric(host, tmp_path):
    save_host(host, tmp_path / "host.safetensors")
    cfg = EvalConfig(comparison=SPARSE, prompts=3, batch=2, stats_every=2, host=tmp_path / "host.safetensors")
    with Run.start(
        package="hone-blade", verb="eval", config=cfg, out=tmp_path / "run", device="cpu", quiet=True
    ) as run:
        report = evaluate(cfg, run)
    rows = {(row["variant"], row["metric"]): row for row in load_results(run.path)["rows"]}
    for variant in VARIANTS:
        for metric in ("psnr", "ssim", "recall", "density", "accuracy", "seconds", "attention_gflop"):
            assert (variant, metric) in rows, (variant, metric)
        row = rows[variant, "ssim"]
        assert row["n"] == 3
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
        assert report.variants[variant]["ssim"] == row["value"]
    assert EvalReport.of(run) == report
    assert report.clips == 3
    assert (run.figures / "accuracy.png").stat().st_size > 1000
    assert "random blocks" in str(report)
    assert "results.json" in str(report)


def test_table_shows_what_it_is_given():
    row = {"psnr": 21.25, "ssim": 0.75, "recall": 0.5, "density": 0.25, "seconds": 1.5, "attention_gflop": 12.0}
    row |= {f"{name}accuracy{end}": 0.5 for name in ("", "digit_", "direction_") for end in ("", "_low", "_high")}
    table = comparison_table({"dense": row, "asa": row}, 4, intervals=True)
    dense, asa = (next(line for line in table.splitlines() if name in line) for name in ("dense att", "(ASA)"))
    assert "21.2" not in dense
    assert "21.2" in asa
    assert "0.750" in asa
    assert "50% (50% to 50%)" in asa
    assert "pooled keys are in the density and not in here" in table
    assert "always names one of the ten digits" in table


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"density must lie in \(1 / pool, 1\]"):
        Comparison(density=0.05)
    with pytest.raises(ValueError, match="stats_every at least 2"):
        EvalConfig(stats_every=1)
