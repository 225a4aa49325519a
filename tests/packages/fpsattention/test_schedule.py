import dataclasses

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hone_fpsattention.config import PRESETS, FPSAttentionConfig, Regime
from hone_fpsattention.schedule import (
    Schedule,
    boundary_sigmas,
    flow_sigma,
    regime_index,
    regime_share,
    step_regimes,
    step_sigmas,
)

THREE = (Regime(window=(1, 1, 1)), Regime(), Regime(window=(3, 3, 3)))


def staged(shift=5.0, boundaries=(0.2, 0.8)):
    return FPSAttentionConfig(regimes=THREE, boundaries=boundaries, shift=shift)


@pytest.mark.parametrize(("fraction", "sigma"), [(0.2, 0.952), (0.5, 0.833), (0.8, 0.556)])
def test_boundaries_through_the_shift(fraction, sigma):
    config = FPSAttentionConfig(regimes=(Regime(), Regime()), boundaries=(fraction,))
    assert boundary_sigmas(config) == (pytest.approx(sigma, abs=5e-4),)


def test_flow_sigma_by_hand():
    assert flow_sigma(0.8, 5.0) == pytest.approx(4 / 4.2)
    assert flow_sigma(0.3, 1.0) == 0.3
    assert (flow_sigma(0.0, 5.0), flow_sigma(1.0, 5.0)) == (0.0, 1.0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 7.0])
def test_steps_count_as_in_equation_six(shift):
    # t <= t1 is early, t <= t2 the middle, the rest late; t counts from 1.
    for steps in (5, 10, 50):
        t1, t2 = 0.2 * steps, 0.8 * steps
        expected = tuple(0 if t <= t1 + 1e-9 else 1 if t <= t2 + 1e-9 else 2 for t in range(1, steps + 1))
        assert step_regimes(staged(shift), steps) == expected
    # A step in which a boundary falls belongs to the regime that it starts in: the noisiest is always early.
    assert step_regimes(staged(shift), 4) == (0, 1, 1, 1)
    assert step_regimes(staged(shift), 8) == (0, 0, 1, 1, 1, 1, 1, 2)


def test_fifty_steps_are_ten_thirty_ten():
    regimes = step_regimes(staged(), 50)
    assert [regimes.count(i) for i in range(3)] == [10, 30, 10]
    assert regime_share(staged()) == pytest.approx((0.2, 0.6, 0.2))


def test_raw_timesteps_would_part_the_steps_elsewhere():
    # Why boundaries go through the shift: at 0.8 and 0.2 of the noise level 56 % of the steps would be early.
    sigmas = step_sigmas(50, 5.0)
    assert sum(sigma > 0.8 for sigma in sigmas) / 50 == pytest.approx(0.56)
    assert sum(sigma <= 0.2 for sigma in sigmas) / 50 <= 0.06


@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("kind", ["euler", "unipc"])
def test_samplers_of_diffusers_land_in_the_same_regimes(kind, shift):
    if kind == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    else:
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    for steps in (5, 10, 50):
        scheduler.set_timesteps(steps)
        timesteps = [float(t) / scheduler.config.num_train_timesteps for t in scheduler.timesteps]
        regimes = tuple(regime_index(staged(shift), sigma) for sigma in timesteps)
        if kind == "unipc":
            assert regimes == step_regimes(staged(shift), steps)
        else:
            # Euler spreads its steps up to the last timestep instead of up to zero: shares, not steps, are equal.
            assert sorted(regimes) == list(regimes)
            for regime, share in enumerate(regime_share(staged(shift))):
                assert abs(regimes.count(regime) - share * steps) <= 1


def test_noise_levels_near_the_ends():
    config = staged()
    assert regime_index(config, 1.0) == 0
    assert regime_index(config, 0.0) == 2
    assert regime_index(FPSAttentionConfig(), 0.5) == 0
    early, late = boundary_sigmas(config)
    # Timesteps of samplers are rounded to whole numbers of 1000.
    assert regime_index(config, round(early * 1000) / 1000) == 1
    assert regime_index(config, round(late * 1000) / 1000) == 2
    assert regime_index(config, early + 0.001) == 0
    for sigma in (-0.01, 1.01, 999.0, float("nan")):
        with pytest.raises(ValueError, match=r"sigma must lie in \[0, 1\], the timestep over"):
            regime_index(config, sigma)


def test_no_steps_is_an_error():
    with pytest.raises(ValueError, match="steps must be at least 1"):
        step_sigmas(0, 5.0)


# ---- the file


def schedule(**change):
    fields = {
        "config": PRESETS["wan2.1-14b"].config,
        "model": "WanTransformer3DModel, 40 layers, 40 heads of 128",
        "sampler": "UniPCMultistepScheduler",
        "steps": 50,
        "grid": (21, 45, 80),
        "budget": 0.3,
        "provenance": "hone-fpsattention calibrate",
    }
    return Schedule(**{**fields, **change})


def test_a_schedule_survives_its_file(tmp_path):
    saved = schedule()
    path = saved.save(tmp_path / "schedule.json")
    assert Schedule.load(path) == saved


def test_a_damaged_schedule_is_named(tmp_path):
    path = schedule().save(tmp_path / "schedule.json")
    path.write_text(path.read_text().replace("0.8", "0.1"))
    with pytest.raises(ValueError, match=r"schedule.json: .*boundaries are fractions .* ascending"):
        Schedule.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "CogVideoXTransformer3DModel"}, "calibrated with model 'Wan.*', but here it is 'CogVideoX"),
        ({"sampler": "DDIM"}, "calibrated with sampler 'UniPCMultistepScheduler', but here it is 'DDIM'"),
        ({"shift": 3.0}, "calibrated with shift 5.0, but here it is 3.0"),
    ],
)
def test_a_schedule_of_something_else_is_refused(change, message):
    mine = {"model": schedule().model, "sampler": schedule().sampler, "shift": 5.0}
    schedule().check(**mine)
    with pytest.raises(ValueError, match=message):
        schedule().check(**{**mine, **change})


def test_schedules_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule().steps = 4
