import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hone_splat.captures import fit_range, load_views, read_colmap
from hone_splat.chunks import ChunkSet, read_evaluation_index
from hone_zpressor.config import ConvertConfig
from hone_zpressor.conversion import ConvertReport, convert, evaluation_views
from hone_zpressor.inputs import find_converted
from PIL import Image

spec = importlib.util.spec_from_file_location(
    "capturefiles", Path(__file__).parents[2] / "shared" / "splat" / "capturefiles.py"
)
capturefiles = importlib.util.module_from_spec(spec)
spec.loader.exec_module(capturefiles)


def test_views_of_an_evaluation_by_hand():
    poses = torch.eye(4).repeat(12, 1, 1)
    poses[:, 0, 3] = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 100])
    # Of the first 11 on a line: one end (the first of equals), the other, the middle.
    given, asked = evaluation_views(poses, 3, 3, 11)
    assert given == [0, 5, 10]
    # Eight are left, in parts of two: the first of each of three.
    assert asked == [1, 3, 6]
    with pytest.raises(ValueError, match="at least 13 views; got 12"):
        evaluation_views(poses, 10, 3, 50)


def test_photographs_become_chunks_that_give_the_same_views(tmp_path, start):
    first = capturefiles.write_colmap(tmp_path / "one", binary=True, views=8)
    second = capturefiles.write_colmap(tmp_path / "two", binary=False, views=8, seed=5)
    cfg = find_converted(ConvertConfig(captures=(first, second), model="tiny", context=4, targets=2))
    with start(cfg, "convert") as run:
        report = convert(cfg, run)
    index = read_evaluation_index(report.index)
    chunks = ChunkSet(report.chunks)
    assert list(index) == list(chunks.index) == ["one", "two"]
    for name, folder in (("one", first), ("two", second)):
        capture = read_colmap(folder)
        scene = fit_range(capture, 0.4, 12.0)
        given, asked = index[name]
        assert len(given) == 4
        assert len(asked) == 2
        want = load_views(capture.take(given), (32, 32), scene)
        found = chunks.scene(name).views(given, (32, 32), scene.near, scene.far)
        assert torch.equal(found.image_01, want.image_01)
        assert torch.allclose(found.cam_to_world, want.cam_to_world, atol=1e-5)
        assert torch.allclose(found.intrinsics_norm, want.intrinsics_norm, atol=1e-6)
    rows = {(row.variant, row.metric): row.value for row in report.rows}
    assert rows["one", "views"] == 8
    assert str(ConvertReport.of(run)) == str(report)


def test_a_scale_that_is_guessed_is_said_before_work(tmp_path, caplog):
    folders = [capturefiles.write_colmap(tmp_path / name, binary=False, views=8) for name in ("one", "two")]
    cfg = ConvertConfig(captures=tuple(folders), model="tiny", context=4, targets=2)
    find_converted(cfg)
    assert not caplog.records
    (folders[1] / "sparse/0/points3D.txt").unlink()
    find_converted(cfg)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "two has no sparse points: its scale is guessed" in caplog.text


def test_scenes_that_do_not_go_are_named(tmp_path):
    folder = capturefiles.write_colmap(tmp_path / "one", binary=True, views=8)
    with pytest.raises(ValueError, match="name folders of COLMAP models"):
        find_converted(ConvertConfig())
    with pytest.raises(ValueError, match="one: expected at least 20 views; got 8"):
        find_converted(ConvertConfig(captures=(folder,)))
    with pytest.raises(ValueError, match="two scenes have one name"):
        find_converted(ConvertConfig(captures=(folder, folder), context=4, targets=2))
    Image.fromarray(np.full((48, 64), 40_000, np.uint16)).save(folder / "images" / "002.png")
    with pytest.raises(ValueError, match=r"002\.png has more than 8 bits a value"):
        find_converted(ConvertConfig(captures=(folder,), context=4, targets=2))
    (folder / "images").rename(folder / "input")
    with pytest.raises(FileNotFoundError, match=r"one/images or .* was sought\. .*one holds input/, sparse/\."):
        find_converted(ConvertConfig(captures=(folder,)))
