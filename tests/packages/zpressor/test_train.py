import pytest
import torch
from hone_core.runs import Run
from hone_zpressor import train
from hone_zpressor.config import TrainHostConfig
from hone_zpressor.host import load_host, open_tiny
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def short(small):
    return TrainHostConfig(
        host=small, steps=5, base_share=0.4, scenes=1, context=6, targets=1, gap=(12, 20), graded=1, log_every=1,
        checkpoint_seconds=0.0,
    )  # fmt: skip


def open_run(cfg, folder):
    return Run.start(package="hone-zpressor", verb="train-host", config=cfg, out=folder, device="cpu", quiet=True)


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory):
    run = open_run(short, tmp_path_factory.mktemp("whole"))
    with run:
        report = train.train_host(short, run)
    return run, report


def test_a_run_leaves_three_graded_arms(whole, short):
    run, report = whole
    assert report.steps == 5
    assert train.stage_steps(short) == {"base": 2, "host": 1, "zpressor": 1, "anchors": 1}
    stored = open_tiny(report.checkpoint)
    assert stored.facts.result.keys() == {"host", "zpressor", "anchors"}
    assert stored.facts.details["parameters"]["zpressor"] > stored.facts.details["parameters"]["host"]
    assert {row.variant for row in run.rows if row.metric == "psnr"} == {"host", "zpressor", "anchors"}
    assert (run.path / "metrics.jsonl").read_text().count("\n") == 5
    before = load_host("zpressor", path=report.checkpoint).host.state_dict()
    assert not torch.equal(
        before["backbone.backbone.conv1.weight"], load_host("host", path=report.checkpoint).host.state_dict()[
            "backbone.backbone.conv1.weight"],
    )  # fmt: skip


def test_a_stopped_run_goes_on_exactly(whole, short, tmp_path, monkeypatch):
    advance, calls = train._advance, []

    def stop_after_three(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return advance(*args)

    monkeypatch.setattr(train, "_advance", stop_after_three)
    with pytest.raises(KeyboardInterrupt), open_run(short, tmp_path / "cut") as run:
        train.train_host(short, run)
    monkeypatch.setattr(train, "_advance", advance)
    with open_run(short, tmp_path / "cut") as run:
        assert run.resumed
        train.train_host(short, run)
    first, second = (load_file(one.artifacts / "host.safetensors") for one in (whole[0], run))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_arms_begin_with_the_base(short, monkeypatch, tmp_path):
    seen = {}
    advance = train._advance

    def look(cfg, stage, host, *rest):
        if stage not in seen:
            seen[stage] = {name: value.clone() for name, value in host.state_dict().items()}
        loss = advance(cfg, stage, host, *rest)
        if stage == "base":
            seen["trained"] = {name: value.clone() for name, value in host.state_dict().items()}
        return loss

    monkeypatch.setattr(train, "_advance", look)
    with open_run(short, tmp_path / "arms") as run:
        train.train_host(short, run)
    for arm in ("host", "zpressor", "anchors"):
        assert all(torch.equal(value, seen[arm][name]) for name, value in seen["trained"].items()), arm


def test_a_step_lowers_the_loss_of_its_own_rooms(small):
    from hone_zpressor.data import training_batch
    from hone_zpressor.host import build_arm

    scene = training_batch([1], 6, 2, (12, 20), 32)
    host = build_arm(small, "zpressor").host.train()
    optimizer = torch.optim.AdamW(host.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        loss = train.scene_loss(host, scene, information=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(part.grad is not None and part.grad.isfinite().all() for part in host.parameters())
