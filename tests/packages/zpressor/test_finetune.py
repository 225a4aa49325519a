import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_splat.chunks import ChunkScene, write_chunks
from hone_splat.rooms import Rooms
from hone_zpressor import finetune, inputs, photographs
from hone_zpressor.config import EvalConfig, TrainConfig
from hone_zpressor.host import save_untrained
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


def test_by_itself_it_is_the_released_run():
    cfg = TrainConfig(chunks=Path("chunks"), vgg=Path("vgg"))
    # train.sh, and train_ignore_large_loss 0 of main.yaml: no pixel and no step is left out.
    assert (cfg.steps, cfg.context, cfg.targets, cfg.gap) == (100_000, (12, 12), 8, (20, 50))
    assert cfg.drop_error is cfg.skip_loss is None
    assert (cfg.lpips, cfg.information, cfg.zpressor.anchors) == (0.05, 1e-5, 6)


def test_host_and_compressor_learn(cfg, start):
    cfg = inputs.find_trained(dataclasses.replace(cfg, drop_error=None))
    with start(cfg, "train") as run:
        report = finetune.train(cfg, run)
    before, after = finetune._host(cfg).state_dict(), load_file(report.weights)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("zipmatch.cross_attn_layers" in name for name in moved)
    assert any("zipmatch" not in name for name in moved)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["information"] > 0
        assert line["loss"] == pytest.approx(line["mse"] + line["information"], rel=1e-5)
    assert str(report).startswith(f"weights  {report.weights}")


def test_what_was_trained_is_drawn_by_the_other_verbs(cfg, start, monkeypatch, tmp_path, small):
    cfg = dataclasses.replace(cfg, drop_error=None, zpressor=dataclasses.replace(cfg.zpressor, layers=3))
    with start(cfg, "train") as run:
        report = finetune.train(cfg, run)
    monkeypatch.setattr(photographs, "tiny", lambda: tiny(small))
    (tmp_path / "index.json").write_text(json.dumps({"room": {"context": [0, 3, 6, 9], "target": [1]}}))
    given = EvalConfig(
        chunks=cfg.chunks, index=tmp_path / "index.json", model="tiny", checkpoint=report.weights, anchors=2,
        size=(32, 32),
    )  # fmt: skip
    host = photographs.load_model(inputs.find_evaluated(given))
    stored = load_file(report.weights)
    assert len(host.join.zipmatch.self_attn_layers[0]) == 3
    assert host.join.zipmatch.config.anchors == 2
    assert {name: value.tolist() for name, value in host.state_dict().items()} == {
        name: value.tolist() for name, value in stored.items()
    }
    alone = photographs.load_model(dataclasses.replace(given, arm="host"))
    assert alone.join.zipmatch is None
    monkeypatch.undo()
    # What train-host writes is whole with its sidecar alone.
    untrained = save_untrained(tmp_path / "untrained.safetensors", small)
    untrained.with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks its sidecar untrained\.json"):
        inputs.find_evaluated(dataclasses.replace(given, checkpoint=untrained))
    with pytest.raises(CheckpointError, match=r"host\.safetensors does not fit this MVSplat: .*of another shape"):
        photographs.load_model(given)


def test_training_begins_with_the_compressor_of_a_checkpoint(cfg, small, monkeypatch, tmp_path):
    weights = {name: value + 1 for name, value in finetune._host(cfg).join.zipmatch.state_dict().items()}
    monkeypatch.setattr(finetune, "load_published", lambda path, kind: (tiny(small), weights))
    begun = finetune._host(dataclasses.replace(cfg, model="mvsplat", start=tmp_path / "x.ckpt"))
    found = begun.join.zipmatch.state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


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
        inputs.find_trained(dataclasses.replace(cfg, model="mvsplat", start=tmp_path / "absent"))
    with pytest.raises(FileNotFoundError):
        inputs.find_trained(dataclasses.replace(cfg, chunks=tmp_path))
