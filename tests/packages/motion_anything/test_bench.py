import pytest
import torch
from hone_core.errors import UnsupportedHardwareError
from hone_core.runs import Run
from hone_motion_anything.bench import bench, eager_loop
from hone_motion_anything.config import BenchConfig
from hone_motion_anything.method import Condition
from hone_motion_anything.published import MaskTransformer


def start(cfg, out):
    return Run.start(
        config=cfg, package="hone-motion-anything", verb="bench", out=out, seed=0, device="cpu", quiet=True, command="x"
    )


def test_times_of_each_way(tmp_path):
    cfg = BenchConfig(batches=(1, 2), tokens=5, steps=2, rounds=2)
    with start(cfg, tmp_path / "run") as run:
        report = bench(cfg, run)
    assert [(row.variant, row.labels["batch"]) for row in report.rows] == [
        ("released loop", 1), ("one batch", 1), ("released loop", 2), ("one batch", 2),
    ]  # fmt: skip
    assert all(row.value > 0 for row in report.rows)


def test_graphs_need_a_gpu(tmp_path):
    cfg = BenchConfig(graphs=True)
    with (
        pytest.raises(UnsupportedHardwareError, match="CUDA graphs need a CUDA device"),
        start(cfg, tmp_path / "r") as run,
    ):
        bench(cfg, run)


@torch.no_grad()
def test_the_released_loop_fills_the_grid():
    torch.manual_seed(0)
    model = MaskTransformer(20, 12, 24, 32, 1, 3).eval()
    valid = torch.arange(6)[None] < torch.tensor([6, 4])[:, None]
    g = torch.Generator().manual_seed(0)
    found = eager_loop(model, Condition(text=torch.randn(2, 512)), valid, 1, g, 3, 4.0)
    assert (found[valid] < 20).all()
    assert (found[~valid] == 21).all()
