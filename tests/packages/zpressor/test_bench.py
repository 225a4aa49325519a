import hone_zpressor.bench as bench_module
import pytest
import torch
from hone_core.testing import requires_gpu
from hone_splat.published import build_published
from hone_zpressor.anchors import cluster_views, farthest_points
from hone_zpressor.bench import (
    PARTS,
    _captured,
    _compressors,
    _folding,
    _forward,
    _time_parts,
    _views,
    bench,
    fuse_by_loop,
)
from hone_zpressor.config import BenchConfig
from hone_zpressor.method import ZPressor


def test_the_loop_is_the_same_module():
    torch.manual_seed(0)
    module = ZPressor(16, 2)
    features, centres = torch.randn(2, 9, 16, 2, 3), torch.randn(2, 9, 3)
    clusters = cluster_views(centres, farthest_points(centres, 4))
    with torch.no_grad():
        together, looped = module(features, clusters, "float32"), fuse_by_loop(module, features, clusters, "float32")
    assert torch.allclose(together, looped, atol=1e-5)


@torch.no_grad()
def test_one_view_more_gives_what_all_give_however_often():
    torch.manual_seed(0)
    module = ZPressor(16, 2)
    features, centres = torch.randn(1, 9, 16, 2, 3), torch.randn(1, 9, 3)
    clusters = cluster_views(centres, farthest_points(centres, 4))
    call = _folding(module, features[0], centres[0], clusters, "float32")
    for _ in range(3):
        assert torch.allclose(call(), module(features, clusters, "float32")[0], atol=1e-5)


def test_more_views_than_a_path_has_stand_apart():
    views = _views(60, (16, 16), torch.device("cpu"))
    assert views.count == 60
    distance = torch.cdist(views.cam_to_world[0, :, :3, 3], views.cam_to_world[0, :, :3, 3])
    assert float((distance + torch.eye(60)).min()) > 1e-4


def test_each_variant_gets_its_time_and_its_parts(start):
    cfg = BenchConfig(size=(32, 32), views=(6, 12, 14), host_views=12, rounds=1)
    with start(cfg, "bench") as run:
        report = bench(cfg, run)
    times = {(row.variant, row.labels["views"]): row.value for row in run.rows if row.metric == "forward"}
    assert ("host alone", 12) in times
    assert ("host alone", 14) not in times
    names = ("host with ZPressor", "anchors alone", "fusion", "fusion by a loop", "one view folded in")
    assert {(name, 14) for name in names} <= times.keys()
    parts = {(row.variant, row.labels["views"]): [] for row in run.rows if row.metric == "part"}
    for row in run.rows:
        if row.metric == "part":
            parts[row.variant, row.labels["views"]].append(row.split)
    whole = ["features", "fusion", "matching", "cost volume", "depth", "Gaussians"]
    assert parts["host with ZPressor", 14] == whole
    assert parts["host alone", 12] == [name for name in whole if name != "fusion"]
    more = {row.variant: row.value for row in run.rows if row.metric == "view_more"}
    assert more["host with ZPressor"] == (times["host with ZPressor", 14] - times["host with ZPressor", 12]) / 2
    assert "host alone" not in more
    assert "fusion by a loop" in str(report)
    assert "for each view beyond 12" in str(report)


def test_parts_of_depthsplat_are_in_the_order_of_its_forward():
    cfg = BenchConfig(model="depthsplat", rounds=1, views=(6,), anchors=2)
    host = build_published("depthsplat-oct-zpressor-256x448")
    modules = dict(host.named_modules())
    assert all(path in modules or path == "depth_predictor.zipmatch" for _, path, _ in PARTS["depthsplat"])
    views = _views(3, (64, 64), torch.device("cpu"))
    compressor = _compressors(cfg, host, views)["host with ZPressor"]
    with torch.inference_mode():
        found = _time_parts(
            cfg, host, compressor, _forward(host, views, compressor, "reference", "float32"), torch.device("cpu")
        )
    assert list(found) == [name for name, _, _ in PARTS["depthsplat"]]
    assert min(found.values()) > 0


def test_what_does_not_fit_is_said_and_the_rest_is_timed(start, monkeypatch):
    plain = bench_module._forward

    def forward(host, views, compressor, sweep, matmul):
        if compressor is not None:
            return plain(host, views, compressor, sweep, matmul)

        def call():
            raise torch.OutOfMemoryError

        return call

    monkeypatch.setattr(bench_module, "_forward", forward)
    cfg = BenchConfig(size=(32, 32), views=(6,), rounds=1)
    with start(cfg, "bench") as run:
        report = bench(cfg, run)
    assert [row.variant for row in run.rows if row.metric == "out_of_memory"] == ["host alone"]
    timed = {row.variant for row in run.rows if row.metric == "forward"}
    assert "host with ZPressor" in timed
    assert "host alone" not in timed
    assert "does not fit" in str(report)


def test_no_time_is_reported_of_what_differs(start, monkeypatch):
    plain = bench_module._forward

    def forward(host, views, compressor, sweep, matmul):
        call = plain(host, views, compressor, sweep, matmul)
        return (lambda: 1.1 * call()) if matmul == "tf32" else call

    monkeypatch.setattr(bench_module, "_forward", forward)
    cfg = BenchConfig(size=(32, 32), views=(6,), rounds=1, matmuls=("float32", "tf32"))
    with pytest.raises(RuntimeError, match="tf32 is wrong"), start(cfg, "bench") as run:
        bench(cfg, run)
    assert torch.get_float32_matmul_precision() == "highest"


@requires_gpu(min_sm=80)
@torch.inference_mode()
def test_the_fusion_is_captured_and_hears_new_features():
    torch.manual_seed(0)
    module = ZPressor(128, 2).cuda()
    features, centres = torch.randn(1, 14, 128, 8, 14, device="cuda"), torch.randn(1, 14, 3, device="cuda")
    clusters = cluster_views(centres, farthest_points(centres, 6))
    replay = _captured(lambda: module(features, clusters, "bfloat16", "varlen"))
    for _ in range(2):
        want = module(features, clusters, "bfloat16", "varlen")
        assert float((replay() - want).norm() / want.norm()) < 1e-5
        features.copy_(torch.randn(features.shape))
