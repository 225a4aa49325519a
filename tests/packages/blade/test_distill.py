"""Distillation of a tiny untrained host: the loop, its checkpoints, what it exports."""

import json
from dataclasses import replace

import pytest
import torch
from hone_blade import distill as module
from hone_blade.config import TDM_PRESETS, BladeConfig, DistillConfig, TDMConfig
from hone_blade.distill import Distillation, DistillReport, distill, host_task, rollout_clips, student_host
from hone_blade.models import attach
from hone_blade.tdm import fake_score_loss
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_core.testing import full_disk, requires_gpu
from hone_video.clips import random_labels
from hone_video.host import Host, load_host, save_host
from hone_video.host_config import HostConfig
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel

TINY = HostConfig(
    frames=4, height=16, width=16, layers=2, heads=1, head_dim=32, ffn_dim=32, text_dim=16, steps=2, solver="euler",
    guidance=1.0,
)  # fmt: skip
SMOKE = DistillConfig(
    attention=BladeConfig(block=16, max_density=0.5, pool=8, samples=4),
    tdm=TDMConfig(student_steps=3, teacher_guidance=2.0, regularisation=0.5),
    batch=4,
    steps=4,
    lora_rank=2,
    lr=1e-2,
    eval_clips=3,
    log_every=1,
)


@pytest.fixture
def host(tmp_path):
    """An untrained host whose output is not zero, and depends on text and time, whose weights begin as zeros."""
    made, generator = Host.untrained(TINY), torch.Generator().manual_seed(0)
    for weight in made.transformer.parameters():
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
    return save_host(made, tmp_path / "host.safetensors")


def start(path, cfg):
    return Run.start(package="hone-blade", verb="distill", config=cfg, out=path, device="cpu", quiet=True)


def losses(host, cfg, path, *, until=None):
    """Loss of each update, and the distillation."""
    made = Distillation(cfg, host_task(load_host(path=host), cfg.tdm), path)
    made.training.resume()
    found = []
    for values in made.train():
        found.append((values["loss"], values["fake_loss"]))
        if made.training.step == until:
            break
    made.training.save()
    return found, made


def test_a_stopped_run_goes_on_exactly(host, tmp_path):
    whole, first = losses(host, SMOKE, tmp_path / "whole.pt")
    part, _ = losses(host, SMOKE, tmp_path / "parts.pt", until=2)
    rest, second = losses(host, SMOKE, tmp_path / "parts.pt")
    assert part + rest == whole
    assert len(whole) == 4
    for a, b in zip(first.trio.student.parameters, second.trio.student.parameters, strict=True):
        assert torch.equal(a, b)


def test_a_full_disk_leaves_the_last_checkpoint(host, tmp_path):
    whole, _ = losses(host, SMOKE, tmp_path / "whole.pt")
    part, made = losses(host, SMOKE, tmp_path / "c.pt", until=2)
    made.update()
    with full_disk(10_000), pytest.raises(OSError, match=r"c\.pt could not be written: .*File too large"):
        made.training.save()
    assert part + losses(host, SMOKE, tmp_path / "c.pt")[0] == whole


def test_training_moves_student_and_fake_and_nothing_else(host, tmp_path):
    before = load_host(path=host).transformer.state_dict()
    _, made = losses(host, SMOKE, tmp_path / "c.pt")
    after = {name.replace(".base_layer", ""): value for name, value in made.task.model.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for adapter in (made.trio.student, made.trio.fake):
        assert all(p.abs().max() > 0 for p in adapter.parameters)


def test_rates_rise_and_the_students_falls(host, tmp_path):
    cfg = replace(SMOKE, warmup_steps=2, lr=1e-2, fake_lr=1e-3)
    made = Distillation(cfg, host_task(load_host(path=host), cfg.tdm), tmp_path / "c.pt")
    found = [tuple(x.param_groups[0]["lr"] for x in (made.student, made.fake)) for _ in made.train()]
    student = [0.5e-2, 1e-2 * (1 + 0.5**0.5) / 2, 0.5e-2, 1e-2 * (1 - 0.5**0.5) / 2]
    assert [pair[0] for pair in found] == pytest.approx(student)
    assert [pair[1] for pair in found] == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3])


def test_parts_of_a_batch_add_up(host, tmp_path):
    """With the parts' own draws, an update in two parts is the mean of both; the fake score hardly moves in between."""
    cfg = replace(SMOKE, accumulate=2, steps=1, fake_lr=1e-12)
    single = replace(SMOKE, batch=2, steps=1, fake_lr=1e-12)
    values = []
    for part in range(2):
        made = Distillation(single, host_task(load_host(path=host), single.tdm), tmp_path / f"{part}.pt")
        own = made.seed
        made.seed = lambda index, stage, own=own, part=part: own(part, stage)
        values.append(made.update())
    found = Distillation(cfg, host_task(load_host(path=host), cfg.tdm), tmp_path / "whole.pt").update()
    for name in ("fake_loss", "loss", "gap"):
        torch.testing.assert_close(found[name], (values[0][name] + values[1][name]) / 2)
        assert values[0][name] != values[1][name]


def test_a_checkpointed_update_is_the_plain_one(host, tmp_path):
    """Blocks are computed again with the adapter that they were computed with, once the two differ."""
    found = []
    for again in (False, True):
        cfg = replace(SMOKE, gradient_checkpointing=again, graphs=False)
        made = losses(host, cfg, tmp_path / f"{again}.pt", until=2)[1]
        found.append([*made.trio.student.parameters, *made.trio.fake.parameters])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_each_step_part_and_stage_has_numbers_of_its_own(host, tmp_path):
    made = Distillation(SMOKE, host_task(load_host(path=host), SMOKE.tdm), tmp_path / "c.pt")
    drawn = set()
    for made.training.step in range(2):
        drawn |= {torch.rand((), generator=made.seed(part, stage)).item() for part in range(2) for stage in range(2)}
    assert len(drawn) == 8


def test_optimisers_are_the_releases(host, tmp_path):
    """AdamW without momentum; both gradients are clipped, here to so little that eps stops the step."""
    cfg = replace(SMOKE, clip=1e-14, warmup_steps=0, weight_decay=0.02, beta2=0.9)
    made = Distillation(cfg, host_task(load_host(path=host), cfg.tdm), tmp_path / "c.pt")
    seen = made.update()
    assert min(seen["norm"], seen["fake_norm"]) > 1e-6
    for adapter in (made.trio.student, made.trio.fake):
        moved = [value for name, value in adapter.state_dict().items() if "lora_B" in name]
        assert max(float(value.abs().max()) for value in moved) < 1e-7
    for optimizer in (made.student, made.fake):
        (group,) = optimizer.param_groups
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.0, 0.9), 1e-8, 0.02)


def test_the_fake_score_is_held_to_the_unguided_teacher(host, tmp_path):
    made = Distillation(SMOKE, host_task(load_host(path=host), SMOKE.tdm), tmp_path / "c.pt")
    objective, draws = made.objective, torch.Generator()
    text, _ = made.task.draw(4, draws.manual_seed(0))
    states = objective.states(text, torch.randn(4, *made.task.shape, generator=draws), draws)
    drawn = objective.draw(4, draws, states.device)
    networks = (made.trio.network(role, text) for role in ("student", "fake", "teacher"))
    wanted = fake_score_loss(*networks, made.task.process, states, drawn, SMOKE.tdm, generator=draws.manual_seed(1))
    assert torch.equal(objective.fake_loss(text, states, drawn, draws.manual_seed(1)), wanted)
    # Without it there is less to pay.
    objective.tdm = replace(SMOKE.tdm, regularisation=0.0)
    assert (objective.fake_loss(text, states, drawn, draws.manual_seed(1)) < wanted).all()


def test_an_update_steps_along_the_gradients_of_its_losses(host, tmp_path):
    """By hand: the stages' losses from the same draws, ``backward`` and one step of AdamW each."""
    cfg = replace(SMOKE, warmup_steps=0)
    made, plain = (
        Distillation(cfg, host_task(load_host(path=host), cfg.tdm), tmp_path / f"{name}.pt") for name in "ab"
    )
    made.update()
    objective, trio, generator = plain.objective, plain.trio, plain.seed(0, 0)
    text, empty = plain.task.draw(4, generator)
    noise = torch.randn(4, *plain.task.shape, generator=generator)
    drawn = objective.draw(4, generator, noise.device)
    states = objective.states(text, noise, generator)
    for stage, optimizer in enumerate((plain.fake, plain.student)):
        if stage:
            drawn = objective.draw(4, plain.seed(0, 1), noise.device)
            loss = objective.student_loss(text, empty, states, drawn, generator)[0]
        else:
            loss = objective.fake_loss(text, states, drawn, generator)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
    for adapter in ("student", "fake"):
        for a, b in zip(getattr(made.trio, adapter).parameters, getattr(trio, adapter).parameters, strict=True):
            assert torch.equal(a, b)


@requires_gpu()
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_replayed_updates_are_the_plain_ones(tmp_path, share):
    """On the packaged host, in two parts, with a change of attention on the way.

    Dense attention by plain products: the backward of the fast one differs from run to run.
    """
    cfg = DistillConfig(batch=4, accumulate=2, steps=4, dense_share=share, log_every=1)
    found = []
    for graphs in (False, True):
        own = replace(cfg, graphs=graphs)
        made = Distillation(own, host_task(load_host("cuda", torch.bfloat16), cfg.tdm), tmp_path / f"{graphs}.pt")
        with sdpa_kernel(SDPBackend.MATH):
            values = [{name: seen[name] for name in ("loss", "fake_loss", "gap", "norm")} for seen in made.train()]
        found.append((values, [p.clone() for p in (*made.trio.student.parameters, *made.trio.fake.parameters)]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_attention_is_dense_for_the_first_share(host, tmp_path, share):
    cfg = replace(SMOKE, dense_share=share)
    made = Distillation(cfg, host_task(load_host(path=host), cfg.tdm), tmp_path / "c.pt")
    seen = [made.trio.dense for _ in made.train()]
    assert seen == [step < 4 * share for step in range(4)]


def test_the_teacher_is_guided_within_its_levels(host, tmp_path):
    tdm = TDMConfig(teacher_guidance=3.0, guidance_interval=(0.6, 0.9))
    cfg = replace(SMOKE, tdm=tdm)
    made = Distillation(cfg, host_task(load_host(path=host), tdm), tmp_path / "c.pt")
    generator = torch.Generator().manual_seed(0)
    text, empty = made.task.draw(3, generator)
    state = torch.randn(3, 3, 4, 16, 16, generator=generator)
    time = torch.tensor([599, 600, 901])
    with torch.no_grad():
        found = made.objective.teacher(text, empty)(state, time)
        conditional, unconditional = (made.trio.network("teacher", x)(state, time) for x in (text, empty))
    torch.testing.assert_close(found[::2], conditional[::2])
    torch.testing.assert_close(found[1], (unconditional + 3 * (conditional - unconditional))[1])
    assert (conditional - unconditional).abs().max() > 1e-2


def test_a_fake_score_that_diverged_is_left_alone_if_asked(host, tmp_path):
    cfg = replace(SMOKE, tdm=replace(SMOKE.tdm, skip_above=1e-9))
    _, made = losses(host, cfg, tmp_path / "c.pt")
    names = [name for name in made.trio.fake.state_dict() if "lora_B" in name]
    assert all(made.trio.fake.state_dict()[name].abs().max() == 0 for name in names)


def test_a_run_exports_a_student_that_draws(host, tmp_path):
    cfg = replace(SMOKE, host=host)
    with start(tmp_path / "run", cfg) as run:
        report = distill(cfg, run)
    assert DistillReport.of(run) == report
    with safe_open(report.lora, framework="pt") as file:
        assert json.loads(file.metadata()["hone_blade_config"])["block"] == 16
        assert json.loads(file.metadata()["hone_blade_rollout"]) == {"steps": 3, "eta": 0.9}
    facts = json.loads(report.lora.with_suffix(".json").read_text())
    assert facts["steps"] == 4
    assert "digit_accuracy" in facts["result"]
    variants = {row.variant for row in report.rows if row.metric == "accuracy"}
    assert variants == {
        "teacher, its own sampler", "teacher, 3 steps of the rollout", "the same, sparse", "student, sparse",
    }  # fmt: skip
    assert "student, sparse" in str(report)
    labels = random_labels(2, torch.Generator().manual_seed(0))
    loaded = load_host(path=host)
    settings = student_host(loaded, report.lora)
    assert settings == cfg.settings
    with attach(loaded.transformer, settings):
        clips = rollout_clips(loaded, labels, cfg.tdm, seed=0)
    plain = load_host(path=host)
    with attach(plain.transformer, settings):
        other = rollout_clips(plain, labels, cfg.tdm, seed=0)
    assert clips.shape == (2, 3, 4, 16, 16)
    assert (clips - other).abs().max() > 1e-3


def test_a_student_trained_dense_is_graded_dense(host, tmp_path, monkeypatch):
    drawn = []

    def draw(*args, **options):
        drawn.append(rollout_clips(*args, **options))
        return drawn[-1]

    monkeypatch.setattr(module, "rollout_clips", draw)
    cfg = replace(SMOKE, host=host, dense_share=1.0, steps=1)
    with start(tmp_path / "run", cfg) as run:
        report = distill(cfg, run)
    variants = {row.variant for row in report.rows if row.metric == "accuracy"}
    assert variants == {"teacher, its own sampler", "teacher, 3 steps of the rollout", "student, dense"}
    loaded, labels = load_host(path=host), random_labels(3, torch.Generator().manual_seed(1))
    student_host(loaded, report.lora)
    assert torch.equal(rollout_clips(loaded, labels, cfg.tdm, seed=1), drawn[-1])


def test_another_config_does_not_go_on(host, tmp_path):
    losses(host, SMOKE, tmp_path / "c.pt", until=1)
    with pytest.raises(CheckpointError, match="differs in lora_rank"):
        losses(host, replace(SMOKE, lora_rank=4), tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_share": 1.5}, "dense_share must lie in"),
        ({"batch": 4, "accumulate": 3}, "accumulate must divide"),
        ({"preset": "wan2.1-1.3b-free", "attention": None}, "dense_steps 0, got 12"),
        ({"preset": "none"}, "no preset 'none'"),
        ({"lora_rank": 0}, "lora_rank must be positive"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"gradient_checkpointing": True}, "add --no-graphs"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMOKE, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_steps": 0}, "student_steps must lie"),
        ({"eta": 1.1}, "eta must lie"),
        ({"first_time": 0}, "first_time and last_time"),
        ({"last_time": 999}, "first_time and last_time"),
        ({"teacher_guidance": 0.5}, "teacher_guidance must be at least 1"),
        ({"huber": 0.0}, "huber be above 0"),
        ({"intervals": "other"}, "intervals must be one of"),
    ],
)
def test_bad_settings_of_tdm_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TDMConfig(**changes)


def test_presets_say_where_they_come_from():
    assert all(preset.provenance for preset in TDM_PRESETS.values())
    wan, cog = (TDM_PRESETS[f"{name}-official"].config.huber for name in ("wan2.1-1.3b", "cogvideox-5b"))
    assert wan == pytest.approx(1e-3 / 128 * (16 * 21 * 60 * 104) ** 0.5, rel=1e-4)
    assert cog == pytest.approx(1e-3 / (128 * (60 * 90 * 16 * 13) ** 0.5), rel=1e-4)
