import json

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_splat.chunks import ChunkScene, write_chunks
from hone_splat.metrics import psnr
from hone_splat.rendering import render
from hone_zpressor import evaluate as module
from hone_zpressor.config import EvalConfig
from hone_zpressor.data import graded_rooms
from hone_zpressor.evaluate import evaluate
from hone_zpressor.grading import with_settings
from hone_zpressor.host import load_host
from hone_zpressor.inputs import find_evaluated


@pytest.fixture
def chunks(tmp_path):
    context = graded_rooms([0, 1], 8, 1, 32).context
    parts = zip(context.image_01, context.cam_to_world, context.intrinsics_norm, strict=True)
    write_chunks((ChunkScene.of(f"room{i}", *part) for i, part in enumerate(parts)), tmp_path / "test")
    entry = {"context": [0, 2, 3, 5, 7], "target": [1, 4]}
    (tmp_path / "index.json").write_text(json.dumps({"room0": entry, "room1": entry, "absent": entry}))
    return tmp_path


def test_scenes_are_graded_once_and_as_by_hand(chunks, stored, start, monkeypatch, caplog):
    cfg = EvalConfig(
        chunks=chunks / "test", index=chunks / "index.json", model="tiny", checkpoint=stored(), anchors=2, size=(32, 32)
    )
    find_evaluated(cfg)
    assert "1 of the 3 scenes of" in caplog.text
    assert "will not be graded, such as absent" in caplog.text
    real, calls = module.render, []

    def count(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the machine went away")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "render", count)
    with pytest.raises(RuntimeError, match="went away"), start(cfg, "eval") as run:
        evaluate(cfg, run)
    with start(cfg, "eval") as run:
        report = evaluate(cfg, run)
    assert len(calls) == 3
    found = {row.metric: row for row in report.rows}
    assert found["psnr"].n == 2
    assert found["gaussians"].value == 2 * 32 * 32
    scenes = json.loads((run.artifacts / "scenes.json").read_text("utf-8"))
    low, high = sorted(scene["psnr"] for scene in scenes.values())
    assert found["psnr"].spread == pytest.approx((high - low) / 2**0.5)  # over n - 1
    assert found["psnr"].interval == pytest.approx((low, high))
    context = graded_rooms([0, 1], 8, 1, 32).context
    tiny = with_settings(load_host("zpressor", path=cfg.checkpoint), anchors=2)
    given, asked = (context.take(torch.tensor([rows, rows])) for rows in ([0, 2, 3, 5, 7], [1, 4]))
    with torch.inference_mode():
        drawn = render(tiny.host(given).gaussians, asked.cam_to_world, asked.intrinsics_norm, (32, 32), near=0.08)
    by_hand = psnr(drawn.image_01.flatten(0, 1), asked.image_01.flatten(0, 1)).mean()
    assert found["psnr"].value == pytest.approx(float(by_hand), abs=0.02)  # chunks hold 8 bits


def test_lpips_is_graded_where_there_are_weights(chunks, stored, start, monkeypatch, tmp_path):
    class Twice(torch.nn.Module):
        def forward(self, drawn, true):
            assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1
            return 2 * (drawn - true).abs().mean((1, 2, 3))

    monkeypatch.setattr(module.Lpips, "load", classmethod(lambda cls, path: Twice()))
    cfg = EvalConfig(
        chunks=chunks / "test", index=chunks / "index.json", model="tiny", checkpoint=stored(), anchors=3,
        size=(32, 32), scenes=1, vgg=tmp_path / "vgg.pth",
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="no weights of VGG-16"):
        find_evaluated(cfg)
    with start(cfg, "eval") as run:
        (row,) = [row for row in evaluate(cfg, run).rows if row.metric == "lpips"]
    assert row.better == "lower"
    assert 0 < row.value < 2


def test_what_is_missing_is_named(chunks, tmp_path):
    with pytest.raises(ValueError, match="--chunks DIR --index FILE"):
        find_evaluated(EvalConfig())
    (chunks / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="no scene of"):
        find_evaluated(EvalConfig(chunks=chunks / "test", index=chunks / "index.json", model="tiny"))
    with pytest.raises(ValueError, match="no host 'other'"):
        EvalConfig(model="other")
