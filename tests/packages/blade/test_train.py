import json
import math
from dataclasses import replace

import pytest
import torch
from hone_blade.config import TrainHostConfig
from hone_blade.train import _TrainState, train_host
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_core.training import TrainReport
from hone_video.clips import fake_batch, segment_glyphs
from hone_video.flow import PatchLinear, flow_loss, sample_sigma
from hone_video.host import Host, load_host, to_latents
from hone_video.host_config import HostConfig

SMOKE = TrainHostConfig(
    host=HostConfig(
        frames=4, height=16, width=16, layers=1, heads=1, head_dim=32, ffn_dim=32, steps=2, solver="euler", guidance=1.0
    ),
    glyphs="segments",
    batch=4,
    steps=4,
    warmup_steps=2,
    classifier_steps=3,
    classifier_batch=8,
    eval_clips=4,
    eval_samplers=(("unipc", 2, 1.0), ("euler", 1, 2.0)),
    log_every=2,
)


def start(path, cfg=SMOKE, command=""):
    return Run.start(
        package="hone-blade", verb="train-host", config=cfg, out=path, device="cpu", quiet=True, command=command
    )


def test_patch_linear_is_the_convolution():
    conv = torch.nn.Conv3d(3, 8, (1, 4, 4), stride=(1, 4, 4))
    linear = PatchLinear(3, 8, (1, 4, 4), stride=(1, 4, 4))
    linear.load_state_dict(conv.state_dict())
    video = torch.randn(2, 3, 3, 8, 12)
    torch.testing.assert_close(linear(video), conv(video), atol=1e-5, rtol=1e-5)


def test_flow_loss_is_the_error_of_the_velocity():
    class Half(torch.nn.Module):
        def forward(self, hidden, timestep, text, return_dict):
            self.seen = hidden, timestep
            return (torch.full_like(hidden, 0.5),)

    model = Half()
    latents, noise = torch.full((2, 3, 1, 2, 2), -1.0), torch.full((2, 3, 1, 2, 2), 2.0)
    loss = flow_loss(model, latents, torch.zeros(2, 1, 1), torch.tensor([0.25, 0.5]), noise)
    # velocity 2 - (-1) = 3; error 2.5; x = (1 - sigma) * -1 + sigma * 2
    assert loss.item() == pytest.approx(6.25)
    assert model.seen[0][:, 0, 0, 0, 0].tolist() == pytest.approx([-0.25, 0.5])
    assert model.seen[1].tolist() == pytest.approx([250.0, 500.0])


def test_noise_levels_follow_their_law():
    def draw(shift, uniform):
        generator = torch.Generator().manual_seed(0)
        return sample_sigma(20_000, shift=shift, uniform=uniform, generator=generator)

    flat = draw(1.0, 1.0)
    assert flat.mean().item() == pytest.approx(0.5, abs=0.01)
    assert flat.var().item() == pytest.approx(1 / 12, abs=0.005)
    normal = draw(1.0, 0.0)
    # P(sigma < sigmoid(1)) is the normal distribution function at 1
    assert (normal < 1 / (1 + math.exp(-1))).float().mean().item() == pytest.approx(0.8413, abs=0.01)
    shifted = draw(3.0, 1.0)
    # the median of u is 1/2, which the shift maps to 3/4
    assert shifted.median().item() == pytest.approx(0.75, abs=0.01)
    assert shifted.min() > 0
    assert shifted.max() < 1


def test_a_run_exports_a_host_that_samples(tmp_path):
    with start(tmp_path / "run", command="hone-blade train-host --steps 4") as run:
        report = train_host(SMOKE, run)
    assert report.steps == 4
    assert report.checkpoint == run.artifacts / "host.safetensors"
    assert not report.passed
    assert TrainReport.of(run) == report
    assert "a gate is missed" in str(report)
    host = load_host(path=report.checkpoint)
    assert host.facts.command == "hone-blade train-host --steps 4"
    assert host.facts.steps == 4
    assert host.facts.details["clips_seen"] == 16
    assert host.facts.gates == {"digit": 0.9, "direction": 0.9}
    rows = {(row.metric, row.variant) for row in run.rows}
    for variant in ("euler-2-guidance1", "unipc-2-guidance1", "euler-1-guidance2"):
        assert ("digit_accuracy", variant) in rows
    assert ("digit_accuracy", "renders") in rows
    logged = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [2, 4]
    assert all(line["loss"] > 0 for line in logged)
    assert (run.figures / "samples.png").stat().st_size > 1000
    # four steps moved the weights, and what is shipped is their average
    fresh = Host.untrained(SMOKE.host, seed=SMOKE.seed)
    assert host.transformer.proj_out.weight.abs().max() > 0
    assert fresh.transformer.proj_out.weight.abs().max() == 0


def batches(cfg, steps, path, *, stop=None):
    """Train a fresh state and return its weights and losses; with ``stop``, in two parts."""
    losses = []
    for last in [stop, steps] if stop else [steps]:
        generator = torch.Generator().manual_seed(cfg.seed)
        state = _TrainState(cfg, Host.untrained(cfg.host, seed=cfg.seed), path, generator)
        state.training.resume()
        for values in state.train(segment_glyphs()):
            losses += [values["loss"]] if values else []
            if state.training.step == last:
                break
        state.training.save()
    return state, losses


def test_resuming_equals_going_on(tmp_path):
    cfg = replace(SMOKE, steps=6, log_every=1)
    whole, losses = batches(cfg, 6, tmp_path / "whole.pt")
    parts, resumed = batches(cfg, 6, tmp_path / "parts.pt", stop=3)
    assert losses == resumed
    for name, value in whole.ema.state_dict().items():
        assert torch.equal(value, parts.ema.state_dict()[name]), name
    assert parts.training.elapsed() > 0


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    cfg = replace(SMOKE, steps=2)
    batches(cfg, 2, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="another configuration"):
        batches(replace(cfg, lr=1e-4), 2, tmp_path / "state.pt")


def test_training_learns_a_single_clip():
    cfg = replace(SMOKE, steps=60, warmup_steps=5, drop=0.0)
    host = Host.untrained(cfg.host, seed=0)
    batch = fake_batch(cfg.host.clip, seed=0, count=1)
    latents, text = (
        to_latents(batch.clips).expand(4, -1, -1, -1, -1),
        host.encode_labels(batch.labels).expand(4, -1, -1),
    )
    optimizer = torch.optim.AdamW(host.transformer.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(cfg.steps):
        sigma = sample_sigma(4, shift=3.0, uniform=0.2, generator=generator)
        loss = flow_loss(host.transformer, latents, text, sigma, torch.randn(latents.shape, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # at the start the prediction is 0 and the loss is the velocity's power, about 1 + mean(x_0 ** 2)
    assert losses[0] == pytest.approx(1 + latents.square().mean().item(), rel=0.1)
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0]


def test_learning_rate_warms_up_and_falls(tmp_path):
    cfg = replace(SMOKE, steps=100, warmup_steps=10)
    state = _TrainState(cfg, Host.untrained(cfg.host), tmp_path / "none.pt", torch.Generator())
    factors = []
    for step in range(101):
        state.training.step = step
        factors.append(state.lr_factor())
    assert factors[0] == pytest.approx(0.1 * 1.0)
    assert factors[9] == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 0.09)))
    assert factors[50] == pytest.approx(0.505)
    assert factors[100] == pytest.approx(0.01)
    assert max(factors) == factors[9]


def test_muon_gets_the_matrices_of_the_blocks(tmp_path):
    state = _TrainState(SMOKE, Host.untrained(SMOKE.host), tmp_path / "none.pt", torch.Generator())
    muon, adamw = ([p for group in optimizer.param_groups for p in group["params"]] for optimizer in state.optimizers)
    # one block: q, k, v, out of two attentions, and two of the feed-forward
    assert len(muon) == 10
    assert all(p.ndim == 2 for p in muon)
    assert len(muon) + len(adamw) == len(list(state.model.parameters()))


def test_starting_from_other_weights(tmp_path):
    with start(tmp_path / "first") as run:
        first = train_host(SMOKE, run)
    cfg = replace(SMOKE, steps=1, lr=1e-9, adamw_lr=1e-9, start=first.checkpoint)
    with start(tmp_path / "second", cfg) as run:
        second = train_host(cfg, run)
    one, two = load_host(path=first.checkpoint), load_host(path=second.checkpoint)
    for name, value in one.transformer.state_dict().items():
        torch.testing.assert_close(two.transformer.state_dict()[name], value, msg=name)
    wider = replace(SMOKE, host=replace(SMOKE.host, ffn_dim=64), start=first.checkpoint)
    with pytest.raises(CheckpointError, match="another architecture"), start(tmp_path / "third", wider) as run:
        train_host(wider, run)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="minutes must be positive"):
        TrainHostConfig(minutes=0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        TrainHostConfig(steps=0)
    with pytest.raises(ValueError, match="drop must be in"):
        TrainHostConfig(drop=1.0)
