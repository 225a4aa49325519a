"""Distillation's objectives: against closed forms of Gaussians, and against numbers of the release's own functions."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import CogVideoXDPMScheduler
from hone_blade.config import TDM_PRESETS, TDMConfig
from hone_blade.scheduler import TDMScheduler, rollout_timesteps
from hone_blade.tdm import (
    Draw,
    diffuse,
    draw_times,
    estimate,
    fake_loss,
    fake_score_loss,
    guide,
    noised_again,
    pseudo_huber,
    rollout,
    rollout_states,
    student_loss,
    student_score_loss,
)

TIMES = rollout_timesteps(8)
VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}


def process(kind, **changes):
    made = TDMScheduler(prediction_type=f"{'flow' if kind == 'flow' else 'v'}_prediction", **changes)
    if kind == "vp":
        made.alphas_cumprod = CogVideoXDPMScheduler(**VP, snr_shift_scale=1.0).alphas_cumprod.double()
    return made


KINDS = pytest.mark.parametrize("kind", ["flow", "vp"])


def gaussian(kind, mean, std):
    """The network whose clean estimate is the posterior mean of data ``N(mean, std^2)``."""
    scheduler = process(kind)

    def network(x, t):
        alpha, sigma = scheduler.levels(t, x)
        clean = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
        return (x - clean) / sigma if kind == "flow" else (alpha * x - clean) / sigma

    return network


@KINDS
@pytest.mark.parametrize("eta", [0.0, 0.9, 1.0])
def test_a_diffused_state_has_the_law_of_its_time(kind, eta):
    """Noise to the middle by the student's own noise, then fresh noise: mean and variance of x_t given x0."""
    scheduler = process(kind, eta=eta)
    generator = torch.Generator().manual_seed(0)
    count = 200_000
    clean = torch.full((count, 1), 1.5, dtype=torch.float64)
    own = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    for start, middle, time in ((499, 375, 400), (499, 375, 375), (124, 0, 60), (999, 875, 979)):
        draw = Draw(*(torch.full((count,), value) for value in (0, start, middle, time)))
        state = noised_again(scheduler, clean, own, draw, generator=generator)
        alpha, sigma = (float(value) for value in scheduler.levels(time, clean))
        assert state.mean().item() == pytest.approx(1.5 * alpha, abs=5 * sigma / count**0.5)
        assert state.var().item() == pytest.approx(sigma**2, rel=5 * (2 / count) ** 0.5)


@KINDS
def test_two_diffusions_are_one(kind):
    """Deterministic part and variance of t1 -> t2 -> t3 are those of t1 -> t3."""
    scheduler = process(kind)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    t1, t2, t3 = (torch.tensor([value]) for value in (100, 400, 900))
    scale = diffuse(scheduler, diffuse(scheduler, one, zero, t1, t2), zero, t2, t3)
    torch.testing.assert_close(scale, diffuse(scheduler, one, zero, t1, t3))
    spread = [diffuse(scheduler, diffuse(scheduler, zero, one, t1, t2), zero, t2, t3)]
    spread.append(diffuse(scheduler, zero, one, t2, t3))
    torch.testing.assert_close(sum(part.square() for part in spread), diffuse(scheduler, zero, one, t1, t3).square())
    assert torch.equal(diffuse(scheduler, one, one, t1, t1), one)


@KINDS
def test_the_students_gradient_vanishes_where_it_is_the_teacher(kind):
    scheduler, cfg = process(kind), TDMConfig(huber=10.0, normalise=False)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2048, 1, generator=generator, dtype=torch.float64)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    own = gaussian(kind, 0.7, 0.5)

    def student(x, t):
        return own(x, t) - shift

    states, _ = rollout(student, scheduler, noise, TIMES, generator=generator)
    draw = draw_times(TIMES, 2048, cfg, generator=generator)
    loss, gap = student_score_loss(student, own, own, scheduler, states, draw, cfg, generator=generator)
    loss.sum().backward()
    assert gap.max() == 0
    assert shift.grad.abs() < 1e-12


@KINDS
@pytest.mark.parametrize("wrong", [-1.0, 0.4])
@pytest.mark.parametrize("intervals", ["separate", "overlapping"])
def test_the_students_gradient_points_to_the_teacher_elsewhere(kind, wrong, intervals):
    """A student off by ``wrong`` and a fake score that knows it: the estimate has to move by the opposite sign.

    In expectation the pull at x_t is (m_teacher - m_student) sigma^2 / (alpha^2 s^2 + sigma^2), for every sample.
    """
    scheduler, cfg = process(kind), TDMConfig(huber=10.0, normalise=False, intervals=intervals)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(512, 1, generator=generator, dtype=torch.float64)
    teacher, fake = gaussian(kind, 0.7, 0.5), gaussian(kind, 0.7 + wrong, 0.5)
    states, _ = rollout(fake, scheduler, noise, TIMES, generator=generator)
    draw = draw_times(TIMES, 512, cfg, generator=generator)
    pick = states[draw.step, torch.arange(512)]
    clean = estimate(fake, scheduler, pick, draw.start)[0].requires_grad_()
    state = noised_again(scheduler, clean, estimate(fake, scheduler, pick, draw.start)[1], draw, generator=generator)
    real, found = (estimate(net, scheduler, state, draw.time)[0] for net in (teacher, fake))
    alpha, sigma = scheduler.levels(draw.time, state)
    torch.testing.assert_close(real - found, -wrong * sigma**2 / (alpha**2 * 0.25 + sigma**2))
    student_loss(clean, real, found, huber=10.0, normalise=False).sum().backward()
    # pseudo-Huber of a small error is error^2 / (2 c)
    expected = -(real - found) / ((real - found).square() + 100).sqrt()
    torch.testing.assert_close(clean.grad, expected)
    assert (clean.grad.sign() == math.copysign(1, wrong)).all()


@KINDS
@pytest.mark.parametrize("weight", ["velocity", "uniform", "min_snr"])
def test_the_fake_score_is_best_at_the_students_distribution(kind, weight):
    """Among Gaussian scores the loss is least at the student's mean, and its gradient there is within noise of 0."""
    scheduler = process(kind)
    cfg = TDMConfig(fake_weight=weight)
    losses, slopes = {}, {}
    for mean in (-0.6, -0.3, 0.0):
        generator = torch.Generator().manual_seed(3)
        at = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
        draw = draw_times(TIMES, 20_000, cfg, generator=generator)
        x0 = -0.3 + 0.8 * torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
        noise = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
        state = scheduler.add_noise(x0, noise, draw.time)
        alpha, sigma = scheduler.levels(draw.time, state)
        clean = estimate(gaussian(kind, at, 0.8), scheduler, state, draw.time)[0]
        loss = fake_loss(clean, x0, alpha=alpha, sigma=sigma, weight=weight).mean()
        loss.backward()
        losses[mean], slopes[mean] = loss.item(), at.grad.item()
    assert losses[-0.3] < min(losses[-0.6], losses[0.0])
    assert slopes[-0.6] < 0 < slopes[0.0]
    assert abs(slopes[-0.3]) < 0.1 * min(abs(slopes[-0.6]), abs(slopes[0.0]))


@KINDS
def test_the_fake_scores_weight_is_the_error_of_the_velocity(kind):
    scheduler = process(kind)
    clean, other, x = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    time = torch.tensor([20, 124, 300, 700, 979])
    alpha, sigma = scheduler.levels(time, x)
    velocities = [((x if kind == "flow" else alpha * x) - value) / sigma for value in (clean, other)]
    loss = fake_loss(other, clean, alpha=alpha, sigma=sigma)
    torch.testing.assert_close(loss, (velocities[0] - velocities[1]).square().mean(1))
    anchored = fake_loss(other, clean, alpha=alpha, sigma=sigma, teacher=clean, regularisation=0.5)
    torch.testing.assert_close(anchored, 1.5 * loss)


@pytest.mark.parametrize("intervals", ["separate", "overlapping"])
def test_times_fill_their_intervals_evenly(intervals):
    cfg = TDMConfig(intervals=intervals)
    draw = draw_times(TIMES, 80_000, cfg, generator=torch.Generator().manual_seed(5))
    assert draw.step.bincount().float().div(80_000).sub(1 / 8).abs().max() < 0.006
    assert torch.equal(draw.start, torch.tensor(TIMES)[draw.step])
    assert torch.equal(draw.middle, draw.start - 124)
    for step, (start, low) in enumerate(zip(TIMES, (875, 750, 625, 500, 375, 250, 125, 20), strict=True)):
        times = draw.time[draw.step == step]
        high = min(start, 979) if intervals == "separate" else 979
        assert (times.min(), times.max()) == (low, high)
        assert times.double().mean().item() == pytest.approx((low + high) / 2, abs=10)


@pytest.mark.parametrize("steps", [1, 3, 8, 50])
def test_times_are_never_before_the_state_they_come_from(steps):
    draw = draw_times(rollout_timesteps(steps), 4000, TDMConfig(), generator=torch.Generator().manual_seed(6))
    assert (draw.time >= draw.middle).all()
    assert draw.time.min() >= 20


def test_pseudo_huber_by_hand():
    error = torch.tensor([0.0, 3.0, -3.0, 1e-3], dtype=torch.float64)
    torch.testing.assert_close(pseudo_huber(error, 4.0), torch.tensor([0, 1, 1, 1.25e-7], dtype=torch.float64))


def test_division_by_the_distance_ends_at_five():
    clean = torch.tensor([[1.0], [20.0]])
    teacher, fake = torch.tensor([[3.0], [0.0]]), torch.tensor([[2.0], [1.0]])
    loss = student_loss(clean, teacher, fake, huber=1e-9)
    torch.testing.assert_close(loss, torch.tensor([1 / 2, 1 / 5]))


def test_a_student_at_its_teachers_estimate_has_a_loss_of_zero():
    clean = torch.tensor([[1.0, -2.0]], requires_grad=True)
    loss = student_loss(clean, clean.detach(), clean.detach())
    loss.sum().backward()
    assert loss.tolist() == [0.0]
    assert clean.grad.tolist() == [[0.0, 0.0]]


def test_the_weight_by_signal_to_noise_ends_at_five():
    clean, other = torch.zeros(2, 3), torch.full((2, 3), 2.0)
    alpha, sigma = torch.tensor([[0.9], [0.6]]), torch.tensor([[0.1], [0.4]])
    loss = fake_loss(other, clean, alpha=alpha, sigma=sigma, weight="min_snr")
    torch.testing.assert_close(loss, torch.tensor([4 * 5.0, 4 * 2.25]))


@KINDS
def test_estimates_have_the_dtype_of_the_state(kind):
    """A network under autocast gives 16 bits; what is learned from is not rounded to them."""
    state, time = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([20, 500, 979])
    output = (0.3 * state).bfloat16()
    scheduler = process(kind)
    found = estimate(lambda x, t: output, scheduler, state, time)
    assert [x.dtype for x in found] == [torch.float32] * 2
    torch.testing.assert_close(found[0], scheduler.predict_x0(output.float(), state, time))


def test_guidance_by_hand():
    assert guide(torch.tensor(3.0), torch.tensor(1.0), 5.0) == 11.0


def test_distillation_of_a_gaussian_finds_the_teacher():
    """The whole loop on one number: a student of one step that starts 2 away ends at the teacher's mean.

    The student's step is ``mean + spread * x``; the fake score has the closed form's shape with a mean of its own.
    """
    scheduler = process("flow", eta=1.0)
    cfg = TDMConfig(student_steps=1, normalise=False, huber=1.0)
    times = rollout_timesteps(1)
    generator = torch.Generator().manual_seed(7)
    mean = torch.tensor(-1.3, dtype=torch.float64, requires_grad=True)
    believed = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    teacher = gaussian("flow", 0.7, 0.5)

    def student(x, t):
        sigma = scheduler.levels(t, x)[1]
        return (x - (mean + 0.5 * x)) / sigma

    def fake(x, t):
        return gaussian("flow", believed, 0.5)(x, t)

    optimizers = [torch.optim.Adam([mean], 0.03), torch.optim.Adam([believed], 0.1)]
    for _ in range(250):
        noise = torch.randn(256, 1, generator=generator, dtype=torch.float64)
        states, _ = rollout(student, scheduler, noise, times, generator=generator)
        for index, optimizer in ((1, optimizers[1]), (0, optimizers[0])):
            draw = draw_times(times, 256, cfg, generator=generator)
            if index:
                loss = fake_score_loss(student, fake, None, scheduler, states, draw, cfg, generator=generator)
            else:
                loss, _ = student_score_loss(student, fake, teacher, scheduler, states, draw, cfg, generator=generator)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
    assert mean.item() == pytest.approx(0.7, abs=0.1)
    assert believed.item() == pytest.approx(mean.item(), abs=0.1)


WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 3


def network(shift, text=0.2):
    return lambda x, t: torch.tanh(x @ WEIGHT * (1 + shift) + t.double().view(-1, 1, 1, 1, 1) / 1000 + shift + text)


@pytest.mark.parametrize(
    ("kind", "preset", "sample", "fake", "student"),
    [
        ("flow", "wan2.1-1.3b-official", (0.1033, -1.7792, 0.2785), 1.4204007953885394, 0.4765041756941891),
        ("vp", "cogvideox-5b-official", (-0.3972, -0.7589, -0.8075), 0.5249544059470336, 0.9957919065060309),
    ],
)
def test_values_of_the_release(kind, preset, sample, fake, student):
    """Numbers that the release's ``generate_new``, ``Predictor`` and losses gave for these networks and this noise.

    Its Wan scheduler was given noise levels t / 1000 in place of its table.
    """
    scheduler = process(kind)
    cfg = replace(TDM_PRESETS[preset].config, teacher_guidance=5.0)
    torch.manual_seed(11)
    noise = torch.randn(4, 2, 3, 4, 6, dtype=torch.float64)
    torch.randint(999, 1000, (4,))  # the release draws its first time
    states, clips = rollout(network(0.1), scheduler, noise, TIMES)
    assert clips.flatten()[:3].tolist() == pytest.approx(sample, abs=1e-4)
    index = torch.tensor([1, 3, 5, 8])
    draw = Draw(8 - index, index * 125 - 1, index * 125 - 125, torch.tensor([40, 300, 700, 979]))

    def teacher(x, t):
        return guide(network(0.4)(x, t), network(0.4, -0.3)(x, t), cfg.teacher_guidance)

    torch.manual_seed(12)
    ours = fake_score_loss(network(0.1), network(-0.2), network(0.4), scheduler, states, draw, cfg)
    assert ours.mean().item() == pytest.approx(fake, rel=1e-12)
    torch.manual_seed(12)
    ours, _ = student_score_loss(network(0.1), network(-0.2), teacher, scheduler, states, draw, cfg)
    assert ours.mean().item() == pytest.approx(student, rel=1e-12)


def test_rollout_is_the_scheduler():
    scheduler = process("flow")
    noise = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(8))

    def net(x, t):
        return torch.tanh(x + t.view(-1, 1, 1) / 1000)

    asked = []

    def counted(x, t):
        asked.append(t[0].item())
        return net(x, t)

    states, clean = rollout(net, scheduler, noise, TIMES, generator=torch.Generator().manual_seed(9))
    alone = rollout_states(counted, scheduler, noise, TIMES, generator=torch.Generator().manual_seed(9))
    assert torch.equal(alone, states)
    assert asked == TIMES[:-1]
    scheduler.set_timesteps(8)
    scheduler.generator = torch.Generator().manual_seed(9)
    state = noise
    for index, time in enumerate(scheduler.timesteps):
        torch.testing.assert_close(states[index], state)
        state = scheduler.step(net(state, time.expand(3)), time, state).prev_sample
    torch.testing.assert_close(clean, state)


@KINDS
def test_gradients_go_where_they_belong(kind):
    scheduler, cfg = process(kind), TDMConfig(regularisation=0.5)
    noise = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    weights = {name: torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for name in ("s", "f", "t")}
    nets = {name: (lambda x, t, w=w: torch.tanh(w * x)) for name, w in weights.items()}
    states, _ = rollout(nets["s"], scheduler, noise, TIMES)
    draw = draw_times(TIMES, 4, cfg)
    fake_score_loss(nets["s"], nets["f"], nets["t"], scheduler, states, draw, cfg).sum().backward()
    assert (weights["s"].grad, weights["t"].grad) == (None, None)
    assert weights["f"].grad != 0
    weights["f"].grad = None
    student_score_loss(nets["s"], nets["f"], nets["t"], scheduler, states, draw, cfg)[0].sum().backward()
    assert (weights["f"].grad, weights["t"].grad) == (None, None)
    assert weights["s"].grad != 0
