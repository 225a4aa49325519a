import importlib.util
import sys
from pathlib import Path

import hone_zpressor.photographs as photographs
import pytest
import torch
from hone_core.errors import CheckpointError
from hone_splat.files import read_ply, read_splat
from hone_zpressor.config import DoctorConfig, RenderConfig
from hone_zpressor.inputs import find_photographs
from hone_zpressor.photographs import doctor, render_capture

spec = importlib.util.spec_from_file_location(
    "capturefiles", Path(__file__).parents[2] / "shared" / "splat" / "capturefiles.py"
)
capturefiles = importlib.util.module_from_spec(spec)
spec.loader.exec_module(capturefiles)


@pytest.fixture
def folder(tmp_path):
    return capturefiles.write_colmap(tmp_path / "scene", binary=True, views=8)


def test_doctor_measures_a_room(folder, start):
    cfg = find_photographs(DoctorConfig(colmap=folder, model="tiny", views=6, anchors=3))
    with start(cfg, "doctor") as run:
        report = doctor(cfg, run)
    found = {row.metric: row.value for row in report.rows}
    _, _, inner, _ = capturefiles.room(views=8)
    assert found["photographs"] == 8
    assert found["context_views"] == 6
    # 64 x 48 cut to a square: the height counts for both.
    wide = 2 * torch.rad2deg(torch.atan(24 / inner[0, 0])).item()
    assert found["field_of_view_horizontal"] == pytest.approx(wide)
    assert found["scale_to_the_host"] * found["depth_5th_percentile"] == pytest.approx(0.6)
    assert 0 < found["least_overlap"] <= found["overlap_with_best_neighbour"] <= 1
    assert any(text.startswith("field of view: ") for text in report.warnings) == (wide < 55)
    assert str(photographs.DoctorReport.of(run)) == str(report)


def test_depths_that_are_guessed_are_said_before_work(folder, stored, caplog):
    cfg = RenderConfig(colmap=folder, model="tiny", checkpoint=stored(), views=6, anchors=3)
    find_photographs(cfg)
    assert not caplog.records
    next(folder.rglob("points3D.bin")).unlink()
    find_photographs(cfg)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a guess, give near and far instead" in caplog.text


def test_doctor_names_what_is_outside(folder, start):
    cfg = DoctorConfig(colmap=folder, model="tiny", views=9, anchors=9, near=0.001, far=1.0)
    with start(cfg, "doctor") as run:
        warnings = doctor(cfg, run).warnings
    assert any("beyond the 12" in text for text in warnings)
    assert any("8 photographs for 9 anchors" in text for text in warnings)
    assert any(text.startswith("baselines:") for text in warnings)


def test_a_folder_becomes_a_splat_and_a_flight_and_goes_on_where_it_broke_off(
    folder, start, stored, tmp_path, monkeypatch
):
    cfg = RenderConfig(
        colmap=folder, model="tiny", checkpoint=stored(), views=6, anchors=3, size=(32, 32), frames=12, prune=0.5,
        splat=tmp_path / "own.splat", video=tmp_path / "own.mp4",
    )  # fmt: skip
    find_photographs(cfg)
    capture, fitted = photographs.read_capture(cfg)
    given = photographs.load_views(capture.take(photographs.contexts(capture, 6)), (32, 32), fitted)
    with torch.inference_mode():
        made = photographs.load_model(cfg)(given).gaussians[0].pruned(opacity=0.5)
    calls, nears, real = [], set(), photographs.render

    def count(*args, **kwargs):
        calls.append(args[1].shape[1])
        nears.add(kwargs["near"])
        if len(calls) == 2:
            raise RuntimeError("the machine went away")
        return real(*args, **kwargs)

    monkeypatch.setattr(photographs, "render", count)
    with pytest.raises(RuntimeError, match="went away"), start(cfg, "render") as run:
        render_capture(cfg, run)
    monkeypatch.setattr(photographs, "load_model", lambda *_: pytest.fail("the splat was there already"))
    with start(cfg, "render") as run:
        assert run.resumed
        report = render_capture(cfg, run)
    assert calls == [8, 4, 4]
    assert not (run.artifacts / "frames").exists()
    cloud = read_ply(report.splat)
    assert 0 < len(cloud) < 3 * 32 * 32
    assert float(cloud.opacities.min()) > 0.499
    assert len(read_splat(tmp_path / "own.splat")) == len(cloud)
    assert (tmp_path / "own.mp4").read_bytes() == report.video.read_bytes()
    # In the capture's units, in which every Gaussian lies within the depth range that was looked for.
    scale = next(row.value for row in report.rows if row.metric == "scale_to_the_host")
    assert abs(scale - 1) > 0.05
    assert torch.allclose(cloud.means * scale, made.means, rtol=1e-4, atol=1e-4)
    assert torch.allclose(cloud.scales * scale, made.scales, rtol=1e-4, atol=1e-6)
    assert [*nears] == [pytest.approx(0.2 * 0.4 / scale)]
    centres = capturefiles.room(views=8)[1][:, :3, 3].float()
    assert float(torch.cdist(cloud.means, centres).amin(1).max()) <= 12.0 / scale


def test_a_splat_of_nothing_is_no_splat(folder, start, stored):
    cfg = RenderConfig(
        colmap=folder, model="tiny", checkpoint=stored(), views=4, anchors=2, size=(32, 32), frames=2, prune=0.9999999
    )
    with (
        pytest.raises(ValueError, match=r"none of 2048 Gaussians has an opacity of 1; lower --prune"),
        start(cfg, "render") as run,
    ):
        render_capture(cfg, run)
    assert not (run.artifacts / "scene.ply").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"colmap": Path("a"), "transforms": Path("b")}, "one of colmap and transforms"),
        ({"colmap": Path("a"), "near": 1.0}, "near and far are given together"),
        ({"colmap": Path("a"), "model": "other"}, "no host 'other'"),
        ({"colmap": Path("a"), "model": "tiny", "splat": Path("a.obj")}, "ending in .ply, .splat or .spz"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RenderConfig(**settings)


def test_bad_input_is_named_before_a_folder_is_made(folder, capsys, monkeypatch, tmp_path):
    from hone_zpressor import cli

    (folder / "images" / "003.png").unlink()
    monkeypatch.setattr(
        sys, "argv", ["hone-zpressor", "doctor", "--colmap", str(folder), "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code != 0
    assert "003.png is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"name your photographs by one of .*; got neither"):
        find_photographs(RenderConfig())
    with pytest.raises(ValueError, match=r"got images .*images alone, .* by colmap automatic_reconstructor or"):
        find_photographs(DoctorConfig(images=folder / "images"))
    with pytest.raises(FileNotFoundError, match=r"8 pictures in .*, which is no folder: 000.png and 7 more"):
        find_photographs(DoctorConfig(colmap=folder, images=tmp_path / "none"))
    with pytest.raises(CheckpointError, match="weights of mvsplat are not packaged, and none was named"):
        find_photographs(RenderConfig(colmap=folder))
    with pytest.raises(CheckpointError):
        find_photographs(RenderConfig(colmap=folder, model="tiny", checkpoint=tmp_path / "none.safetensors"))


def test_a_budget_chooses_the_anchors(folder, start, stored, monkeypatch):
    settings = dict(colmap=folder, model="tiny", checkpoint=stored(), views=6, anchors=3, size=(32, 32), frames=2)
    cfg = RenderConfig(**settings, budget_seconds=1e6, prune=0.0)
    with monkeypatch.context() as broken:
        broken.setattr(photographs, "render", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError), start(cfg, "render") as run:
            render_capture(cfg, run)
    with start(cfg, "render") as run:
        report = render_capture(cfg, run)
    rows = {row.metric: row.value for row in report.rows}
    assert rows["anchors"] == 6
    assert rows["gaussians"] == 6 * 32 * 32
    assert "gaussians                                6144\n" in str(report)
    small = RenderConfig(**settings, budget_seconds=1e-9)
    with pytest.raises(ValueError, match="is too small: a forward with 2 anchors takes"), start(small, "less") as run:
        render_capture(small, run)
    with pytest.raises(ValueError, match="the arm host has none"):
        RenderConfig(**settings, budget_gib=1.0, arm="host")
