import pytest
import torch
from hone_core.errors import CheckpointError
from hone_splat.files import read_ply
from hone_zpressor.config import DemoConfig
from hone_zpressor.data import graded_rooms
from hone_zpressor.demo import demo, typical
from hone_zpressor.grading import draw_targets, grade, with_settings
from hone_zpressor.host import load_host
from hone_zpressor.inputs import find_host


def test_a_demo_leaves_pictures_a_cloud_and_a_flight(stored, start):
    cfg = find_host(DemoConfig(host=stored(), views=5, anchors=2, rooms=2, targets=1, frames=2))
    with start(cfg) as run:
        report = demo(cfg, run)
    text = str(report)
    assert "host alone, 5 views" in text
    assert "ZPressor, 5 to 2" in text
    counts = {row.variant.split(",")[0]: row.value for row in run.rows if row.metric == "gaussians"}
    assert counts == {"host alone": 5 * 1024, "anchors alone": 2 * 1024, "ZPressor": 2 * 1024}
    assert len(read_ply(report.splat)) == 2 * 1024
    assert report.video.stat().st_size > 300
    assert report.sheet.is_file()


def test_the_room_that_is_shown_is_neither_the_best_nor_the_worst():
    assert typical(torch.tensor([3.0, -1.0, 2.0, 9.0, 0.5])) == 2
    assert typical(torch.tensor([3.0, -1.0])) == 1
    assert typical(torch.tensor([3.0])) == 0


def test_grades_are_of_each_room(stored):
    tiny = load_host("zpressor", path=stored())
    scenes = [graded_rooms([seed], 6, 2, 32) for seed in (0, 1)]
    both = grade(tiny, [graded_rooms([0, 1], 6, 2, 32)])
    apart = grade(tiny, scenes)
    assert torch.allclose(both.psnr, apart.psnr, atol=1e-3)
    picture, count = draw_targets(with_settings(tiny, anchors=2), scenes[0])
    assert count == 2 * 1024
    error = (picture.image_01[0].clamp(0, 1) - scenes[0].targets.image_01[0]).square().flatten(1).mean(1)
    found = grade(tiny, scenes[:1]).psnr
    assert torch.allclose(found, (-10 * error.log10()).mean()[None], atol=1e-4)


def test_a_missing_host_is_named_before_the_work(tmp_path):
    with pytest.raises(CheckpointError, match="train-host"):
        find_host(DemoConfig(host=tmp_path / "host.safetensors"))
