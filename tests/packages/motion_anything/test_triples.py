import pickle
import shutil

import numpy as np
import pytest
import torch
from hone_core.runs import Run
from hone_motion_anything.config import MakeSetConfig, TokenizerConfig, TrainConfig, TransformerConfig
from hone_motion_anything.data import generated
from hone_motion_anything.exports import write_bvh
from hone_motion_anything.features import recover
from hone_motion_anything.finetune import Fitting, train
from hone_motion_anything.grammar import caption
from hone_motion_anything.inputs import find_trained
from hone_motion_anything.music import click_track, music_features, pooled, write_wav
from hone_motion_anything.triples import is_triples, make_set, read_triples, write_triples

SIZES = TokenizerConfig(width=8, depth=1, codes=16, code_dim=4)


def start(cfg, out, verb):
    return Run.start(
        config=cfg, package="hone-motion-anything", verb=verb, out=out, seed=0, device="cpu", quiet=True, command="x"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine generated motions: of texts, of texts with music, of music."""
    path = tmp_path_factory.mktemp("triples")
    return write_triples(path, {"train": 9, "val": 2}, 3, ("text", "both", "music"))


def test_what_is_written_is_read_again(folder):
    assert is_triples(folder)
    clips = read_triples(folder, "train")
    assert [clip.name for clip in clips] == [f"train{index:05}[0:80]" for index in range(9)]
    for turn, kind in enumerate(("text", "both", "music")):
        made = generated(3, 4000 + turn, dance=kind != "text")
        for index, clip in enumerate(clips[turn::3]):
            assert torch.equal(clip.features, made.features[index])
            assert clip.captions == (() if kind == "music" else (caption(made.scenes, index),))
            if kind == "text":
                assert clip.music is None
            else:
                # A file holds sixteen bits of a sample.
                assert clip.music.shape == (20, 35)
                assert (clip.music - made.music[index]).abs().max() < 0.05
    assert len(read_triples(folder, "val")) == 2
    assert clips[0].captions != read_triples(folder, "val")[0].captions or not torch.equal(
        clips[0].features, read_triples(folder, "val")[0].features
    )


def aist(path, frames):
    rng = np.random.default_rng(0)
    data = {
        "smpl_poses": 0.05 * rng.normal(size=(frames, 72)),
        "smpl_scaling": np.array([90.0]),
        "smpl_trans": np.tile([0.0, 90.0, 0.0], (frames, 1)),
    }
    path.write_bytes(pickle.dumps(data))


def test_dances_of_aist_take_their_music_by_name_and_long_ones_are_cut(tmp_path):
    for name in ("motions", "music"):
        (tmp_path / name).mkdir()
    track = click_track(90, 0.1, 16.0)
    write_wav(track, tmp_path / "music" / "mBR0.wav")
    name = "gBR_sBM_cAll_d04_mBR0_ch01"
    aist(tmp_path / "motions" / f"{name}.pkl", 15 * 60)
    (tmp_path / "train.txt").write_text(name)
    clips = read_triples(tmp_path, "train")
    # Fifteen seconds at twenty frames a second, a row less than frames.
    assert [clip.name for clip in clips] == [f"{name}[0:196]", f"{name}[196:299]"]
    assert [len(clip.features) for clip in clips] == [196, 103]
    heard = music_features(track)
    assert torch.allclose(clips[1].music, pooled(heard[196:299]), atol=0.05)
    assert clips[0].captions == ()
    (tmp_path / "music" / "mBR0.wav").rename(tmp_path / "music" / "other.wav")
    with pytest.raises(FileNotFoundError, match=r"neither .*ch01\.wav nor .*mBR0\.wav"):
        read_triples(tmp_path, "train")


def test_parts_of_a_motion_have_their_part_of_the_music_and_other_formats_are_read(folder, tmp_path):
    (tmp_path / "motions").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "music").mkdir()
    joints = recover(generated(1, 5, dance=True).features[0])
    write_bvh(joints.double(), tmp_path / "motions" / "a.bvh")
    np.save(tmp_path / "motions" / "b.npy", joints.numpy())
    track = click_track(120, 0.0, 4.0)
    write_wav(track, tmp_path / "music" / "a.wav")
    (tmp_path / "texts" / "a.txt").write_text("turns##0.5#3.0\ndances##0.0#0.0\n")
    (tmp_path / "texts" / "b.txt").write_text("dances##0.0#0.0\n")
    (tmp_path / "train.txt").write_text("a\nb\n")
    part, whole, other = read_triples(tmp_path, "train")
    assert (part.name, part.captions, whole.captions) == ("a[10:60]", ("turns",), ("dances",))
    assert torch.equal(part.features, whole.features[10:60])
    assert torch.allclose(part.music, pooled(music_features(track)[10:60]), atol=0.05)
    assert other.music is None
    assert (recover(other.features) - recover(whole.features)).abs().max() < 0.01


def test_damaged_sets_are_refused_by_file(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "set")
    write_wav(click_track(100, 0.0, 2.0), copy / "music" / "train00001.wav")
    with pytest.raises(
        ValueError, match=r"train00001\.wav: the music is shorter than the motion .*train00001\.npy: 2\.00 of 4\.00 s"
    ):
        read_triples(copy, "train")
    (copy / "music" / "train00001.wav").unlink()
    (copy / "texts" / "train00001.txt").unlink()
    with pytest.raises(ValueError, match=r"train00001\.npy has neither a text .*train00001\.txt nor music"):
        read_triples(copy, "train")
    (copy / "motions" / "train00001.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no motion .*train00001 "):
        read_triples(copy, "train")
    features = np.load(copy / "motions" / "train00000.npy")
    features[3, 9] = np.inf
    np.save(copy / "motions" / "train00000.npy", features)
    with pytest.raises(ValueError, match=r"train00000\.npy, row 3: a feature is not finite"):
        read_triples(copy, "train")
    joints = recover(torch.from_numpy(np.load(folder / "motions" / "train00000.npy"))).numpy()
    joints[3, 15] = joints[3, 12]
    np.save(copy / "motions" / "train00000.npy", joints)
    with pytest.raises(ValueError, match=r"train00000\.npy, frame 3: neck and head are in one place"):
        read_triples(copy, "train")
    with pytest.raises(FileNotFoundError, match=r"test\.txt"):
        read_triples(copy, "test")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
def test_both_stages_train_on_text_music_and_dance(clip, tmp_path):
    made = MakeSetConfig(train=9, val=1, test=1, kinds=("text", "both", "music"))
    with start(made, tmp_path / "made", "make-set") as run:
        folder = make_set(made, run).folder
    cfg = TrainConfig(data=folder, tokenizer_sizes=SIZES, steps=3, batch=3, warmup_steps=2, log_every=1)
    with start(find_trained(cfg), tmp_path / "first", "train") as run:
        tokenizer = train(cfg, run).weights
    sizes = TransformerConfig(width=16, heads=2, hidden=16, layers=2, codes=16, max_tokens=24, text_width=8)
    second = TrainConfig(
        data=folder, stage="transformer", tokenizer=tokenizer, text_encoder=clip, transformer=sizes, steps=12, batch=4,
        warmup_steps=2, log_every=1,
    )  # fmt: skip
    fitting = Fitting(second, read_triples(folder, "train"), Alone(), torch.device("cpu"), tmp_path / "c.pt")
    seen = []
    forward = fitting.model.forward

    def watch(ids, condition, valid):
        seen.append(condition)
        return forward(ids, condition, valid)

    fitting.model.forward = watch
    before = fitting.model.music_in.weight.clone()
    for _ in fitting.train():
        pass
    # Batches with music and without, and a dance without a caption never shows its text's place.
    assert {condition.music is None for condition in seen} == {True, False}
    for condition in seen:
        if condition.music is not None:
            assert condition.music.shape == (4, 20, 35)
        empty = (condition.text == 0).all(-1)
        assert condition.no_text[empty].all()
    assert any(bool((condition.text == 0).all(-1).any()) for condition in seen)
    assert not torch.equal(fitting.model.music_in.weight, before)


class Alone:
    """What accelerate says of one process."""

    process_index, num_processes, is_main_process = 0, 1, True
