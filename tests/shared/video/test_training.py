import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.testing import assert_close
from hone_video.training import Group, Loop, data_index, seeded
from hone_video.training_config import LoopConfig
from training_worker import train

WORKER = Path(__file__).with_name("training_worker.py")


def logged(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The worker's trainings in two processes, as accelerate launch starts them."""
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(WORKER), str(out)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted training of six steps in one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, train(out, steps=6)


def test_every_item_comes_once_in_a_pass_and_passes_differ():
    first, second = ([data_index(i + at, 7, seed=1) for i in range(7)] for at in (0, 7))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert first == [data_index(i, 7, seed=1) for i in range(7)]
    assert seeded(1, "a", 2).initial_seed() != seeded(1, "b", 2).initial_seed()


def test_a_broken_off_training_goes_on_as_if_it_had_not_been(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", steps=6, stop=3)
    assert len(logged(tmp_path / "run")) == 3
    # The checkpoint is of step 2, so step 3 is done again, and logged once.
    weights = train(tmp_path / "run", steps=6)
    assert logged(tmp_path / "run") == logged(whole[0])
    assert all(torch.equal(weights[key], value) for key, value in whole[1].items())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["00000006"]


def test_a_training_without_a_checkpoint_begins_anew_and_is_logged_once(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", steps=6, stop=1)
    assert len(logged(tmp_path / "run")) == 1
    train(tmp_path / "run", steps=6)
    assert logged(tmp_path / "run") == logged(whole[0])


def test_micro_batches_change_nothing_but_the_order_of_sums(whole, tmp_path):
    weights = train(tmp_path / "run", steps=6, micro_batch=4)
    for key, value in whole[1].items():
        assert_close(weights[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "fsdp"])
def test_two_processes_do_what_one_does(whole, launched, kind):
    for line, other in zip(logged(launched / kind), logged(whole[0]), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["norm"] == pytest.approx(other["norm"], rel=1e-3)
    weights = torch.load(launched / f"{kind}.pt")
    assert weights.keys() == whole[1].keys()
    for key, value in whole[1].items():
        assert_close(weights[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_one_process_goes_on_from_the_checkpoint_of_two(whole, launched):
    assert [path.name for path in (launched / "stopped" / "checkpoints").iterdir()] == ["00000004"]
    train(launched / "stopped", steps=6)
    for line, other in zip(logged(launched / "stopped"), logged(whole[0]), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_rate_and_average_by_hand(tmp_path):
    """A gradient of one at every step: AdamW then moves by the learning rate."""
    from hone_core.runs import Run

    cfg = LoopConfig(steps=5, batch=1, lr=0.1, warmup_steps=4, clip=10.0)
    with Run.start(package="hone-video", verb="train", config=cfg, out=tmp_path / "run", device="cpu") as run:
        loop, model = Loop(cfg, run), torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        loop.prepare(model, {"student": Group(lr=cfg.lr, ema=0.3)})
        value = average = 0.0
        # The rate rises over four steps; the decay is (1 + n) / (10 + n) after n, until that is more than the group's.
        for rise, decay in zip((0.25, 0.5, 0.75, 1.0, 1.0), (2 / 11, 3 / 12, 0.3, 0.3, 0.3), strict=True):
            (part,) = loop.parts()
            loop.backward(loop.model(torch.ones(1, 1)).sum(), part)
            assert loop.apply("student") == pytest.approx(1.0)
            value -= 0.1 * rise
            average = decay * average + (1 - decay) * value
            assert float(model.weight.detach()) == pytest.approx(value, abs=1e-6)
            assert float(loop.weights("student")["weight"]) == pytest.approx(average, abs=1e-6)
        assert float(loop.weights("student", averaged=False)["weight"]) == pytest.approx(-0.35, abs=1e-6)


def test_weights_that_are_not_finite_reach_no_checkpoint(tmp_path):
    """A loss may be finite where its gradient is not."""
    from hone_core.runs import Run

    cfg = LoopConfig(steps=2, batch=1, checkpoint_every=1)
    with Run.start(package="hone-video", verb="train", config=cfg, out=tmp_path / "run", device="cpu") as run:
        loop, model = Loop(cfg, run), torch.nn.Linear(1, 1, bias=False)
        loop.prepare(model, {"student": Group(lr=cfg.lr)})

        def update():
            if loop.step == 1:
                model.weight.data.fill_(torch.inf)
            return {"loss": 1.0}

        with pytest.raises(RuntimeError, match=r"student\.parameters\.weight holds NaN or infinity after step 2"):
            loop.follow(update)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["00000001"]


def test_what_is_no_checkpoint_is_refused(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", steps=6, stop=3)
    with pytest.raises(CheckpointError, match="is no checkpoint of this training"):
        train(tmp_path / "run", steps=6, kind="full")
    (file,) = (tmp_path / "run" / "checkpoints").glob("*/*.distcp")
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"of this training \([\w :]+\)\. Pass another --out"):
        train(tmp_path / "run", steps=6)


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp

    save, calls = dcp.save, []

    def full(state, **options):
        calls.append(1)
        if len(calls) == 2:
            raise dcp.CheckpointException("no", {0: (OSError(28, "No space left on device"), [])})
        return save(state, **options)

    monkeypatch.setattr(dcp, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path / "run", steps=6)
    assert (tmp_path / "run" / "checkpoints" / "00000002" / "state.json").is_file()
    monkeypatch.undo()
    train(tmp_path / "run", steps=6)
    assert len(logged(tmp_path / "run")) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch": 3, "micro_batch": 2}, "multiple of micro_batch"),
        ({"lr": 0.0}, "lr and clip must be positive"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        LoopConfig(**change)


def test_other_ways_to_spread_a_model_are_refused(tmp_path, monkeypatch):
    import accelerate
    from hone_core.runs import Run

    for kind in (accelerate.DistributedType.FSDP, accelerate.DistributedType.DEEPSPEED):
        monkeypatch.setattr(accelerate.Accelerator, "distributed_type", kind)
        run = Run.start(package="hone-video", verb="train", out=tmp_path / "run", device="cpu")
        with pytest.raises(ValueError, match=f"or with FSDP2; got {kind.value}. Launch with --use_fsdp"):
            Loop(LoopConfig(), run)


def test_every_process_has_whole_weights_under_fsdp(tmp_path, monkeypatch):
    """As ``accelerate launch`` sets it: on, which is for models that only the first process loads."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from hone_core.runs import Run

    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    Loop(LoopConfig(), Run.start(package="hone-video", verb="train", out=tmp_path / "run", device="cpu"))
    assert not FullyShardedDataParallelPlugin().cpu_ram_efficient_loading


def test_a_batch_that_processes_cannot_share(tmp_path, monkeypatch):
    import accelerate
    from hone_core.runs import Run

    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 3)
    run = Run.start(package="hone-video", verb="train", out=tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match="batch must be a multiple of processes times micro_batch, 3 x 1; got 8"):
        Loop(LoopConfig(), run)
