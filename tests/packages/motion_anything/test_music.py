import math
import wave

import numpy as np
import pytest
import torch
from hone_core.testing import assert_close
from hone_motion_anything.music import RATE, beat_frames, click_track, music_features, pooled, read_wav, write_wav


@pytest.mark.parametrize("tempo", [80, 100, 120, 130])
def test_beats_of_a_click_track_are_found(tempo):
    features = music_features(click_track(tempo, 0.2, 6.0))
    assert features.shape == (120, 35)
    wanted = (0.2 + np.arange(0, 5.8, 60 / tempo)) * 20
    found = beat_frames(features)
    nearest = np.abs(found[:, None] - wanted[None]).min(1)
    assert nearest.max() <= 1.5
    assert abs(len(found) - len(wanted)) <= 1


def test_chroma_and_cepstrum_of_a_tone():
    t = torch.arange(2 * RATE) / RATE
    features = music_features(0.5 * torch.sin(2 * math.pi * 440 * t))
    # A is the tenth note from C.
    assert (features[5:-5, 21:33].argmax(1) == 9).all()
    # The zeroth coefficient is the mean of 64 levels in decibels, times 8.
    louder = music_features(torch.sin(2 * math.pi * 440 * t))
    assert_close((louder - features)[10, 1], torch.tensor(8 * 20 * math.log10(2)), rtol=1e-3)
    assert_close(louder[10, 2:21], features[10, 2:21], atol=1e-2)


def test_silence_has_no_beat():
    features = music_features(torch.zeros(RATE))
    assert not features[:, 33:].any()
    assert torch.isfinite(features).all()


def test_pooling():
    features = torch.zeros(9, 35)
    features[5, 34] = 1
    features[0:4, 0] = torch.tensor([0.0, 5.0, 10.0, 5.0])
    found = pooled(features)
    assert found.shape == (2, 35)
    assert found[:, 34].tolist() == [0, 1]
    assert float(found[0, 0]) == 1.0


def test_wav_round_trip_and_resampling(tmp_path):
    t = torch.arange(RATE) / RATE
    tone = 0.5 * torch.sin(2 * math.pi * 300 * t)
    assert_close(read_wav(write_wav(tone, tmp_path / "a.wav")), tone, atol=1e-4)
    rate = 44_100
    at = np.arange(rate) / rate
    stereo = np.repeat((0.5 * np.sin(2 * math.pi * 300 * at) * 32767).astype("<i2")[:, None], 2, 1)
    with wave.open(str(tmp_path / "b.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(stereo.tobytes())
    assert_close(read_wav(tmp_path / "b.wav"), tone, atol=2e-3)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_each_width(tmp_path, width):
    top = 2 ** (8 * width - 1)
    loud = [0, top // 2, -top // 2, top - 1, -top, 3]
    # What a cut file has behind its last whole sample is left out.
    data = b"".join((n + top * (width == 1)).to_bytes(width, "little", signed=width > 1) for n in loud) + bytes(
        width - 1
    )
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(RATE)
        file.writeframes(data)
    assert torch.equal(read_wav(tmp_path / "a.wav"), torch.tensor([n / top for n in loud], dtype=torch.float64).float())


def test_bad_music(tmp_path):
    with pytest.raises(ValueError, match="one channel"):
        music_features(torch.zeros(2, RATE))
    bad = torch.zeros(RATE)
    bad[7] = math.nan
    with pytest.raises(ValueError, match="sample 7"):
        music_features(bad)
    with pytest.raises(ValueError, match="must divide"):
        music_features(torch.zeros(RATE), fps=7)
    (tmp_path / "x.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"x\.wav is no WAV"):
        read_wav(tmp_path / "x.wav")
    with pytest.raises(FileNotFoundError, match="there is no"):
        read_wav(tmp_path / "y.wav")
