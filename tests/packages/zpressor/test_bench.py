import torch
from hone_zpressor.bench import _folding, _views, bench, fuse_by_loop
from hone_zpressor.config import BenchConfig
from hone_zpressor.method import ZPressor, cluster_views, farthest_points


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


def test_each_variant_gets_its_time(start):
    cfg = BenchConfig(size=(32, 32), views=(6, 8), host_views=6, rounds=1)
    with start(cfg, "bench") as run:
        report = bench(cfg, run)
    names = {(row.variant, row.labels["views"]) for row in run.rows if row.metric == "forward"}
    assert ("host alone", 6) in names
    assert ("host alone", 8) not in names
    assert {("host with ZPressor", 8), ("anchors alone", 8), ("fusion", 8), ("fusion by a loop", 8)} <= names
    assert {("one view folded in", 6), ("one view folded in", 8)} <= names
    assert "fusion by a loop" in str(report)
