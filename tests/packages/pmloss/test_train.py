import dataclasses
import math

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_pmloss import inputs, train
from hone_pmloss.config import HostConfig, PMLossConfig, TrainHostConfig
from hone_pmloss.data import GRADED, Scene, graded_rooms, training_batch
from hone_pmloss.geometry import boundary_band
from hone_pmloss.grading import METRICS, grade
from hone_pmloss.host import open_tiny
from hone_pmloss.models import tiny
from hone_splat.rendering import render
from hone_splat.rooms import Rooms
from safetensors.torch import load_file

SMALL = HostConfig(channels=(8, 8, 32), layers=1, candidates=8, refine_channels=32, size=32)


@pytest.fixture(scope="module")
def short():
    return TrainHostConfig(
        host=SMALL, steps=5, base_share=0.3, scenes=1, targets=1, graded=1, graded_targets=1, log_every=1,
        checkpoint_seconds=0.0,
    )  # fmt: skip


def open_run(cfg, folder):
    return Run.start(package="hone-pmloss", verb="train-host", config=cfg, out=folder, device="cpu", quiet=True)


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory):
    with open_run(short, tmp_path_factory.mktemp("whole")) as run:
        report = train.train_host(short, run)
    return run, report


def test_a_run_leaves_two_graded_arms_and_counts_the_cap(whole, short):
    run, report = whole
    assert report.steps == 5
    assert train.stage_steps(short) == {"base": 1, "photometric": 2, "pm": 2}
    stored = open_tiny(report.checkpoint)
    assert stored.facts.result.keys() == {
        f"{arm} {name}" for arm in ("photometric", "pm") for name in [*METRICS, "on_surface"]
    }
    (capped,) = [row for row in run.rows if row.metric == "capped"]
    assert capped.n == 2
    assert (run.path / "metrics.jsonl").read_text().count('"pm"') == 2


def test_a_stopped_run_goes_on_exactly(whole, short, tmp_path, monkeypatch):
    advance, calls = train._advance, []

    def stop_after_four(*args):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return advance(*args)

    monkeypatch.setattr(train, "_advance", stop_after_four)
    with pytest.raises(KeyboardInterrupt), open_run(short, tmp_path / "cut") as run:
        train.train_host(short, run)
    monkeypatch.setattr(train, "_advance", advance)
    with open_run(short, tmp_path / "cut") as run:
        assert run.resumed
        train.train_host(short, run)
    first, second = (load_file(one.artifacts / "host.safetensors") for one in (whole[0], run))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert [row for row in run.rows if row.metric == "capped"] == [
        row for row in whole[0].rows if row.metric == "capped"
    ]


def test_the_arms_see_the_same_rooms_and_differ_by_the_term(short, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "training_batch", lambda seeds, *rest, **kw: seen.append(seeds) or scene)
    scene = training_batch([0], 1, (8, 18), 32)
    host = tiny(SMALL).train()
    optimizer = torch.optim.SGD(host.parameters(), 0.0)
    for stage in ("photometric", "pm", "base"):
        train._rooms(short, stage, torch.device("cpu")).at(1)
        train._advance(short, stage, host, optimizer, train._Count(), scene, 1, 2)
    assert seen[0] == seen[1] != seen[2]
    plain, none = train.scene_loss(host, scene, None)
    whole, logged = train.scene_loss(host, scene, PMLossConfig(weight=0.5))
    assert none == {}
    assert float((whole - plain).detach()) == pytest.approx(0.5 * float(logged["pm"]), rel=1e-4)


def test_depths_teach_the_base_alone(short, monkeypatch):
    seen = {}
    monkeypatch.setattr(train, "training_batch", lambda *rest, **kw: scene)
    whole = train.scene_loss

    def keep(host, scene, pm, *, depth, points):
        seen[stage] = depth
        return whole(host, scene, pm, depth=depth, points=points)

    scene = training_batch([0], 1, (8, 18), 32)
    host = tiny(SMALL).train()
    plain, _ = whole(host, scene, None)
    taught, logged = whole(host, scene, None, depth=0.5)
    ratio = host(scene.context).depth / scene.distance
    assert float(logged["depth"]) == pytest.approx(float(ratio.log().abs().mean().detach()), rel=1e-4)
    assert float((taught - plain).detach()) == pytest.approx(0.5 * float(logged["depth"]), rel=1e-4)
    monkeypatch.setattr(train, "scene_loss", keep)
    for stage in train.STAGES:
        train._advance(short, stage, host, torch.optim.SGD(host.parameters(), 0.0), train._Count(), scene, 0, 2)
    assert seen == {"base": 0.1, "photometric": 0.0, "pm": 0.0}


def test_a_worse_teacher_errs_as_it_is_told():
    scene = training_batch([0, 1], 1, (8, 18), 64)
    true, centre = scene.points(), scene.context.cam_to_world[:, :, None, None, :3, 3]
    assert torch.equal(scene.taught(), true)

    def ratio(points):
        return (points - centre).norm(dim=-1) / scene.distance

    noisy = ratio(scene.taught(noise=0.02, seed=3))
    assert float((noisy - 1).std()) == pytest.approx(0.02 * 0.66, rel=0.3)  # less between the draws
    # Slow: neighbours err alike.
    assert float((noisy[..., 1:] - noisy[..., :-1]).abs().mean()) < 0.2 * float((noisy - 1).abs().mean())
    assert not torch.equal(scene.taught(noise=0.02, seed=4), scene.taught(noise=0.02, seed=3))
    blurred = ratio(scene.taught(blur=1)) * scene.distance
    by_hand = scene.distance[0, 1, 9:12, 19:22].mean()
    assert float(blurred[0, 1, 10, 20]) == pytest.approx(float(by_hand), rel=1e-4)
    edges = boundary_band(scene.distance[0], width=0)
    error = (blurred - scene.distance).abs()[0]
    assert float(error[edges].mean()) > 5 * float(error[~edges].mean())


def test_the_arm_learns_from_the_teacher_that_it_is_given(short, monkeypatch):
    scene, asked = training_batch([0], 1, (8, 18), 32), []
    monkeypatch.setattr(Scene, "taught", lambda self, **how: asked.append(how) or self.points())
    cfg = dataclasses.replace(short, teacher_noise=0.03, teacher_blur=2, seed=1)
    host = tiny(SMALL).train()
    for stage in train.STAGES:
        train._advance(cfg, stage, host, torch.optim.SGD(host.parameters(), 0.0), train._Count(), scene, 7, 9)
    assert asked == [{"noise": 0.03, "blur": 2, "seed": 1_000_007}]


@pytest.mark.parametrize(("alone", "pm", "passed"), [(0.97, 0.5, False), (0.5, 0.97, True)])
def test_pictures_alone_must_pass_the_gates_and_a_loss_that_spoils_its_arm_is_an_answer(
    short, tmp_path, monkeypatch, alone, pm, passed
):
    flying = iter([alone, pm])  # in the order of the arms
    good = {name: torch.ones(1) for name in METRICS} | {"psnr_between": torch.tensor([30.0])}
    monkeypatch.setattr(train, "grade", lambda host, scenes: good | {"flying": torch.tensor([next(flying)])})
    with open_run(short, tmp_path) as run:
        assert train.train_host(short, run).passed == passed


def test_a_sweep_begins_where_the_arms_of_another_run_part(whole, short, tmp_path):
    start = whole[0].artifacts / "checkpoint.pt"

    def arm(cfg, name):
        cfg = inputs.find_start(cfg)
        with open_run(cfg, tmp_path / name) as run:
            report = train.train_host(cfg, run)
        assert report.steps == 5
        assert (run.path / "metrics.jsonl").read_text().count("\n") == 2
        return load_file(report.checkpoint)

    again = arm(dataclasses.replace(short, start=start), "again")
    other = arm(dataclasses.replace(short, start=start, pm=PMLossConfig(weight=5.0)), "other")
    for name, value in load_file(whole[1].checkpoint).items():
        assert torch.equal(again[name], value)
        if name.startswith("photometric."):
            assert torch.equal(other[name], value)
    assert any(not torch.equal(other[name], value) for name, value in again.items() if name.startswith("pm."))


def test_a_start_that_does_not_fit_is_refused(whole, short, tmp_path):
    start = whole[0].artifacts / "checkpoint.pt"
    with pytest.raises(CheckpointError, match="a run with another lr, steps; repeat its settings"):
        inputs.find_start(dataclasses.replace(short, start=start, lr=1e-3, steps=9))
    with pytest.raises(CheckpointError, match=r"there is no file .*absent.pt"):
        inputs.find_start(dataclasses.replace(short, start=tmp_path / "absent.pt"))
    (tmp_path / "other.pt").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match="no checkpoint of train-host"):
        inputs.find_start(dataclasses.replace(short, start=tmp_path / "other.pt"))
    state = torch.load(start, weights_only=True) | {"step": 2}
    torch.save(state, tmp_path / "early.pt")
    with pytest.raises(CheckpointError, match="stands at step 2; expected 3"):
        inputs.find_start(dataclasses.replace(short, start=tmp_path / "early.pt"))


def test_the_rate_warms_up_falls_and_is_halved_for_the_arms(short):
    scene, host = training_batch([0], 1, (8, 18), 32), tiny(SMALL).train()
    cfg = dataclasses.replace(short, lr=1.0, warmup_steps=2, fine_tune_lr=0.5)
    optimizer = torch.optim.SGD(host.parameters(), 0.0)
    rates = {}
    for stage, step in (("base", 0), ("base", 2), ("base", 8), ("base", 9), ("photometric", 2), ("pm", 2)):
        before = {name: value.clone() for name, value in host.state_dict().items()}
        train._advance(cfg, stage, host, optimizer, train._Count(), scene, step, 10)
        rates[stage, step] = optimizer.param_groups[0]["lr"]
        host.load_state_dict(before)
    assert rates == pytest.approx(
        {("base", 0): 0.5, ("base", 2): 1.0, ("base", 8): 0.3, ("base", 9): 0.15}
        | {("photometric", 2): 0.5, ("pm", 2): 0.5}
    )


def test_training_looks_between_the_context_views_and_never_at_them():
    gaps, places = set(), set()
    for seed in range(0, 60, 4):
        scene = training_batch(range(seed, seed + 4), 6, (2, 6), 8)
        for row, path in enumerate(Rooms.draw(range(seed, seed + 4)).cam_to_world):
            views = torch.cat([scene.context.cam_to_world[row], scene.between.cam_to_world[row]])
            first, last, *asked = (int((path - pose).abs().flatten(1).amax(1).argmin()) for pose in views)
            assert first < min(asked) <= max(asked) < last
            gaps.add(last - first)
            places |= {(frame - first, last - first) for frame in asked}
    assert gaps == {2, 3, 4, 5, 6}
    assert places == {(place, gap) for gap in gaps for place in range(1, gap)}


def test_pictures_between_and_beyond_are_graded_apart():
    host, scene = tiny(SMALL), graded_rooms([0, 1], 2, 32)
    swapped = dataclasses.replace(scene, between=scene.beyond, beyond=scene.between)
    right, other = grade(host, [scene]), grade(host, [swapped])
    assert torch.equal(right["psnr_between"], other["psnr_beyond"])
    assert not torch.allclose(right["psnr_between"], right["psnr_beyond"])
    # Room by room, whichever are graded together.
    apart = torch.cat([grade(host, [scene[row : row + 1]])["psnr_beyond"] for row in range(2)])
    assert torch.allclose(right["psnr_beyond"], apart, atol=1e-4)
    # Frames between the given ones, 18 and 32 of 50, and at most ten outside them.
    path = Rooms.draw([GRADED]).cam_to_world[0]
    for views, allowed in ((scene.between, range(19, 32)), (scene.beyond, [*range(8, 18), *range(33, 43)])):
        frames = [int((path - pose).abs().flatten(1).amax(1).argmin()) for pose in views.cam_to_world[0]]
        assert set(frames) <= set(allowed)
        assert len(set(frames)) == 2


def test_geometry_grades_of_true_depth():
    class True_(torch.nn.Module):
        def forward(self, views):
            output = host(views)
            points = scene.points().flatten(1, 3)
            return type(output)(
                output.gaussians.__class__(
                    points, output.gaussians.scales, output.gaussians.quats_wxyz, output.gaussians.opacities,
                    output.gaussians.sh,
                ),
                scene.distance, output.views, None, output.features,
            )  # fmt: skip

    host, scene = tiny(SMALL), graded_rooms([0], 2, 32)
    right, wrong = grade(True_(), [scene]), grade(host, [scene])
    assert float(right["flying"]) == float(right["depth_abs_rel"]) == 0
    assert float(right["depth_close"]) == 1
    assert float(right["depth_at_edges"]) == 0
    error = ((host(scene.context).depth - scene.distance).abs() / scene.distance)[0].detach()
    edges = boundary_band(scene.distance[0], width=2)
    assert 0.05 < float(edges.double().mean()) < 0.95
    assert float(wrong["depth_at_edges"]) == pytest.approx(float(error[edges].mean()), rel=1e-4)
    gaps, index = torch.cdist(host(scene.context).gaussians.means[0], scene.points()[0].flatten(0, 2)).min(1)
    flies = gaps > 0.05 * scene.distance[0].flatten()[index]  # a share of the distance of the point that is nearest
    assert float(wrong["flying"]) == pytest.approx(float(flies.double().mean()), abs=1e-3)
    assert float(wrong["flying"]) > 0.5
    ways = torch.cdist(host(scene.context).gaussians.means[0].detach(), scene.points()[0].flatten(0, 2)).double()
    far = scene.distance[0].flatten().double()
    assert float(wrong["accuracy"]) == pytest.approx(float((ways.amin(1) / far[index]).mean()), rel=1e-3)
    assert float(wrong["completion"]) == pytest.approx(float((ways.amin(0) / far).mean()), rel=1e-3)
    assert float(right["accuracy"]) == float(right["completion"]) == 0
    assert float(wrong["depth_abs_rel"]) > 0.1


def test_a_scene_that_is_too_small_has_its_scale_and_no_error_of_shape():
    class Small(torch.nn.Module):
        def forward(self, views):
            return dataclasses.replace(host(views), depth=0.9 * scene.distance)

    host, scene = tiny(SMALL), graded_rooms([0, 1], 2, 32)
    found = grade(Small(), [scene])
    assert torch.allclose(found["depth_scale"], torch.full((2,), 0.9).double(), atol=1e-6)
    assert torch.allclose(found["depth_shape"], torch.zeros(2).double(), atol=1e-6)
    assert torch.allclose(found["depth_abs_rel"], torch.full((2,), 0.1).double(), atol=1e-6)
    ratio = (host(scene.context).depth / scene.distance)[1].detach()
    other = grade(host, [scene])
    assert float(other["depth_scale"][1]) == pytest.approx(float(ratio.flatten().median()), rel=1e-4)
    shape = (ratio / ratio.flatten().median() - 1).abs().mean()
    assert float(other["depth_shape"][1]) == pytest.approx(float(shape), rel=1e-4)


def test_pictures_at_edges_are_graded_by_their_bands_alone():
    host, scene = tiny(SMALL), graded_rooms([3], 2, 32)
    band = torch.stack([boundary_band(scene.beyond_distance[0], width=2)]).unsqueeze(2)
    drawn = (
        render(host(scene.context).gaussians, scene.beyond.cam_to_world, scene.beyond.intrinsics_norm, (32, 32))
        .image_01.clamp(0, 1)
        .detach()
    )
    elsewhere = torch.where(band, scene.beyond.image_01, 1 - scene.beyond.image_01)
    perfect = torch.where(band, drawn, scene.beyond.image_01)
    found = {
        name: grade(host, [dataclasses.replace(scene, beyond=dataclasses.replace(scene.beyond, image_01=image))])
        for name, image in (("true", scene.beyond.image_01), ("elsewhere", elsewhere), ("perfect", perfect))
    }
    value = {name: float(grades["psnr_beyond_at_edges"]) for name, grades in found.items()}
    assert value["true"] == pytest.approx(value["elsewhere"], abs=1e-6)
    assert value["perfect"] > 60 > value["true"]
    assert found["elsewhere"]["psnr_beyond"] < found["true"]["psnr_beyond"]
    error = (drawn - scene.beyond.image_01).square().mean(2)[0]
    inside = [float(part[here].double().mean()) for part, here in zip(error, band[0, :, 0], strict=True)]
    assert value["true"] == pytest.approx(-10 * sum(math.log10(part) for part in inside) / 2, abs=1e-3)
