import inspect

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hone_blade.scheduler import TDMScheduler, rollout_timesteps

COGVIDEOX_5B = {
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "clip_sample": False,
}


def flow(**options):
    return TDMScheduler(**options)


def vp(**options):
    return TDMScheduler.from_config(CogVideoXDPMScheduler(**COGVIDEOX_5B).config, **options)


PROCESSES = pytest.mark.parametrize("make", [flow, vp])


@pytest.mark.parametrize(
    ("steps", "times"),
    [
        (8, [999, 874, 749, 624, 499, 374, 249, 124]),
        (4, [999, 749, 499, 249]),
        (3, [999, 666, 332]),
        (1, [999]),
    ],
)
def test_grid_values(steps, times):
    assert rollout_timesteps(steps) == times
    scheduler = flow()
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == times
    assert scheduler.timesteps.dtype == torch.int64


def test_grid_is_the_trailing_grid_of_diffusers():
    dpm = CogVideoXDPMScheduler(**COGVIDEOX_5B)
    for steps in range(1, 101):
        dpm.set_timesteps(steps)
        ours, theirs = rollout_timesteps(steps), dpm.timesteps.tolist()[:steps]
        # Where 1000 / steps is no whole number, numpy accumulates a rounding error that can turn a tie.
        tolerance = 0 if 1000 % steps == 0 else 1
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= tolerance


def test_flow_level_is_the_time_over_1000_for_every_time():
    scheduler = flow()
    times = torch.arange(1000)
    alpha, sigma = scheduler.levels(times, torch.zeros(1000, 1, dtype=torch.float64))
    torch.testing.assert_close(sigma[:, 0], times / 1000.0, check_dtype=False, rtol=0, atol=1e-7)
    torch.testing.assert_close(alpha, 1 - sigma)
    # The eight levels of the rollout, two of which (0.374, 0.124) the official table lookup misses.
    scheduler.set_timesteps(8)
    expected = [0.999, 0.874, 0.749, 0.624, 0.499, 0.374, 0.249, 0.124, 0.0]
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(expected))


def test_vp_levels_from_the_betas_by_hand():
    scheduler = vp()
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.cumprod(1 - betas) ** 0.5
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha, sigma = scheduler.levels(torch.arange(1000), torch.zeros(1000, 1, dtype=torch.float64))
    np.testing.assert_allclose(alpha[:, 0], root, atol=1e-12)
    np.testing.assert_allclose(sigma[:, 0], np.sqrt(1 - root**2), atol=1e-12)
    assert alpha[999] == 0
    assert sigma[999] == 1
    # CogVideoX-2B shifts the signal-to-noise ratio by 3: snr / 3 before the rescaling.
    shifted = vp(snr_shift_scale=3.0, rescale_betas_zero_snr=False).alphas_cumprod
    plain = vp(rescale_betas_zero_snr=False).alphas_cumprod
    torch.testing.assert_close(shifted / (1 - shifted), plain / (1 - plain) / 3)


@PROCESSES
def test_clean_estimate_and_noise_estimate_invert_the_forward_process(make):
    scheduler = make()
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1000, 3, generator=generator, dtype=torch.float64)
    times = torch.arange(1000)
    state = scheduler.add_noise(x0, noise, times)
    velocity = scheduler.get_velocity(x0, noise, times)
    torch.testing.assert_close(scheduler.predict_x0(velocity, state, times), x0, atol=1e-10, rtol=0)
    torch.testing.assert_close(scheduler.predict_noise(velocity, state, times), noise, atol=1e-10, rtol=0)


def test_vp_agrees_with_diffusers():
    ours, theirs = vp(), CogVideoXDPMScheduler(**COGVIDEOX_5B)
    x0, noise = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    times = torch.tensor([0, 124, 500, 999])
    torch.testing.assert_close(ours.add_noise(x0, noise, times), theirs.add_noise(x0, noise, times))
    # diffusers' get_velocity(sample=x0, noise) is the target, and get_velocity(v, x_t) recovers x0.
    torch.testing.assert_close(ours.get_velocity(x0, noise, times), theirs.get_velocity(x0, noise, times))
    state, velocity = ours.add_noise(x0, noise, times), ours.get_velocity(x0, noise, times)
    torch.testing.assert_close(ours.predict_x0(velocity, state, times), theirs.get_velocity(velocity, state, times))


def test_time_minus_one_is_clean_data():
    for scheduler in (flow(), vp()):
        x0, noise = torch.randn(2, 4, 3)
        assert torch.equal(scheduler.add_noise(x0, noise, -1), x0)


def oracle(scheduler, state, x0, time):
    """Output of a network that always knows the clean sample."""
    alpha, sigma = (float(v) for v in scheduler.levels(time, torch.zeros(1, dtype=torch.float64)))
    if scheduler.config.prediction_type == "flow_prediction":
        return (state - x0) / sigma
    return (alpha * state - x0) / sigma


@PROCESSES
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_with_an_oracle_network_the_rollout_ends_at_the_clean_sample(make, steps):
    scheduler = make()
    scheduler.set_timesteps(steps)
    x0 = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(2))
    state = torch.randn_like(x0)
    for time in scheduler.timesteps:
        out = scheduler.step(oracle(scheduler, state, x0, int(time)), time, state)
        torch.testing.assert_close(out.pred_original_sample, x0, atol=1e-5, rtol=0)
        state = out.prev_sample
    torch.testing.assert_close(state, x0, atol=1e-5, rtol=0)


@PROCESSES
@pytest.mark.parametrize("eta", [0.0, 0.9, 1.0])
def test_mean_and_variance_of_every_state(make, eta):
    scheduler = make(eta=eta)
    scheduler.set_timesteps(8)
    scheduler.generator = torch.Generator().manual_seed(3)
    x0 = torch.full((200_000,), 1.7)
    state = torch.randn(x0.shape, generator=torch.Generator().manual_seed(4))
    times = scheduler.timesteps.tolist()
    for time, following in zip(times, [*times[1:], -1], strict=True):
        state = scheduler.step(oracle(scheduler, state, x0, time), time, state).prev_sample
        alpha, sigma = (float(v) for v in scheduler.levels(following, x0))
        # Five standard errors of the mean and of the variance, and 0.002 for the first flow state, pure noise at 0.999.
        mean_error, variance_error = 5 * sigma / 2e5**0.5, 5 * sigma**2 * (2 / 2e5) ** 0.5
        assert state.mean().item() == pytest.approx(1.7 * alpha, abs=mean_error + 2e-3 + 1e-6)
        assert state.var().item() == pytest.approx(sigma**2, abs=variance_error + 2e-3 * sigma**2 + 1e-9)


@PROCESSES
def test_step_is_the_training_rollout_written_out(make):
    """A loop that shares no code with the scheduler but the betas of diffusers."""
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(5)) / 3

    def network(x, t):
        return torch.tanh(x @ weight + t / 1000)

    scheduler = make()
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(0)
    ours = start = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(6))
    scheduler.generator = torch.Generator().manual_seed(7)
    for time in scheduler.timesteps:
        (ours, clean) = scheduler.step(network(ours, int(time)), time, ours, return_dict=False)

    is_flow = scheduler.config.prediction_type == "flow_prediction"
    cumprod = CogVideoXDPMScheduler(**COGVIDEOX_5B).alphas_cumprod.tolist()
    generator, eta = torch.Generator().manual_seed(7), 0.9
    x = start
    for time in range(999, 0, -125):
        v = network(x, time)
        if is_flow:
            sigma = time / 1000
            x0, e = x - sigma * v, x + (1 - sigma) * v
        else:
            ab = cumprod[time]
            x0 = ab**0.5 * x - (1 - ab) ** 0.5 * v
            e = (x - ab**0.5 * x0) / (1 - ab) ** 0.5
        if time == 124:
            x = x0
            break
        e = eta * e + (1 - eta**2) ** 0.5 * torch.randn(x.shape, generator=generator)
        if is_flow:
            sigma = (time - 125) / 1000
            x = (1 - sigma) * x0 + sigma * e
        else:
            ab = cumprod[time - 125]
            x = ab**0.5 * x0 + (1 - ab) ** 0.5 * e
    torch.testing.assert_close(ours, x, atol=2e-6, rtol=2e-6)
    assert torch.equal(ours, clean)


def test_fresh_noise_comes_from_the_argument_then_the_attribute_then_torch():
    def run(argument=None, attribute=None, seed=0):
        scheduler = flow()
        scheduler.set_timesteps(2)
        scheduler.generator = attribute
        torch.manual_seed(seed)
        return scheduler.step(torch.ones(1, 4), 999, torch.ones(1, 4), generator=argument).prev_sample

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    assert torch.equal(run(argument=seeded(1), attribute=seeded(2)), run(argument=seeded(1), seed=9))
    assert torch.equal(run(attribute=seeded(2)), run(attribute=seeded(2), seed=9))
    assert torch.equal(run(seed=3), run(seed=3))
    assert not torch.equal(run(seed=3), run(seed=4))


def test_one_generator_per_sample_makes_samples_independent_of_the_batch():
    def run(seeds, rows):
        scheduler = flow()
        scheduler.set_timesteps(2)
        state = torch.arange(8.0).reshape(2, 4)[rows]
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return scheduler.step(torch.ones_like(state), 999, state, generator=generators).prev_sample

    both = run([11, 12], [0, 1])
    assert torch.equal(both[:1], run([11], [0]))
    assert torch.equal(both[1:], run([12], [1]))


def test_low_precision_samples_are_stepped_in_float32():
    scheduler = flow()
    scheduler.set_timesteps(8)
    sample, output = (torch.randn(2, 64, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    out = scheduler.step(output, 999, sample)
    assert out.prev_sample.dtype == torch.bfloat16
    exact = sample.double() - 0.999 * output.double()
    assert torch.equal(out.pred_original_sample, exact.to(torch.bfloat16))


def test_signature_fits_the_pipelines():
    parameters = inspect.signature(TDMScheduler.step).parameters
    assert list(parameters)[1:4] == ["model_output", "timestep", "sample"]
    assert "generator" in parameters
    assert "eta" not in parameters  # CogVideoXPipeline would pass DDIM's 0
    scheduler = flow()
    sample = torch.randn(3)
    assert scheduler.order == 1
    assert scheduler.init_noise_sigma == 1
    assert scheduler.scale_model_input(sample, 5) is sample
    assert len(scheduler) == 1000


def test_config_round_trip(tmp_path):
    scheduler = vp(eta=0.25)
    scheduler.save_pretrained(tmp_path)
    loaded = TDMScheduler.from_pretrained(tmp_path)
    assert loaded.config.eta == 0.25
    assert loaded.config.prediction_type == "v_prediction"
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)


def test_from_the_config_of_the_schedulers_it_replaces():
    wan = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert TDMScheduler.from_config(wan.config).config.prediction_type == "flow_prediction"
    assert TDMScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config).alphas_cumprod is None
    two_b = CogVideoXDPMScheduler(**{**COGVIDEOX_5B, "snr_shift_scale": 3.0})
    torch.testing.assert_close(TDMScheduler.from_config(two_b.config).alphas_cumprod, two_b.alphas_cumprod.double())


def test_own_grid_and_begin_index():
    scheduler = flow()
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert scheduler.timesteps.tolist() == [900, 500, 100]
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([0.9, 0.5, 0.1, 0.0]))
    sample, output = torch.randn(2, 3)
    # Found by its time, as CogVideoXPipeline relies on, here from the middle of the grid.
    assert scheduler.step(output, torch.tensor(100), sample).prev_sample == pytest.approx(sample - 0.1 * output)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(3)
    assert scheduler.step(output, 249, sample).prev_sample == pytest.approx(sample - 0.249 * output)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="got 'epsilon'"):
        TDMScheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match=r"eta must be between 0 and 1; got 1.5"):
        TDMScheduler(eta=1.5)
    scheduler = flow()
    x = torch.zeros(1)
    with pytest.raises(RuntimeError, match="set_timesteps"):
        scheduler.step(x, 999, x)
    for bad in (0, 1001):
        with pytest.raises(ValueError, match="num_inference_steps must be between"):
            scheduler.set_timesteps(bad)
    with pytest.raises(ValueError, match="either"):
        scheduler.set_timesteps()
    for bad in ([5, 5], [1000, 3], [3, 4], [], [5, -1]):
        with pytest.raises(ValueError, match="descend strictly"):
            scheduler.set_timesteps(timesteps=bad)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"timestep 500 is not in this rollout"):
        scheduler.step(x, 500, x)
    scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match="step 1 of this rollout is at timestep 499; got 999"):
        scheduler.step(x, 999, x)
    scheduler.step(x, 499, x)
    with pytest.raises(RuntimeError, match="has ended"):
        scheduler.step(x, 499, x)
