import dataclasses

import pytest
import torch
from hone_core.runs import Row, Run
from hone_fpsattention import reproduce as module
from hone_fpsattention.arms import Job, arms_of, constant_window, guided_host, held_out_loss
from hone_fpsattention.config import ARMS, PRESETS, ReproduceConfig
from hone_fpsattention.evaluate import mean_density
from hone_fpsattention.models import attach
from hone_fpsattention.reproduce import METRICS, ReproduceReport, _write_rows, reproduce, verdicts
from hone_fpsattention.schedule import step_sigmas
from hone_video.clips import render, segment_glyphs
from hone_video.flow import flow_loss
from hone_video.host import load_host, to_latents

SMALL = {"prompts": 2, "seeds": 2, "train_steps": 2, "train_batch": 2, "batch": 2, "glyphs": "segments", "gate": 0.0}


@pytest.fixture
def start(tiny_host, tmp_path):
    def start(name="run", **options):
        cfg = ReproduceConfig(host=tiny_host, **SMALL | options)
        out = tmp_path / name
        with Run.start(package="hone-fpsattention", verb="reproduce", config=cfg, out=out, device="cpu") as run:
            run.quiet = True
            return reproduce(cfg, run)

    return start


def test_every_arm_has_its_rows_and_a_stopped_run_goes_on(start, monkeypatch):
    right, calls = module.work, []

    def work(cfg, folder, job, device):
        calls.append(job)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        right(cfg, folder, job, device)

    monkeypatch.setattr(module, "work", work)
    with pytest.raises(RuntimeError, match="power cut"):
        start()
    report = start()
    assert calls[3] == calls[4]
    assert len(calls) == 1 + 2 * len(ARMS)
    accuracy = [row for row in report.rows if row.metric == "accuracy"]
    assert [row.variant for row in accuracy] == list(ARMS)
    assert all(row.n == 4 for row in accuracy)
    folder = report.path / "artifacts"
    assert not list(folder.glob("*.checkpoint"))
    losses = {arm: torch.load(Job(arm, 0).file(folder), weights_only=True)["flow_loss"] for arm in ARMS}
    assert all(not torch.equal(losses["dense"], loss) for arm, loss in losses.items() if arm != "dense")
    assert not torch.equal(losses["both"], losses["flow"])
    assert not torch.equal(losses["flow"], losses["distillation"])
    text = str(report)
    assert text == str(ReproduceReport(path=report.path, rows=report.rows))
    assert "does the granularity of scales matter" in text


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_arm_alone_is_what_it_is_among_others(start, workers):
    alone = start("alone", arms=("distillation",))
    assert {row.variant for row in alone.rows} == {"dense", "distillation", "distillation - dense"}
    assert "rescue" not in str(alone)
    more = start("more", arms=("both", "distillation"), workers=workers)
    assert [row for row in more.rows if row.variant in ("dense", "distillation")] == [
        row for row in alone.rows if row.variant in ("dense", "distillation")
    ]
    assert "does joint training rescue" in str(more)


def test_a_host_that_cannot_draw_is_refused(start):
    with pytest.raises(RuntimeError, match="the dense host must get 90%"):
        start(gate=0.9)


def test_schedule_and_constant_window_read_the_same_at_every_step_count():
    cfg = ReproduceConfig()
    host = guided_host(cfg)
    arms = arms_of(cfg, host)
    assert set(arms) == set(ARMS)
    for arm in ("schedule", "schedule-trained", "constant", "constant-trained"):
        assert mean_density(host, arms[arm].attention) == pytest.approx(0.5625)
    assert [regime.window for regime in arms["constant"].attention.regimes] == [(1, 3, 3)]
    scales = [arms[kind].attention.regimes[0].scales for kind in ("tensor", "tile", "token")]
    assert scales == ["tensor", "tile", "token"]
    # As the host is guided by default, the schedule's middle would count more.
    assert mean_density(load_host(), PRESETS["tiny-wide"].config) > 0.58


def test_the_constant_window_reads_as_much_or_the_next_less():
    host = load_host()
    staged = PRESETS["tiny-wide"].config
    assert mean_density(host, staged.constant(constant_window(host, staged))) == pytest.approx(0.5625)


@pytest.mark.parametrize("attention", [None, PRESETS["tiny"].config])
def test_held_out_loss_is_the_mean_flow_loss_over_the_samplers_levels(tiny_host, attention):
    cfg = ReproduceConfig(host=tiny_host, **SMALL)
    host = load_host(path=tiny_host)
    labels = torch.tensor([[3, 0, 1, 0, 0], [7, 1, 2, 1, 1], [1, 2, 0, 0, 2]])
    clean = to_latents(render(segment_glyphs(), labels, host.config.clip, torch.Generator().manual_seed(5)).clips)
    noise, text = host.noise(3, 2005), host.encode_labels(labels)
    expected = []
    for i in range(3):
        one = slice(i, i + 1)
        handle = attach(host.transformer, attention) if attention else None
        levels = step_sigmas(2, host.config.shift)
        with torch.no_grad():
            losses = [
                flow_loss(host.transformer, clean[one], text[one], torch.tensor([sigma]), noise[one])
                for sigma in levels
            ]
        expected.append(sum(losses) / len(levels))
        if handle:
            handle.detach()
    torch.testing.assert_close(held_out_loss(host, attention, labels, cfg, seed=5), torch.stack(expected))


def files(accuracy):
    """Jobs of arms whose every metric is ``accuracy[arm]``, ``[seeds, clips]``."""
    return {
        Job(arm, seed): dict.fromkeys(METRICS, values) | {"density": torch.tensor(1.0)}
        for arm, seeds in accuracy.items()
        for seed, values in enumerate(seeds)
    }


def test_intervals_count_seeds_and_differences_are_clip_by_clip(tmp_path):
    cfg = ReproduceConfig(prompts=4, seeds=3)
    with Run.start(package="hone-fpsattention", verb="reproduce", config=cfg, out=tmp_path / "run") as run:
        # Clips of a seed are all alike, so what varies is the seed; "both" is half a point below, clip by clip.
        seeds = torch.tensor([[0.2] * 4, [0.5] * 4, [0.8] * 4], dtype=torch.float64)
        _write_rows(run, cfg, files({"dense": seeds, "both": seeds - 0.5}))
        found = {(row.metric, row.variant): row for row in run.rows}
    low, high = found["accuracy", "dense"].interval
    assert low == pytest.approx(0.2)
    assert high == pytest.approx(0.8)
    assert found["accuracy", "dense"].spread == pytest.approx(0.3)
    change = found["accuracy_difference", "both - dense"]
    assert change.value == pytest.approx(-0.5)
    assert change.interval == pytest.approx((-0.5, -0.5))
    assert ("psnr", "dense") not in found


def rows(**ends):
    """Rows of every arm, and accuracy differences as given, else nothing between arms; ``psnr_tensor`` too."""
    names = ["e4m3 - dense", "window - dense", "both - dense", "flow - dense", "distillation - dense", "flow - both"]
    names += ["distillation - both", "schedule - constant", "schedule-trained - constant-trained"]
    names += ["tensor - tile", "token - tile"]
    made = [Row(metric="accuracy", value=0.9, better="higher", variant=arm) for arm in ARMS]
    for name in names:
        for metric in ("accuracy", "flow_loss", "psnr"):
            key = f"{metric}_{name.replace(' - ', '_').replace('-', '')}"
            low, high = ends.get(key, (-0.01, 0.01))
            options = {"value": (low + high) / 2, "interval": (low, high)}
            made.append(Row(metric=f"{metric}_difference", variant=name, better="none", **options))
    return made


def test_verdicts():
    broken = {"accuracy_both_dense": (-0.5, -0.4)}
    said = verdicts(rows(**broken, accuracy_flow_dense=(-0.3, -0.2), accuracy_flow_both=(0.1, 0.3)))
    assert "E4M3 alone holds" in said[0]
    assert "untrained is below" in said[0]
    assert "trained on flow: no; it is better than without training." in said[1]
    assert "dense velocity: yes; no difference" in said[1]
    assert said[2].endswith("untrained, no difference found on digit and direction, no difference found on loss")
    assert said[3].endswith("no: less than 0.5 dB")
    assert "nothing is shown to be broken" in verdicts(rows())[1]
    harmed = verdicts(rows(**broken, accuracy_flow_dense=(-0.8, -0.6), accuracy_flow_both=(-0.3, -0.1)))
    assert "trained on flow: no; it is worse than without training." in harmed[1]
    assert "undecided;" in verdicts(rows(**broken, accuracy_flow_dense=(-0.05, 0.01)))[1]
    trained = "scheduletrained_constanttrained"
    better = {f"accuracy_{trained}": (0.01, 0.05), f"flow_loss_{trained}": (0.1, 0.2)}
    assert "? trained, better on digit and direction, worse on loss;" in verdicts(rows(**better))[2]
    assert "? trained, worse on" in verdicts(rows(**{f"accuracy_{trained}": (-0.2, -0.1)}))[2]
    assert verdicts(rows(psnr_token_tile=(0.6, 1.0)))[3].endswith("yes")
    assert verdicts(rows(psnr_token_tile=(0.3, 1.0)))[3].endswith("undecided")
    only = [row for row in rows() if row.variant in ("dense", "flow", "flow - dense")]
    assert verdicts(only) == []


def test_unknown_arms_are_named():
    with pytest.raises(ValueError, match="no arm drawn; the arms are dense, e4m3"):
        ReproduceConfig(arms=("drawn",))
    assert dataclasses.replace(ReproduceConfig(), arms=("flow",)).arms == ("flow",)
