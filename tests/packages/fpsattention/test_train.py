import dataclasses

import pytest
import torch
from hone_core.runs import Run
from hone_core.testing import assert_close
from hone_fpsattention import host as tuned_host
from hone_fpsattention.config import PRESETS, FPSAttentionConfig, Regime, TrainHostConfig
from hone_fpsattention.models import attach
from hone_fpsattention.schedule import regime_index
from hone_fpsattention.train import Tuning, regime_sigmas, train_host
from hone_video.clips import segment_glyphs
from hone_video.flow import sample_sigma
from hone_video.host import load_host

STAGED = dataclasses.replace(
    PRESETS["tiny"].config, tile=(4, 4, 4), regimes=(Regime(window=(1, 1, 1)), Regime(), Regime(window=(1, 3, 1)))
)
SMOKE = TrainHostConfig(steps=3, batch=2, eval_clips=2, glyphs="segments", warmup_steps=1, lr=1e-3, log_every=1)


def config(tiny_host, **change):
    return dataclasses.replace(SMOKE, host=tiny_host, attention=STAGED, **change)


def start(cfg, out):
    return Run.start(
        package="hone-fpsattention",
        verb="train-host",
        config=cfg,
        out=out,
        device="cpu",
        quiet=True,
        command="train it",
    )


# ---- noise levels


def test_levels_of_a_step_are_of_one_regime_and_altogether_distributed_as_without():
    generator = torch.Generator().manual_seed(0)
    cpu = torch.device("cpu")
    steps = [regime_sigmas(STAGED, 4, uniform=0.2, generator=generator, device=cpu) for _ in range(1500)]
    for sigma in steps:
        assert len({regime_index(STAGED, value) for value in sigma.tolist()}) == 1
    drawn = torch.cat(steps).sort().values
    plain = sample_sigma(6000, shift=STAGED.shift, uniform=0.2, generator=generator).sort().values
    # Levels of a step come together, so the quantiles scatter as those of 1,500 draws: a few hundredths.
    at = torch.tensor([600, 1500, 3000, 4500, 5400])
    assert_close(drawn[at], plain[at], atol=0.05)


def test_one_regime_takes_any_level():
    constant = STAGED.constant(0)
    generator = torch.Generator().manual_seed(0)
    sigma = regime_sigmas(constant, 200, uniform=1.0, generator=generator, device=torch.device("cpu"))
    assert float(sigma.min()) < 0.2
    assert float(sigma.max()) > 0.9


# ---- losses


def test_targets(tiny_host, tmp_path):
    targets = {}
    for loss in ("flow", "distillation"):
        tuning = Tuning(config(tiny_host, loss=loss), load_host(path=tiny_host), tmp_path / "checkpoint.pt")
        noisy, timestep, text, target = tuning.draw(segment_glyphs())
        targets[loss] = noisy, target
        if loss == "distillation":
            with torch.no_grad():
                velocity = tuning.teacher.transformer(noisy, timestep, text, return_dict=False)[0]
            assert torch.equal(target, velocity)
        else:
            # noisy = x_0 + sigma (noise - x_0), and x_0 is a clip in [-1, 1].
            clip = noisy - (timestep / 1000).view(-1, 1, 1, 1, 1) * target
            assert float(clip.abs().max()) <= 1 + 1e-5
    assert torch.equal(targets["flow"][0], targets["distillation"][0])
    assert not torch.equal(targets["flow"][1], targets["distillation"][1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_distillation_brings_the_student_to_the_teacher(tiny_host, tmp_path, checkpointing):
    host = load_host(path=tiny_host)
    text, noise = host.encode_prompt("a red 7 moving left, slow"), host.noise(1, 0)
    args = noise, torch.tensor([700.0]), text
    near = STAGED.constant(0)

    def distance(model):
        with torch.no_grad():
            want = host.transformer(*args, return_dict=False)[0]
            with attach(model, near):
                return float((model(*args, return_dict=False)[0] - want).norm() / want.norm())

    before = distance(host.transformer)
    cfg = dataclasses.replace(SMOKE, host=tiny_host, attention=near, steps=40, batch=4, drop=0.0, ema=0.9, lr=1e-2)
    cfg = dataclasses.replace(cfg, gradient_checkpointing=checkpointing)
    tuning = Tuning(cfg, host, tmp_path / "checkpoint.pt")
    losses = [values["loss"] for values in tuning.train(segment_glyphs())]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert distance(tuning.result().transformer) < before
    # The teacher is as it was.
    assert torch.equal(host.transformer(*args, return_dict=False)[0], load_host(path=tiny_host).transformer(*args)[0])


def test_a_dense_student_has_nothing_to_learn(tiny_host, tmp_path):
    cfg = config(tiny_host)
    cfg = dataclasses.replace(cfg, attention=dataclasses.replace(STAGED, regimes=(Regime(e4m3=False),), boundaries=()))
    tuning = Tuning(cfg, load_host(path=tiny_host), tmp_path / "checkpoint.pt")
    noisy, timestep, text, target = tuning.draw(segment_glyphs())
    with attach(tuning.student, cfg.settings):
        assert_close(tuning.student(noisy, timestep, text, return_dict=False)[0], target, atol=1e-5)


def test_the_learning_rate_rises_and_falls(tiny_host, tmp_path):
    cfg = config(tiny_host, steps=40)
    tuning = Tuning(dataclasses.replace(cfg, warmup_steps=4), load_host(path=tiny_host), tmp_path / "checkpoint.pt")
    rates = []
    for tuning.training.step in (0, 4, 20, 40):
        rates.append(tuning.learning_rate() / cfg.lr)
    assert_close(torch.tensor(rates), torch.tensor([0.25, 0.976, 0.505, 0.01]), atol=1e-3)


def test_the_average_follows_the_student_slowly_once_it_has_begun(tiny_host, tmp_path):
    cfg = dataclasses.replace(config(tiny_host, steps=4), ema=0.3)
    tuning = Tuning(cfg, load_host(path=tiny_host), tmp_path / "checkpoint.pt")
    name = "blocks.0.ffn.net.2.weight"
    student, average = (dict(model.named_parameters())[name] for model in (tuning.student, tuning.ema))
    want = student.detach().clone()
    # (1 + n) / (10 + n) after n updates, until that is more than the decay.
    for decay, _ in zip((2 / 11, 3 / 12, 0.3, 0.3), tuning.train(segment_glyphs()), strict=True):
        want = decay * want + (1 - decay) * student.detach()
        assert_close(average, want, rtol=1e-5, atol=1e-7)
    assert float((student - average).detach().abs().max()) > 1e-5


# ---- runs


def test_a_run_exports_what_it_graded(tiny_host, tmp_path):
    cfg = config(tiny_host)
    with start(cfg, tmp_path / "run") as run:
        report = train_host(cfg, run)
    assert report.steps == 3
    host = tuned_host.load_host(path=report.checkpoint)
    assert host.attention == STAGED
    assert host.facts.command == "train it"
    assert host.facts.details["loss"] == "distillation"
    assert set(report.result) == {"accuracy", "digit", "direction", "color", "speed"}
    variants = {row.variant for row in report.rows if row.metric == "accuracy"}
    assert variants == {"dense", "both", "trained"}
    assert not torch.equal(host.transformer.proj_out.weight, load_host(path=tiny_host).transformer.proj_out.weight)


def test_a_stopped_run_goes_on_exactly(tiny_host, tmp_path):
    cfg = config(tiny_host, steps=4)
    whole = Tuning(cfg, load_host(path=tiny_host), tmp_path / "whole.pt")
    for _ in whole.train(segment_glyphs()):
        pass
    first = Tuning(cfg, load_host(path=tiny_host), tmp_path / "parts.pt")
    for _ in zip(range(2), first.train(segment_glyphs()), strict=False):
        pass
    first.training.save()
    second = Tuning(cfg, load_host(path=tiny_host), tmp_path / "parts.pt")
    assert second.training.resume()
    for _ in second.train(segment_glyphs()):
        pass
    for name, value in whole.ema.state_dict().items():
        assert torch.equal(value, second.ema.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minutes": 0.0, "steps": None}, "minutes must be positive"),
        ({"loss": "dpo"}, "loss must be one of .* got 'dpo'"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"drop": 1.0}, r"drop and ema must be in \[0, 1\)"),
        ({"preset": "best"}, "no preset 'best'"),
        ({"batch": 0}, "batch must be positive; got 0"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **change)


def test_settings_are_the_preset_s_or_given():
    assert TrainHostConfig().settings == PRESETS["tiny"].config
    assert TrainHostConfig(attention=FPSAttentionConfig()).settings == FPSAttentionConfig()
