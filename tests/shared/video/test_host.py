from dataclasses import replace

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_video.host import (
    Host,
    load_host,
    make_scheduler,
    save_host,
    to_clips,
    to_latents,
)
from hone_video.host_config import HostConfig
from hone_video.prompts import NUM_WORDS

TINY = HostConfig(
    frames=4,
    height=16,
    width=16,
    layers=1,
    heads=1,
    head_dim=32,
    ffn_dim=32,
    text_dim=16,
    steps=3,
    solver="euler",
    guidance=1.0,
)


@pytest.fixture(scope="module")
def host():
    return Host.untrained(TINY, seed=1)


class Straight(torch.nn.Module):
    """Predicts ``noise - x_0`` exactly for one known pair."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity
        self.proj_out = torch.nn.Linear(1, 1)
        self.calls = []

    def forward(self, hidden, timestep, text, return_dict=False):
        self.calls.append((timestep[0].item(), hidden.shape[0], text))
        return (self.velocity.expand_as(hidden),)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_straight_flow_is_solved_exactly(host, solver, steps):
    noise = host.noise(1, 0)
    target = torch.rand(noise.shape, generator=torch.Generator().manual_seed(2))
    known = Host(TINY, Straight(noise - to_latents(target)), host.words, host.classifier)
    seen = []
    made = known.sample(
        host.encode_prompt("a red 7 moving left, slow"),
        noise,
        steps=steps,
        solver=solver,
        on_step=lambda *step: seen.append(step),
    )
    # unipc starts at sigma 0.999...: its grid ends the interval a little short
    torch.testing.assert_close(made, target, atol=1e-5 if solver == "euler" else 5e-3, rtol=0)
    assert seen == [(step, steps) for step in range(steps)]
    times = [call[0] for call in known.transformer.calls]
    assert times[0] == pytest.approx(1000, abs=2)
    assert times == sorted(times, reverse=True)


def test_noise_levels_are_shifted():
    scheduler = make_scheduler("euler", 3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    # s u / (1 + (s - 1) u) at u = 1, 1/2
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.0])
    with pytest.raises(ValueError, match="'euler' or 'unipc'"):
        make_scheduler("heun", 3.0)


def test_guidance_mixes_conditional_and_unconditional(host):
    class Answers(Straight):
        def forward(self, hidden, timestep, text, return_dict=False):
            # 1 with a prompt, 0 without
            prompted = (text != host.words[-1]).any(-1).any(-1).to(hidden.dtype)
            return (prompted.view(-1, 1, 1, 1, 1).expand_as(hidden),)

    answers = Host(replace(TINY, guidance_interval=(0.0, 1.0)), Answers(torch.zeros(1)), host.words, host.classifier)
    text = host.encode_prompt("a red 7 moving left, slow")
    noise = torch.zeros(1, 3, 4, 16, 16)
    # one Euler step from sigma 1 to 0 subtracts 0 + 0.25 * (1 - 0); clips are (x + 1) / 2
    made = answers.sample(text, noise, steps=1, guidance=0.25)
    torch.testing.assert_close(made, torch.full_like(made, (1 - 0.25) / 2))
    torch.testing.assert_close(answers.sample(text, noise, steps=1, guidance=1.0), torch.zeros_like(made))


def test_guidance_is_limited_to_its_interval(host):
    straight = Straight(torch.zeros(1))
    limited = Host(replace(TINY, guidance=2.0, guidance_interval=(0.6, 0.95)), straight, host.words, host.classifier)
    text, noise = host.encode_prompt("a red 7 moving left, slow"), host.noise(1, 0)
    limited.sample(text, noise, steps=4)
    # shift 3 maps u = 1, 3/4, 1/2, 1/4 to sigma = 1, 0.9, 0.75, 0.5
    assert [(round(time), batch) for time, batch, _ in straight.calls] == [(1000, 1), (900, 2), (750, 2), (500, 1)]
    assert limited.evaluations(steps=4) == [1, 2, 2, 1]
    assert limited.evaluations(steps=4, guidance=1.0) == [1, 1, 1, 1]
    assert torch.equal(straight.calls[1][2], torch.cat([text, host.encode_null(1)]))


def test_prompt_tokens_are_rows_of_the_table(host):
    text = host.encode_prompt(["a red 7 moving left, slow", "a white 0 moving right, fast, textured"])
    assert text.shape == (2, 5, 16)
    # ids: digit 7, 10 + red, 17 + left, 25 + slow, 28 + plain
    torch.testing.assert_close(text[0], host.words[[7, 10, 21, 25, 28]])
    dropped = host.encode_labels(torch.zeros(2, 5, dtype=torch.long), torch.tensor([True, False]))
    torch.testing.assert_close(dropped[0], host.words[NUM_WORDS].expand(5, -1))
    torch.testing.assert_close(dropped[1], host.words[[0, 10, 17, 25, 28]])
    torch.testing.assert_close(host.encode_null(1)[0], dropped[0])


def test_noise_of_a_clip_does_not_depend_on_the_batch(host):
    assert torch.equal(host.noise(3, 7)[:2], host.noise(2, 7))
    assert not torch.equal(host.noise(2, 7)[0], host.noise(2, 7)[1])
    assert not torch.equal(host.noise(1, 7), host.noise(1, 8))


def test_an_untrained_host_predicts_zero_and_keeps_the_global_generator(host):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fresh = Host.untrained(TINY, seed=1)
    assert torch.equal(torch.rand(1), expected)
    out = fresh.transformer(fresh.noise(1, 0), torch.tensor([500.0]), fresh.encode_null(1), return_dict=False)[0]
    assert out.shape == (1, 3, 4, 16, 16)
    assert out.abs().max() == 0
    for name, value in fresh.transformer.state_dict().items():
        assert torch.equal(value, host.transformer.state_dict()[name]), name


def test_save_and_load_agree_to_half_precision(host, tmp_path):
    path = tmp_path / "host.safetensors"
    save_host(host, path)
    loaded = load_host(path=path)
    assert loaded.config == TINY
    assert loaded.facts is None
    assert not loaded.transformer.training
    for module, other in ((host.transformer, loaded.transformer), (host.classifier, loaded.classifier)):
        for name, value in module.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value.half().float(), msg=name)
    torch.testing.assert_close(loaded.words, host.words.half().float())


def test_a_missing_or_foreign_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no tiny host at"):
        load_host(path=tmp_path / "absent.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks its sidecar other\.json"):
        load_host(path=tmp_path / "other.safetensors")


def test_casting_leaves_norms_and_tables_in_float32():
    host = Host.untrained(TINY).to("cpu", torch.bfloat16)
    block = host.transformer.blocks[0]
    assert host.dtype == torch.bfloat16
    assert block.attn1.to_q.weight.dtype == torch.bfloat16
    assert block.scale_shift_table.dtype == torch.float32
    assert host.transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert host.transformer.rope.freqs_cos.dtype == torch.float32
    made = host.sample(host.encode_null(1), host.noise(1, 0), steps=1)
    assert made.dtype == torch.float32
    assert made.isfinite().all()


def test_ranges_round_trip():
    clips = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(to_latents(clips), torch.tensor([-1.0, -0.5, 1.0]))
    torch.testing.assert_close(to_clips(to_latents(clips)), clips)
    torch.testing.assert_close(to_clips(torch.tensor([-3.0, 3.0])), torch.tensor([0.0, 1.0]))


def test_wrong_settings_are_refused(host):
    with pytest.raises(ValueError, match="multiples of patch=4; got 18 x 16"):
        HostConfig(height=18, width=16, frames=2)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        HostConfig(steps=0)
    with pytest.raises(ValueError, match="guidance_interval must be"):
        HostConfig(guidance_interval=(0.9, 0.5))
    with pytest.raises(ValueError, match=r"noise must be \[1, 3, 4, 16, 16\] for 1 prompts"):
        host.sample(host.encode_null(1), torch.zeros(2, 3, 4, 16, 16))
    assert HostConfig().tokens == 1024
    assert HostConfig().grid == (16, 8, 8)
