import dataclasses
from pathlib import Path

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_splat.chunks import ChunkScene, write_chunks
from hone_splat.rooms import Rooms
from hone_zpressor import finetune
from hone_zpressor.config import TrainConfig
from hone_zpressor.models import tiny
from safetensors.torch import load_file


@pytest.fixture
def cfg(tmp_path, small, monkeypatch):
    views, _ = Rooms.draw([0]).views(torch.arange(12)[None], 32)
    parts = (part[0] for part in (views.image_01, views.cam_to_world, views.intrinsics_norm))
    write_chunks([ChunkScene.of("room", *parts)], tmp_path / "chunks")
    monkeypatch.setattr(finetune, "tiny", lambda *, seed: tiny(small, seed=seed))
    return TrainConfig(
        chunks=tmp_path / "chunks", lpips=0.0, size=(32, 32), context=(6, 6), targets=2, gap=(8, 11), steps=2,
        log_every=1, model="tiny", zpressor=small.zpressor, information=1.0,
    )  # fmt: skip


def test_host_and_compressor_learn(cfg, start):
    cfg = finetune.prepare(cfg)
    with start(cfg, "train") as run:
        report = finetune.train(cfg, run)
    before, after = finetune._host(cfg).state_dict(), load_file(report.weights)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("zipmatch.cross_attn_layers" in name for name in moved)
    assert any("zipmatch" not in name for name in moved)
    assert (run.path / "metrics.jsonl").read_text().count('"information"') == 2
    assert str(report).startswith(f"weights  {report.weights}")


def test_what_is_missing_is_named(cfg, tmp_path):
    for changes, message in (
        ({"model": "other"}, "no host 'other'"),
        ({"context": (2, 6)}, "no fewer than anchors"),
        ({"information": -1.0}, "information must be at least 0"),
        ({"start": Path("x")}, "leave --start out"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(cfg, **changes)
    with pytest.raises(CheckpointError, match="no weights at"):
        finetune.prepare(dataclasses.replace(cfg, model="mvsplat", start=tmp_path / "absent"))
    with pytest.raises(FileNotFoundError):
        finetune.prepare(dataclasses.replace(cfg, chunks=tmp_path))
