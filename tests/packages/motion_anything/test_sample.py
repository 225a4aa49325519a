import sys

import numpy as np
import pytest
import torch
from hone_motion_anything.cli import main
from hone_motion_anything.config import GenerateConfig
from hone_motion_anything.exports import read_bvh, write_bvh
from hone_motion_anything.grammar import draw_scenes, perform
from hone_motion_anything.music import click_track, write_wav
from hone_motion_anything.sample import edit_cells


def run(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["hone-motion-anything", "generate", *map(str, argv), "--quiet"])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture
def motion(tmp_path):
    return write_bvh(perform(draw_scenes(1, torch.Generator().manual_seed(0)))[0], tmp_path / "motion.bvh")


def test_texts_and_music(untrained, tmp_path, monkeypatch, capsys):
    track = write_wav(click_track(100, 0.1, 5.0), tmp_path / "track.wav")
    texts = ("--text", "a person bows", "--text", "someone jumps")
    code, out, err = run(
        monkeypatch, capsys, *texts, "--music", track, "--host", untrained, "--to", "bvh", "npy", "--steps", "2",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    *files, said = out.splitlines()
    files = [line.rsplit("/", 1)[1] for line in files]
    assert files == ["motion-000.bvh", "motion-000.npy", "motion-001.bvh", "motion-001.npy"]
    assert (tmp_path / "run" / "artifacts" / "music.wav").stat().st_size == 44 + 2 * 4 * 15_360
    joints = [np.load(tmp_path / "run" / "artifacts" / f"motion-00{i}.npy") for i in (0, 1)]
    assert joints[0].shape == (80, 22, 3)
    assert not np.array_equal(*joints)
    found = [read_bvh(tmp_path / "run" / "artifacts" / f"motion-00{i}.bvh")[0].numpy() for i in (0, 1)]
    off = 1000 * np.linalg.norm(np.array(found) - joints, axis=-1)
    assert f"bvh: bones of one length, joints {off.mean():.1f} mm off on average, {off.max():.1f} mm at most" in said
    assert off.max() > 1


def test_music_alone_and_an_edit(untrained, motion, tmp_path, monkeypatch, capsys):
    track = write_wav(click_track(100, 0.1, 5.0), tmp_path / "track.wav")
    code, out, err = run(
        monkeypatch, capsys, "--music", track, "--edit", motion, "--edit-parts", "left arm", "--edit-seconds", 1, 2,
        "--host", untrained, "--to", "bvh", "npy", "--bones", "stretched", "--steps", "2", "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    assert "mm" not in out.replace(str(tmp_path), "")
    found = read_bvh(tmp_path / "run" / "artifacts" / "motion-000.bvh")[0]
    assert found.shape == (80, 22, 3)
    assert np.abs(found.numpy() - np.load(tmp_path / "run" / "artifacts" / "motion-000.npy")).max() < 1e-5


def test_cells_of_an_edit():
    base = {"texts": ("a",), "edit": "x"}
    whole = edit_cells(GenerateConfig(**base))
    assert whole.all()
    part = edit_cells(GenerateConfig(**base, edit_parts=("torso",)))
    assert part[..., 3].all()
    assert part.sum() == 20
    # From second 1.1, within the sixth token, to second 2: tokens 5 to 9.
    between = edit_cells(GenerateConfig(**base, edit_seconds=(1.1, 2.0)))
    assert between[0, :, 0].nonzero()[:, 0].tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "say what to make"),
        (("--text", ""), "the text is empty"),
        (("--text", "a person", "--edit-parts", "torso"), "name the motion with --edit"),
        (("--text", "a person", "--fps", "20"), "name the motion with --edit"),
        (("--text", "a person", "--edit", "M", "--edit-parts", "tail"), "no part tail"),
        (("--text", "a person", "--edit", "M", "--edit-seconds", "3", "2"), "an interval within 0 and 4"),
        (("--text", "a person", "--edit", "M", "--fps", "60"), "has 20 frames a second and not 60"),
        (("--text", "a person", "--to", "fbx"), "formats are of bvh, gltf, npz, npy, mp4, html; got fbx"),
        (("--text", "a person", "--music", "S"), "the music is shorter than the motion: 2.00 of 4 s"),
        (("--text", "a person", "--music", "M"), "is no WAV file"),
    ],
)
def test_bad_input(argv, message, untrained, motion, tmp_path, monkeypatch, capsys):
    short = write_wav(click_track(100, 0.1, 2.0), tmp_path / "short.wav")
    argv = [{"M": motion, "S": short}.get(word, word) for word in argv]
    code, out, err = run(monkeypatch, capsys, *argv, "--host", untrained, "--out", tmp_path / "run")
    assert code == 1
    assert out == ""
    assert message in err
