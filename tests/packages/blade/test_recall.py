"""What masks keep of dense attention's mass: by brute force, and the claim on a tiny untrained host."""

from dataclasses import replace

import pytest
import torch
from hone_blade.config import BladeConfig, Comparison, ReproduceConfig, StudentsConfig
from hone_blade.method import mass_recall, sparse_layout
from hone_blade.models import attach
from hone_blade.recall import ORACLE, SHUFFLED, Setting, block_mass, dense_queries, recalls, settings
from hone_blade.reproduce import ReproduceReport, reproduce
from hone_core.runs import Run
from hone_video.clips import random_labels
from hone_video.host import Host, save_host
from hone_video.host_config import HostConfig
from hone_video.orders import token_order

TINY = HostConfig(
    frames=4, height=16, width=16, layers=2, heads=1, head_dim=32, ffn_dim=32, text_dim=16, steps=3, solver="euler",
    guidance=2.0, guidance_interval=(0.0, 1.0),
)  # fmt: skip
COMPARISON = Comparison(block=16, density=0.5, pool=4, samples=4)


@pytest.fixture(scope="module")
def host():
    return Host.untrained(TINY)


@pytest.fixture(scope="module")
def queries():
    made = torch.Generator().manual_seed(0)
    return [2 * torch.randn(2, 1, 64, 32, generator=made) for _ in range(2)]


def test_mass_of_blocks_by_brute_force(queries):
    q, k = queries
    found = block_mass(q, k, 16)
    weights = torch.softmax(q[1, 0].double() @ k[1, 0].double().T / 32**0.5, -1)
    for i in range(4):
        for j in range(4):
            expected = weights[16 * i : 16 * i + 16, 16 * j : 16 * j + 16].sum() / 16
            assert found[1, 0, i, j].item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="block must divide the 64 tokens"):
        block_mass(q, k, 48)


def test_a_setting_is_the_recall_of_its_layout(host, queries):
    """Each mask in its order, against the log-sum-exp of the method's own ``mass_recall``."""
    q, k = queries
    cfg = BladeConfig(block=16, max_density=0.5, samples=4, selection="topk", min_density=0.0)
    points = [Setting("density", "paper", cfg, order) for order in ("gilbert", "raster")]
    points.append(Setting("density", "window", replace(cfg, mask="window"), "gilbert"))
    found = {(point.mask, point.order): value for point, value in recalls(q, k, 1, points, host, seed=0)}
    for point in points:
        at = token_order(point.order, 4, 4, 4)
        own = q[:, :, at], k[:, :, at]
        layout = sparse_layout(*own, cfg=point.config, layer=1, grid=(4, 4, 4))
        torch.testing.assert_close(found[point.mask, point.order], mass_recall(*own, layout)[:, 0])


def test_no_mask_of_the_same_size_keeps_more_than_the_oracle(host, queries):
    q, k = queries
    points = settings(ReproduceConfig(students=StudentsConfig(comparison=COMPARISON)), 64, 0)
    found = {(p.panel, p.mask, p.config.max_density, p.order): v for p, v in recalls(q, k, 0, points, host, seed=0)}
    bounds = {key: value for key, value in found.items() if key[1] == ORACLE}
    for (panel, mask, density, order), value in found.items():
        if panel != "samples":
            assert (value <= bounds[panel, ORACLE, density, order] + 1e-6).all(), mask
    mass = block_mass(q[:, :, token_order("gilbert", 4, 4, 4)], k[:, :, token_order("gilbert", 4, 4, 4)], 16)
    best = mass.sort(-1, descending=True).values[..., :2].sum(-1).mean((1, 2))
    torch.testing.assert_close(bounds["density", ORACLE, 0.5, "gilbert"], best)


def test_queries_are_those_that_attention_gets(host):
    """Of the conditional half, at the moments asked for; a mask by them is the one that an attached model uses."""
    labels = random_labels(2, torch.Generator().manual_seed(0))
    rows = list(dense_queries(host, labels, seed=3))
    assert [layer for layer, _, _ in rows] == [0, 1] * 3
    assert all(q.shape == k.shape == (2, 1, 64, 32) for _, q, k in rows)
    cfg = BladeConfig(block=16, max_density=0.5, samples=4, selection="topk", order="raster")
    with attach(host.transformer, cfg) as handle, handle.record(recall=True) as stats:
        host.sample(host.encode_labels(labels), host.noise(2, 3))
    # The first layer of the first step sees the same input, sparse or not.
    first = next(row.stats for row in stats if (row.step, row.layer) == (0, 0))
    _, q, k = rows[0]
    points = [Setting("density", "paper", cfg, "raster")]
    ((_, found),) = recalls(q, k, 0, points, host, seed=0)
    torch.testing.assert_close(found, first.recall[:2, 0])


def test_the_claim_goes_on_and_draws_its_panels(host, tmp_path, monkeypatch):
    import hone_blade.recall as module

    real, calls = module._batch, []

    def batch(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_batch", batch)
    file = save_host(host, tmp_path / "host.safetensors")
    cfg = ReproduceConfig(
        claim="recall", students=StudentsConfig(comparison=COMPARISON), prompts=2, seeds=2, batch=2, host=file
    )

    def start():
        with Run.start(package="hone-blade", verb="reproduce", config=cfg, out=tmp_path / "run") as run:
            run.device, run.quiet = "cpu", True
            return reproduce(cfg, run)

    with pytest.raises(KeyboardInterrupt):
        start()
    report = start()
    assert len(calls) == 3
    points = settings(cfg, 64, 0)
    assert len(report.rows) == len(points) == len({point.key for point in points})
    assert {row.n for row in report.rows} == {4}
    assert {row.labels["order"] for row in report.rows if row.split == "order"} == {
        "gilbert", "morton", "tile", "raster", SHUFFLED,
    }  # fmt: skip
    assert "the score that keeps most" in str(report)
    for ending in ("png", "svg"):
        assert (report.path / "figures" / f"recall.{ending}").stat().st_size > 5000
    assert isinstance(report, ReproduceReport)
