import copy

import pytest
import torch
from hone_core.errors import UnsupportedHardwareError
from hone_core.runs import Run
from hone_core.testing import requires_gpu
from hone_motion_anything.bench import bench, check_passes, check_tokens, eager_loop, eager_refine
from hone_motion_anything.config import BenchConfig
from hone_motion_anything.method import Condition
from hone_motion_anything.published import MaskTransformer, MaskTransformer2D, ResidualTransformer


def start(cfg, out, device="cpu"):
    return Run.start(
        config=cfg, package="hone-motion-anything", verb="bench", out=out, seed=0, device=device, quiet=True,
        command="x",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_times_of_each_way(tmp_path, dtype):
    cfg = BenchConfig(batches=(1, 2), tokens=5, steps=2, rounds=2, dtype=dtype)
    with start(cfg, tmp_path / "run") as run:
        report = bench(cfg, run)
    ways = ["released loop", "one batch", "text encoder", "decoder"]
    assert [(row.variant, row.labels["batch"]) for row in report.rows] == [(way, b) for b in (1, 2) for way in ways]
    assert all(row.value > 0 for row in report.rows)
    lines = str(report).splitlines()
    assert lines[1].endswith("1.00")
    assert len(lines[3].split()) == 4  # a part of the work has no speedup


def test_graphs_need_a_gpu(tmp_path):
    cfg = BenchConfig(graphs=True)
    with (
        pytest.raises(UnsupportedHardwareError, match="CUDA graphs need a CUDA device"),
        start(cfg, tmp_path / "r") as run,
    ):
        bench(cfg, run)


def test_other_tokens_are_no_speedup():
    g = torch.Generator()

    def draws(shift=0):
        return lambda: [torch.randint(9, (50,), generator=g) + shift]

    check_tokens("same", draws(), draws(), g, 3)
    with pytest.raises(RuntimeError, match=r"other: 100\.0% of the tokens"):
        check_tokens("other", draws(1), draws(), g, 3)


@torch.no_grad()
def test_another_model_or_another_sum_is_no_speedup(monkeypatch):
    torch.manual_seed(0)
    exact = MaskTransformer(20, 12, 24, 32, 1, 3).eval()
    half = copy.deepcopy(exact).bfloat16()
    ids, valid = torch.randint(20, (2, 6, 1)), torch.ones(2, 6, dtype=torch.bool)
    condition = Condition(text=torch.randn(2, 512).bfloat16())
    check_passes(half, exact, ids, condition, valid, 4.0)
    half.output_process.poseFinal.bias += 0.5
    with pytest.raises(RuntimeError, match="MaskTransformer in bfloat16 is wrong on cpu"):
        check_passes(half, exact, ids, condition, valid, 4.0)
    monkeypatch.setattr("hone_motion_anything.bench.guided", lambda *args: exact(*args[1:4]))
    with pytest.raises(RuntimeError, match="guidance in one batch is wrong"):
        check_passes(exact, exact, ids, condition, valid, 4.0)


@requires_gpu()
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_published_shapes_on_a_gpu(dtype):
    # 49 time steps of a text are 50 keys; within a time step of MoGenTS there are six.
    for model, parts in ((MaskTransformer(), 1), (MaskTransformer2D(), 6)):
        exact = model.eval().cuda()
        ids = torch.randint(exact.codes, (3, 49, parts), device="cuda")
        valid = torch.ones(3, 49, dtype=torch.bool, device="cuda")
        condition = Condition(text=torch.randn(3, 512, device="cuda").to(dtype))
        check_passes(copy.deepcopy(exact).to(dtype), exact, ids, condition, valid, 4.0)


@requires_gpu()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_generation_is_one_graph(tmp_path, dtype):
    cfg = BenchConfig(graphs=True, batches=(1, 3), tokens=5, steps=3, rounds=2, dtype=dtype)
    with start(cfg, tmp_path / "run", "cuda") as run:
        report = bench(cfg, run)
    assert [row.variant for row in report.rows].count("one graph, fused draws") == 2


@torch.no_grad()
def test_the_released_loop_fills_the_grid():
    torch.manual_seed(0)
    model = MaskTransformer(20, 12, 24, 32, 1, 3).eval()
    valid = torch.arange(6)[None] < torch.tensor([6, 4])[:, None]
    g = torch.Generator().manual_seed(0)
    condition = Condition(text=torch.randn(2, 512))
    found = eager_loop(model, condition, valid, 1, g, 3, 4.0)
    assert (found[valid] < 20).all()
    assert (found[~valid] == 21).all()
    residual = ResidualTransformer(20, 12, 24, 32, 1, 3, levels=3).eval()
    levels = eager_refine(residual, found, condition, valid, g, 5.0)
    assert torch.equal(levels[..., 0][valid], found[valid])
    assert ((levels[valid] >= 0) & (levels[valid] < 20)).all()
    assert (levels[~valid] == -1).all()
