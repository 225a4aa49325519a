"""Music: generated tracks, and 35 features of a waveform at the motion's frame rate.

The features have the layout of EDGE's baseline: onset strength, 20 cepstral coefficients, 12 chroma, onset peaks,
beats. They are made with torch and NumPy alone; the definitions are librosa's, values differ a little, so that
weights trained on librosa's features should be given those.
"""

from __future__ import annotations

import math
import wave
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from hone_core.io import atomic_path
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "BEAT",
    "RATE",
    "beat_frames",
    "click_track",
    "music_features",
    "pooled",
    "read_wav",
    "write_wav",
]

RATE = 15_360
"""Samples a second; a frame of 20 a second is 768 of them."""
BEAT = 34
"""Column of the beats."""
_MELS, _WINDOW = 64, 2048


def click_track(tempo: float, first_beat: float, seconds: float, *, timbre: int = 0) -> Float[Tensor, " samples"]:
    """A drum on every beat, a higher one between, and a bass line.

    Args:
        tempo: Beats a minute.
        first_beat: Seconds of the first beat.
        seconds: Length.
        timbre: Of the bass line's key.
    """
    total = round(seconds * RATE)
    t = torch.arange(total) / RATE
    beats = (t - first_beat) * tempo / 60
    since = (beats - beats.floor()) * 60 / tempo
    between = (beats + 0.5 - (beats + 0.5).floor()) * 60 / tempo
    noise = torch.randn(total, generator=torch.Generator().manual_seed(timbre))
    kick = torch.sin(2 * math.pi * 55 * since * (1 + 2 * torch.exp(-30 * since))) * torch.exp(-14 * since)
    stick = 0.5 * noise * torch.exp(-80 * since)
    hat = 0.01 * noise * torch.exp(-60 * between)
    note = 110 * 2 ** ((timbre % 12 + torch.tensor([0.0, 3.0, 7.0, 5.0])[(beats.floor().long() // 2) % 4]) / 12)
    bass = 0.15 * torch.sin(2 * math.pi * (note / RATE).cumsum(0))
    return ((0.6 * kick + stick) * (beats >= -1e-6) + hat + bass).clamp(-1, 1)


@lru_cache(maxsize=4)
def _mel_filters() -> Tensor:
    """Triangles over the spectrum, equally spaced in mels (Slaney's), each of unit area."""

    def to_mel(hz: NDArray[np.floating]) -> NDArray[np.floating]:
        high = 15 + 27 * np.log(np.maximum(hz, 1e-9) / 1000) / np.log(6.4)
        return np.where(hz < 1000, 3 * hz / 200, high)

    def to_hz(mel: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp(np.log(6.4) / 27 * (mel - 15)))

    edges = to_hz(np.linspace(0, float(to_mel(np.asarray(RATE / 2))), _MELS + 2))
    bins = np.linspace(0, RATE / 2, _WINDOW // 2 + 1)
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    area = 2 / (edges[2:] - edges[:-2])
    return torch.from_numpy(np.maximum(0, np.minimum(rise, fall)) * area[:, None]).float()


@lru_cache(maxsize=4)
def _chroma_filters() -> Tensor:
    """Which of the twelve notes each bin of the spectrum sounds like, from 55 Hz up."""
    bins = np.linspace(0, RATE / 2, _WINDOW // 2 + 1)
    notes = 12 * np.log2(np.maximum(bins, 1e-9) / 440) + 9
    distance = (notes[None] - np.arange(12)[:, None] + 6) % 12 - 6
    return torch.from_numpy(np.exp(-0.5 * (distance / 0.5) ** 2) * (bins >= 55)).float()


def music_features(wave_pm1: Float[Tensor, " samples"], fps: int = 20) -> Float[Tensor, "frames 35"]:
    """Onset strength, 20 MFCC, 12 chroma, onset peaks and beats, a row for each frame.

    Args:
        wave_pm1: One channel in [-1, 1] at ``RATE`` samples a second.
        fps: Rows a second, a divisor of ``RATE``.

    Raises:
        ValueError: The wave is no vector of a tenth of a second or more, is not finite, or ``fps`` does not divide.
    """
    if wave_pm1.ndim != 1 or len(wave_pm1) < RATE // 10:
        raise ValueError(f"music must be one channel of at least {RATE // 10} samples; got {list(wave_pm1.shape)}")
    if not bool(torch.isfinite(wave_pm1).all()):
        raise ValueError(f"sample {int((~torch.isfinite(wave_pm1)).nonzero()[0])} of the music is not finite")
    if RATE % fps:
        raise ValueError(f"fps must divide {RATE}; got {fps}")
    hop = RATE // fps
    padded = torch.nn.functional.pad(wave_pm1, (_WINDOW // 2, _WINDOW // 2))
    window = torch.hann_window(_WINDOW)
    power = torch.stft(padded, _WINDOW, hop, window=window, center=False, return_complex=True).abs().square()
    frames = len(wave_pm1) // hop
    power = power[:, :frames]
    decibels = 10 * (_mel_filters() @ power).clamp(min=1e-10).log10()
    decibels = decibels.maximum(decibels.max() - 80)
    onset = torch.nn.functional.pad(decibels.diff(dim=1).clamp(min=0).mean(0), (1, 0))
    at = torch.arange(_MELS) + 0.5
    cosines = torch.cos(math.pi / _MELS * torch.arange(20)[:, None] * at) * math.sqrt(2 / _MELS)
    cosines[0] /= math.sqrt(2)
    mfcc = (cosines @ decibels).T
    chroma = (_chroma_filters() @ power).T
    chroma = chroma / chroma.amax(1, keepdim=True).clamp(min=1e-10)
    strength = onset.double().numpy()
    columns = [
        onset[:, None],
        mfcc,
        chroma,
        _one_hot(_peaks(strength), frames),
        _one_hot(_beats(strength, fps), frames),
    ]
    return torch.cat(columns, 1).float()


def _one_hot(places: NDArray[np.integer], frames: int) -> Tensor:
    found = torch.zeros(frames, 1)
    found[torch.from_numpy(np.asarray(places, dtype=np.int64))] = 1
    return found


def _peaks(onset: NDArray[np.floating]) -> NDArray[np.integer]:
    """Frames that are the largest around them and stand out of their mean."""
    padded = np.pad(onset, 2, mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, 5)
    return np.nonzero((onset >= around.max(1)) & (onset > around.mean(1) + 0.07 * onset.max()))[0]


def _beats(onset: NDArray[np.floating], fps: int) -> NDArray[np.integer]:
    """Frames of the beats: a tempo by autocorrelation, then the chain that fits it and the onsets best.

    Source: Ellis, "Beat tracking by dynamic programming" (2007), the method behind librosa's ``beat_track``.
    """
    if not onset.any():
        return np.zeros(0, dtype=np.int64)
    strength = onset / (onset.std() + 1e-9)
    lags = np.arange(max(2, int(fps * 60 / 240)), min(len(onset) - 1, int(fps * 60 / 40)) + 1)
    if not len(lags):
        return np.zeros(0, dtype=np.int64)
    centred = strength - strength.mean()
    correlation = np.array([(centred[lag:] * centred[:-lag]).sum() / len(centred) for lag in lags])
    # Tempi are believed around 115 a minute, an octave wide.
    prior = np.exp(-0.5 * np.log2(fps * 60 / lags / 115) ** 2)
    best = int((correlation * prior).argmax())
    period = float(lags[best])
    if 0 < best < len(lags) - 1:
        left, middle, right = correlation[best - 1 : best + 2]
        bend = left - 2 * middle + right
        period += 0.5 * (left - right) / bend if bend < 0 else 0.0
    score, back = strength.copy(), np.full(len(strength), -1)
    for frame in range(len(strength)):
        first = max(0, frame - int(2 * period))
        last = frame - max(1, int(period / 2))
        if last < first:
            continue
        before = np.arange(first, last + 1)
        total = score[before] - 30.0 * np.log((frame - before) / period) ** 2
        at = int(total.argmax())
        if total[at] > 0:
            score[frame], back[frame] = strength[frame] + total[at], before[at]
    frame = int(score.argmax())
    beats = [frame]
    while back[frame] >= 0:
        frame = int(back[frame])
        beats.append(frame)
    return np.array(beats[::-1])


def beat_frames(features: Float[Tensor, "frames 35"]) -> NDArray[np.integer]:
    """Frames that features mark as beats."""
    return features[:, BEAT].nonzero()[:, 0].cpu().numpy()


def pooled(features: Float[Tensor, "*dims frames 35"], frames: int = 4) -> Float[Tensor, "*dims tokens 35"]:
    """One row for each token: the mean, and for peaks and beats the largest. Scaled to numbers around one. Ours."""
    rows = features.shape[-2] // frames
    grouped = features[..., : rows * frames, :].unflatten(-2, (rows, frames))
    mean = grouped[..., :33].mean(-2)
    scale = torch.cat([mean.new_full((1,), 1 / 5), mean.new_full((20,), 1 / 100), mean.new_ones(12)])
    return torch.cat([mean * scale, grouped[..., 33:].amax(-2)], -1)


def read_wav(path: str | Path) -> Float[Tensor, " samples"]:
    """One channel at ``RATE`` samples a second, of a WAV file of 8, 16, 24 or 32 bits.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no such file; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        with wave.open(str(path), "rb") as file:
            channels, bits, rate = file.getnchannels(), 8 * file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(
            f"{path} is no WAV file of whole numbers ({error}); convert it: ffmpeg -i {path.name} -ac 1 -ar {RATE} "
            "music.wav"
        ) from error
    if bits not in (8, 16, 24, 32):
        raise ValueError(f"{path} has {bits} bits a sample; expected 8, 16, 24 or 32")
    frame = channels * bits // 8
    data = data[: len(data) // frame * frame]
    if bits == 24:  # as the upper bytes of 32
        upper = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data, bits = np.pad(upper, ((0, 0), (1, 0))).tobytes(), 32
    samples = np.frombuffer(data, dtype={8: "u1", 16: "<i2", 32: "<i4"}[bits])
    values = samples.astype(np.float64).reshape(-1, channels).mean(1)
    values = (values - 128) / 128 if bits == 8 else values / 2 ** (bits - 1)
    if not len(values):
        raise ValueError(f"{path} holds no sound")
    if rate != RATE:
        values = _resampled(values, rate)
    return torch.from_numpy(values).float()


def _resampled(values: NDArray[np.floating], rate: int) -> NDArray[np.floating]:
    """At ``RATE``: by the spectrum, so that nothing folds back."""
    count = round(len(values) * RATE / rate)
    spectrum = np.fft.rfft(values)
    wanted = np.zeros(count // 2 + 1, dtype=complex)
    kept = min(len(wanted), len(spectrum))
    wanted[:kept] = spectrum[:kept]
    return np.fft.irfft(wanted, count) * (count / len(values))


def write_wav(wave_pm1: Float[Tensor, " samples"], path: str | Path) -> Path:
    """Write one channel of 16 bits; returns the path."""
    data = (wave_pm1.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes()
    with atomic_path(path) as scratch, wave.open(str(scratch), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(data)
    return Path(path)
