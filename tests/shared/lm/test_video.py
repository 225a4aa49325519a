import wave

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hone_lm.video import check_video, read_video, video_size
from PIL import Image


def ramp(frames=20, height=32, width=48):
    """Frame k is gray 10 k."""
    return np.stack([np.full((height, width, 3), 10 * k, np.uint8) for k in range(frames)])


@pytest.fixture
def movie(tmp_path):
    path = tmp_path / "ramp.mp4"
    writer = imageio_ffmpeg.write_frames(str(path), (48, 32), fps=10, macro_block_size=1, quality=9)
    writer.send(None)
    for frame in ramp():
        writer.send(frame.tobytes())
    writer.close()
    return path


def test_frames_come_from_the_middle_of_equal_parts(movie):
    clip = read_video(movie, num_frames=4)
    assert clip.frames.shape == (4, 3, 32, 48)
    assert clip.frames.dtype == torch.uint8
    # 2 s at 10 frames a second: parts of 5 frames, middles at 0.25, 0.75, 1.25 and 1.75 s.
    assert clip.times == pytest.approx((0.25, 0.75, 1.25, 1.75))
    assert clip.frames.float().mean((1, 2, 3)).tolist() == pytest.approx([20, 70, 120, 170], abs=4)
    assert clip.metadata()["total_num_frames"] == 20
    assert clip.metadata()["frames_indices"] == [2, 7, 12, 17]


def test_a_file_with_only_sound(tmp_path):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16_000))
    with pytest.raises(ValueError, match=r"sound\.wav has no video stream, only sound"):
        read_video(tmp_path / "sound.wav")


def test_part_of_a_video(movie):
    clip = read_video(movie, num_frames=2, start=1.0, end=1.4)
    assert clip.times == pytest.approx((1.1, 1.3))
    assert clip.frames.float().mean((1, 2, 3)).tolist() == pytest.approx([110, 130], abs=4)
    with pytest.raises(ValueError, match="no frame between 5 s and 2 s"):
        read_video(movie, start=5.0)


def test_long_videos_are_sought(movie, monkeypatch):
    monkeypatch.setattr("hone_lm.video.SEEK_SECONDS", 0.5)
    clip = read_video(movie, num_frames=4)
    assert clip.frames.float().mean((1, 2, 3)).tolist() == pytest.approx([20, 70, 120, 170], abs=11)


@pytest.fixture
def cut(tmp_path):
    """The first third of a file of 10 s, whose head still promises all of them."""
    path = tmp_path / "cut.mkv"
    writer = imageio_ffmpeg.write_frames(str(path), (64, 64), fps=10, macro_block_size=1, output_params=["-g", "5"])
    writer.send(None)
    generator = np.random.default_rng(0)
    for _ in range(100):
        writer.send(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8).tobytes())
    writer.close()
    whole = path.read_bytes()
    assert len(read_video(path, num_frames=10).frames.flatten(1).unique(dim=0)) == 10
    path.write_bytes(whole[: len(whole) // 3])
    return path


@pytest.mark.parametrize("seek_seconds", [120.0, 0.5])
def test_a_file_cut_short_is_refused(cut, monkeypatch, seek_seconds):
    monkeypatch.setattr("hone_lm.video.SEEK_SECONDS", seek_seconds)
    with pytest.raises(ValueError, match=r"decoded \d+ of \d+ frames; the file is cut short"):
        read_video(cut, num_frames=10)
    # What is there can be read.
    assert len(read_video(cut, num_frames=4, end=2.0).frames.flatten(1).unique(dim=0)) == 4


@pytest.mark.parametrize(("promised", "times"), [(2.1, 21), (2.2, 20)])
def test_a_container_may_promise_a_little_more(movie, monkeypatch, promised, times):
    monkeypatch.setattr("hone_lm.video._probe", lambda path: (promised, 10.0, 32, 48))
    clip = read_video(movie, num_frames=64)
    # One frame more is the last one again; the frames of a longer lack are not asked for.
    assert len(clip.frames) == len(clip.times) == times
    assert clip.frames[:20].float().mean((1, 2, 3)).tolist() == pytest.approx([10 * k for k in range(20)], abs=4)


def test_ffmpeg_is_not_waited_for_for_ever(movie, monkeypatch):
    monkeypatch.setattr("hone_lm.video.TIMEOUT_SECONDS", 1e-4)
    with pytest.raises(ValueError, match="ffmpeg took longer than"):
        read_video(movie)


def test_fewer_frames_than_asked(movie):
    assert len(read_video(movie, num_frames=64).frames) == 20


def test_array_and_folder(tmp_path):
    array = ramp(6)
    np.save(tmp_path / "clip.npy", array)
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, frame in enumerate(array):
        Image.fromarray(frame).save(folder / f"{index:03d}.png")
    for path in (tmp_path / "clip.npy", folder):
        clip = read_video(path, num_frames=3)
        assert clip.frames[:, 0, 0, 0].tolist() == [10, 30, 50]
        assert clip.times == (1.0, 3.0, 5.0)


def test_sizes_are_told_without_decoding(movie, tmp_path, monkeypatch):
    np.save(tmp_path / "ramp.npy", ramp(7))
    (tmp_path / "folder").mkdir()
    for k in range(3):
        Image.new("RGB", (40, 24)).save(tmp_path / "folder" / f"{k}.png")
    monkeypatch.setattr("hone_lm.video._decode", None)
    assert video_size(movie) == (20, 32, 48)
    assert video_size(tmp_path / "ramp.npy") == (7, 32, 48)
    assert video_size(tmp_path / "folder") == (3, 24, 40)
    with pytest.raises(FileNotFoundError, match="there is no video"):
        video_size(tmp_path / "none.mp4")
    (tmp_path / "words.mp4").write_text("words")
    with pytest.raises(ValueError, match="could not be decoded as a video"):
        video_size(tmp_path / "words.mp4")


def test_pictures_are_in_order_of_number_at_their_own_rate(tmp_path):
    for index, frame in enumerate(ramp(12)):
        Image.fromarray(frame).save(tmp_path / f"frame{index + 1}.jpg", quality=100)
    (tmp_path / "._frame1.jpg").write_text("left by a file manager")
    clip = read_video(tmp_path, num_frames=12, fps=3)
    assert clip.frames[:, 0, 0, 0].tolist() == pytest.approx([10 * k for k in range(12)], abs=2)
    assert (clip.duration, clip.fps) == (4.0, 3.0)
    clip = read_video(tmp_path, num_frames=2, start=1.0, end=3.0, fps=3)
    # Frames 3 to 8 in two parts: middles 4 and 7.
    assert clip.frames[:, 0, 0, 0].tolist() == pytest.approx([40, 70], abs=2)
    assert clip.times == pytest.approx((4 / 3, 7 / 3))
    assert clip.metadata()["frames_indices"] == [4, 7]
    assert len(read_video(tmp_path, num_frames=4, start=3.9, fps=3).frames) == 1
    with pytest.raises(ValueError, match="no frame between 5 s and 4 s"):
        read_video(tmp_path, start=5.0, fps=3)
    with pytest.raises(ValueError, match="fps must be positive; got 0"):
        read_video(tmp_path, fps=0)


def test_only_sampled_pictures_are_read(tmp_path):
    for index, frame in enumerate(ramp(4)):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    (tmp_path / "0.png").write_text("no picture")
    assert read_video(tmp_path, num_frames=1).frames[0, 0, 0, 0] == 20
    with pytest.raises(ValueError, match=r"0.png could not be decoded"):
        read_video(tmp_path, num_frames=4)


def test_a_file_has_its_own_rate(movie):
    with pytest.raises(ValueError, match="is a file, which has its own"):
        read_video(movie, fps=3)


def test_what_is_no_video(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no video"):
        read_video(tmp_path / "none.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    with pytest.raises(ValueError, match="could not be decoded as a video"):
        read_video(text)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ValueError, match="empty file"):
        check_video(tmp_path / "empty.mp4")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        check_video(tmp_path / "folder")
    np.save(tmp_path / "float.npy", np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="expected bytes"):
        read_video(tmp_path / "float.npy")
    (tmp_path / "folder" / "a.png").write_text("no")
    with pytest.raises(ValueError, match="could not be decoded"):
        read_video(tmp_path / "folder")
