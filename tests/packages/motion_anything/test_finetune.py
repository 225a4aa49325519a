import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_motion_anything.cli import main
from hone_motion_anything.config import TokenizerConfig, TrainConfig, TransformerConfig
from hone_motion_anything.data import generated
from hone_motion_anything.finetune import Fitting, load_tokenizer, load_transformer, train
from hone_motion_anything.grammar import caption
from hone_motion_anything.humanml3d import read_clips, read_texts
from hone_motion_anything.inputs import find_trained
from hone_motion_anything.pipelines import MotionAnythingPipeline
from hone_motion_anything.texts import ClipText

# transformers wraps functions of the standard library that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
SIZES = TokenizerConfig(width=8, depth=1, codes=16, code_dim=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six generated motions as HumanML3D lays them out."""
    path = tmp_path_factory.mktemp("set")
    clips = generated(6, 0, dance=False)
    (path / "new_joint_vecs").mkdir()
    (path / "texts").mkdir()
    for index in range(6):
        np.save(path / "new_joint_vecs" / f"{index:06}.npy", clips.features[index].numpy())
        text = caption(clips.scenes, index)
        lines = [f"{text}#a/DET#0.0#0.0", "a part of it#a/DET#0.5#3.0"]
        (path / "texts" / f"{index:06}.txt").write_text("\n".join(lines) + "\n")
    (path / "train.txt").write_text("\n".join(f"{index:06}" for index in range(6)))
    return path


def start(cfg, out):
    return Run.start(
        config=cfg, package="hone-motion-anything", verb="train", out=out, seed=0, device="cpu", quiet=True, command="x"
    )


def first_stage(folder, **options):
    return TrainConfig(data=folder, tokenizer_sizes=SIZES, steps=4, batch=3, warmup_steps=2, log_every=1, **options)


def test_clips_and_their_parts(folder):
    clips = read_clips(folder, "train")
    assert [len(clip.features) for clip in clips] == [50, 80] * 6
    assert clips[0].name == "000000[10:60]"
    assert clips[0].captions == ("a part of it",)
    assert torch.equal(clips[0].features, clips[1].features[10:60])


def test_both_stages_train_and_load(folder, clip, tmp_path):
    cfg = first_stage(folder)
    with start(find_trained(cfg), tmp_path / "first") as run:
        report = train(cfg, run)
    tokenizer = load_tokenizer(report.weights)
    assert tokenizer.encode(generated(1, 3, dance=False).features).shape == (1, 20, 6)
    sizes = TransformerConfig(width=16, heads=2, hidden=16, layers=2, codes=16, max_tokens=24, text_width=8)
    second = replace(cfg, stage="transformer", tokenizer=report.weights, text_encoder=clip, transformer=sizes)
    with start(find_trained(second), tmp_path / "second") as run:
        report = train(second, run)
    assert load_transformer(report.weights).cfg == sizes
    first = tmp_path / "first" / "artifacts" / "tokenizer.safetensors"
    pipe = MotionAnythingPipeline.from_files(tokenizer=first, transformer=report.weights, clip=clip)
    assert pipe(["a person walks"], [24])[0].shape == (24, 263)
    assert "loss" in str(report)
    with pytest.raises(CheckpointError):
        load_tokenizer(report.weights)
    wrong = replace(second, transformer=replace(sizes, text_width=9))
    with pytest.raises(ValueError, match="gives texts of 8 numbers and the transformer takes 9"):
        Fitting(wrong, read_clips(folder, "train"), Alone(), torch.device("cpu"), Path("unused"))


class Alone:
    """What accelerate says of one process."""

    process_index, num_processes, is_main_process = 0, 1, True


def test_a_stopped_training_goes_on_as_if_it_had_not(folder, tmp_path):
    cfg = first_stage(folder)
    clips = read_clips(folder, "train")

    def fitting(name):
        return Fitting(cfg, clips, Alone(), torch.device("cpu"), tmp_path / name)

    whole = fitting("whole.pt")
    for _ in whole.train():
        pass
    cut = fitting("cut.pt")
    for at, _ in enumerate(cut.train()):
        if at == 1:
            break
    cut.training.save()
    again = fitting("cut.pt")
    assert again.training.resume()
    for _ in again.train():
        pass
    for first, second in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)


def test_a_training_that_is_stopped_after_its_last_step_still_reports_its_loss(folder, tmp_path, monkeypatch):
    cfg = first_stage(folder)

    def stopped(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hone_motion_anything.finetune.hosts.save_host", stopped)
        with pytest.raises(KeyboardInterrupt), start(cfg, tmp_path / "run") as run:
            train(cfg, run)
    with start(cfg, tmp_path / "run") as run:
        report = train(cfg, run)
    logged = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == 4
    assert next(row.value for row in report.rows if row.metric == "loss") == logged[-1]


def test_texts_have_clips_vectors(clip):
    encode = ClipText(clip)
    found = encode(["a person walks", "walk", "a person walks"])
    assert found.shape == (3, 8)
    assert torch.equal(found[0], found[2])
    # Padding changes nothing.
    assert torch.allclose(found[1], encode(["walk"])[0], atol=1e-6)
    assert encode(["a " * 200]).shape == (1, 8)
    with pytest.raises(ValueError, match="text 1 is empty"):
        encode(["a", " "])
    with pytest.raises(CheckpointError, match="holds no CLIP"):
        ClipText(clip / "nowhere")


def test_damaged_sets_are_refused_by_file_and_line(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "set")
    features = np.load(copy / "new_joint_vecs" / "000002.npy")
    features[5, 7] = np.nan
    np.save(copy / "new_joint_vecs" / "000002.npy", features)
    with pytest.raises(ValueError, match=r"000002\.npy, row 5: a feature is not finite"):
        read_clips(copy, "train")
    np.save(copy / "new_joint_vecs" / "000002.npy", features[:, :251])
    with pytest.raises(ValueError, match=r"000002\.npy: expected \[rows, 263\] for HumanML3D; got \[80, 251\]"):
        read_clips(copy, "train")
    (copy / "new_joint_vecs" / "000002.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"000002\.npy, which train\.txt lists"):
        read_clips(copy, "train")
    with pytest.raises(FileNotFoundError, match=r"val\.txt"):
        read_clips(copy, "val")
    path = tmp_path / "a.txt"
    for text, message in (
        ("walks#a#0.0#0.0\n#a#0.0#0.0\n", "line 2: the caption is empty"),
        ("walks#0.0\n", "line 1: expected caption#words#start#end"),
        ("\n", "holds no caption"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_texts(path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--data", "nowhere"), "train.txt; expected a folder of HumanML3D"),
        (("--data", "F", "--stage", "transformer"), "the transformer needs --tokenizer"),
        (("--data", "F", "--steps", "0"), "steps must be at least 1"),
    ],
)
def test_bad_input(argv, message, folder, tmp_path, monkeypatch, capsys):
    argv = [str(folder) if word == "F" else word for word in argv]
    monkeypatch.setattr(
        sys, "argv", ["hone-motion-anything", "train", *argv, "--out", str(tmp_path / "run"), "--quiet"]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert message in capsys.readouterr().err


class Meeting:
    """Two processes of accelerate as two threads: each is one, and ``reduce`` waits for the other."""

    device, num_processes = torch.device("cpu"), 2

    def __init__(self, index, barrier, values):
        self.process_index, self.is_main_process = index, index == 0
        self.barrier, self.values = barrier, values

    def reduce(self, value, how):
        assert how == "mean"
        self.values[self.process_index] = value.clone()
        self.barrier.wait()
        found = (self.values[0] + self.values[1]) / 2
        self.barrier.wait()
        return found


@pytest.mark.slow
def test_two_processes_train_one_model(folder, tmp_path):
    barrier, values = threading.Barrier(2, timeout=60), {}
    cfg = TrainConfig(data=folder, tokenizer_sizes=SIZES, steps=4, batch=4, warmup_steps=2, log_every=1)
    clips = read_clips(folder, "train")
    both = [
        Fitting(cfg, clips, Meeting(index, barrier, values), torch.device("cpu"), tmp_path / f"{index}.pt")
        for index in (0, 1)
    ]
    assert {tuple(one._batch()) for one in both} != {tuple(both[0]._batch())}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda one: list(one.train()), both))
    wanted, other = (one.model.state_dict() for one in both)
    assert all(torch.allclose(value, other[name], atol=1e-6) for name, value in wanted.items())

    settings = {"tokenizer_sizes": asdict(SIZES), "steps": 4, "batch": 4, "warmup_steps": 2, "log_every": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"),
        *(sys.executable, "-c", "from hone_motion_anything.cli import main; main()", "train", "--data", folder),
        *("--config", tmp_path / "config.json", "--device", "cpu", "--out", tmp_path / "run", "--quiet"),
    ]
    subprocess.run([*map(str, command)], check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    # The exported weights are halves; the checkpoint is not.
    found = torch.load(tmp_path / "run" / "artifacts" / "checkpoint.pt", weights_only=True)["parts"]["model"]
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(value, wanted[name], atol=1e-6) for name, value in found.items())
