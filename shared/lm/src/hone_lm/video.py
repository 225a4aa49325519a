"""Frames of a video file, a folder of pictures or an array: a few, evenly spaced, with their times."""

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hone_core.io import in_order
from jaxtyping import UInt8
from torch import Tensor

__all__ = ["Clip", "check_video", "read_picture", "read_video", "video_size"]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SEEK_SECONDS = 120.0
"""Stretches longer than this are read by seeking to each frame, shorter ones from end to end."""
SLACK_SECONDS = 0.5
"""A stretch may end so much before its container says, and by a tenth at most; with more missing it is cut short."""
TIMEOUT_SECONDS = 300.0
"""What a call of ffmpeg may take; a damaged file or a dead network drive can hold it for ever."""

_PPM = re.compile(rb"P6\s(\d+)\s(\d+)\s255\s")


@dataclass(frozen=True, eq=False)
class Clip:
    """Sampled frames.

    Attributes:
        frames: ``[frames, 3, height, width]``, RGB bytes.
        times: seconds of each frame from the start of the video.
        duration: seconds of the whole video.
        fps: frames per second of the whole video.
    """

    frames: UInt8[Tensor, "frames 3 height width"]
    times: tuple[float, ...]
    duration: float
    fps: float

    def metadata(self) -> dict[str, Any]:
        """What transformers' video processors take as ``video_metadata``.

        They take a frame's time from its index, which counts from the start of the video, but the rate of the sampled
        frames from ``total_num_frames``: so that is the length of the stretch that they stand for.
        """
        count = len(self.times)
        seconds = self.duration if count < 2 else (self.times[-1] - self.times[0]) * count / (count - 1)
        return {
            "fps": self.fps,
            "total_num_frames": max(count, round(seconds * self.fps)),
            "duration": self.duration,
            "frames_indices": [int(time * self.fps + 1e-6) for time in self.times],
            "height": int(self.frames.shape[2]),
            "width": int(self.frames.shape[3]),
        }


def check_video(path: str | Path) -> Path:
    """Look whether a path can be a video, without decoding it.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: It is an empty file, or a folder without pictures.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no video {path}")
    if path.is_dir() and not _pictures(path):
        raise ValueError(f"{path} holds no pictures ({', '.join(PICTURES)}); a folder is read as one video")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{path} is an empty file")
    return path


def read_video(
    path: str | Path,
    *,
    num_frames: int = 32,
    start: float | None = None,
    end: float | None = None,
    fps: float | None = None,
) -> Clip:
    """Read evenly spaced frames, each from the middle of its part of the video.

    Args:
        path: A file that ffmpeg reads, a folder of pictures in order of the numbers in their names, or a ``.npy`` array
            of bytes ``[frames, height, width, 3]``.
        num_frames: Frames to sample; a video with fewer gives all it has.
        start: Seconds from which; the beginning if None.
        end: Seconds up to which; the end if None.
        fps: Frames per second of a folder or an array, which do not say; 1 if None. A file has its own.

    Raises:
        FileNotFoundError: There is no such video.
        ValueError: It cannot be decoded, is cut short, or has no frame between ``start`` and ``end``; or ``num_frames``
            or ``fps`` is not positive, or ``fps`` is given for a file.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be positive; got {num_frames}")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive; got {fps}")
    path = check_video(path)
    if path.is_dir():
        files = _pictures(path)
        picks, times, rate = _picks(len(files), fps, num_frames, start, end, path)
        return Clip(_read_pictures([files[pick] for pick in picks]), times, len(files) / rate, rate)
    if path.suffix == ".npy":
        array = _read_array(path)
        picks, times, rate = _picks(len(array), fps, num_frames, start, end, path)
        return Clip(torch.from_numpy(array[picks]).permute(0, 3, 1, 2).contiguous(), times, len(array) / rate, rate)
    if fps is not None:
        raise ValueError(f"fps is of a folder of pictures or an array; {path} is a file, which has its own")
    return _read_file(path, num_frames, start, end)


def video_size(path: str | Path) -> tuple[int, int, int]:
    """Frames, height and width of what ``read_video`` takes, without decoding a frame; a file is taken at its word.

    Args:
        path: See there. Of a folder the first picture is looked at; a file that is shown turned has the two sides
            either way round.

    Raises:
        FileNotFoundError: There is no such video.
        ValueError: It is none.
    """
    path = check_video(path)
    if path.is_dir():
        files = _pictures(path)
        return len(files), *_read_pictures(files[:1]).shape[2:]
    if path.suffix == ".npy":
        return _read_array(path).shape[:3]
    duration, fps, height, width = _probe(path)
    return max(1, round(duration * fps)), height, width


def _pictures(folder: Path) -> list[Path]:
    """Pictures of a folder, 2.png before 10.png."""
    found = (file for file in folder.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith("."))
    return sorted(found, key=lambda file: (in_order(file.stem), file.name))


def _read_array(path: Path) -> np.ndarray[Any, Any]:
    """Bytes ``[frames, height, width, 3]`` of a file, read where they are used."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} could not be read as an array: {error}") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"{path}: expected bytes [frames, height, width, 3]; got {array.dtype} {list(array.shape)}")
    return array


def read_picture(path: str | Path) -> Any:
    """A picture as a PIL image in RGB, turned as its file says: cameras store it as the sensor lies.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It cannot be decoded.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} could not be decoded: {error}") from error


def _read_pictures(files: list[Path]) -> Tensor:
    frames = [torch.from_numpy(np.array(read_picture(file))).permute(2, 0, 1) for file in files]
    if len({frame.shape for frame in frames}) != 1:
        raise ValueError(f"the pictures of {files[0].parent} differ in size; a video has one")
    return torch.stack(frames)


def _span(path: Path, duration: float, start: float | None, end: float | None) -> tuple[float, float]:
    begin, stop = start or 0.0, min(duration, duration if end is None else end)
    if not 0 <= begin < stop:
        raise ValueError(f"{path}: no frame between {begin:g} s and {stop:g} s; the video lasts {duration:.2f} s")
    return begin, stop


def _picks(
    total: int, fps: float | None, count: int, start: float | None, end: float | None, path: Path
) -> tuple[list[int], tuple[float, ...], float]:
    """Indices and times of the frames to take from so many, and frames per second."""
    fps = 1.0 if fps is None else float(fps)
    begin, stop = _span(path, total / fps, start, end)
    # The small term undoes binary fractions such as 0.29 * 100 == 28.999....
    first = min(int(begin * fps + 1e-6), total - 1)
    last = min(max(first + 1, round(stop * fps)), total)
    count = min(count, last - first)
    picks = [first + int((index + 0.5) * (last - first) / count) for index in range(count)]
    return picks, tuple(pick / fps for pick in picks), fps


def _read_file(path: Path, count: int, start: float | None, end: float | None) -> Clip:
    duration, fps, *_ = _probe(path)
    begin, stop = _span(path, duration, start, end)
    count = min(count, max(1, round((stop - begin) * fps)))
    times = _middles(begin, stop, count)
    if stop - begin > SEEK_SECONDS:
        frames: list[Tensor] = []
        for time in times:
            found = _decode(path, time, 1, needed=not frames)
            if not found:
                raise _cut_short(path, len(frames), count)
            frames += found
    else:
        wanted = _wanted(times, begin, fps)
        found = _decode(path, begin, wanted[-1] + 1)
        missing = wanted[-1] + 1 - len(found)
        if missing > max(1, round(min(SLACK_SECONDS, 0.1 * (stop - begin)) * fps)):
            raise _cut_short(path, len(found), wanted[-1] + 1)
        if missing > 1:
            # The container's length is that of its longest stream, sound for one: take the pictures that there are.
            stop = begin + len(found) / fps
            count = min(count, len(found))
            times = _middles(begin, stop, count)
            wanted = _wanted(times, begin, fps)
        frames = [found[min(index, len(found) - 1)] for index in wanted]
    return Clip(torch.stack(frames), tuple(times), duration, fps)


def _middles(begin: float, stop: float, count: int) -> list[float]:
    return [begin + (index + 0.5) * (stop - begin) / count for index in range(count)]


def _wanted(times: list[float], begin: float, fps: float) -> list[int]:
    # The small term undoes binary fractions such as int(0.3 * 10) == 2.
    return [int((time - begin) * fps + 1e-6) for time in times]


def _cut_short(path: Path, decoded: int, promised: int) -> ValueError:
    return ValueError(f"{path}: decoded {decoded} of {promised} frames; the file is cut short")


def _probe(path: Path) -> tuple[float, float, int, int]:
    """Seconds, frames per second, height and width, from what ffmpeg says of a file."""
    done = _ffmpeg("-i", str(path))
    said = done.stderr.decode("utf-8", "replace")
    stream = re.search(r"Stream #\S+.*: Video:.*", said)
    if stream is None and "Audio:" in said:
        raise ValueError(f"{path} has no video stream, only sound")
    if stream is None:
        raise ValueError(f"{path} could not be decoded as a video: {_last_line(said)}")
    length = re.search(r"Duration: (\d+):(\d+):(\d+(?:\.\d+)?)", said)
    rate = re.search(r"([\d.]+) fps", stream[0]) or re.search(r"([\d.]+) tbr", stream[0])
    duration = 0.0 if length is None else int(length[1]) * 3600 + int(length[2]) * 60 + float(length[3])
    fps = 0.0 if rate is None else float(rate[1])
    size = re.search(r", (\d+)x(\d+)", stream[0])
    if not fps or not duration or size is None:
        raise ValueError(f"{path} has no frames (ffmpeg reports {fps:g} frames a second and {duration:g} s)")
    return duration, fps, int(size[2]), int(size[1])


def _decode(path: Path, time: float, count: int, *, needed: bool = True) -> list[Tensor]:
    """So many frames from a time on, ``[3, height, width]`` each; turned as the file says.

    They come as PPM pictures, which carry their own size. None at all is an error where they are needed.
    """
    done = _ffmpeg(
        "-ss", f"{time:.3f}", "-i", str(path), "-frames:v", str(count), "-fps_mode", "passthrough",
        "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1",
    )  # fmt: skip
    frames, data = [], done.stdout
    at = 0
    while (head := _PPM.match(data, at)) is not None:
        width, height = int(head[1]), int(head[2])
        size, at = width * height * 3, head.end()
        if at + size > len(data):
            break
        pixels = np.frombuffer(data, np.uint8, count=size, offset=at).reshape(height, width, 3)
        frames.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous())
        at += size
    if needed and not frames:
        said = _last_line(done.stderr.decode("utf-8", "replace"))
        raise ValueError(f"{path} could not be decoded as a video at {time:g} s: {said}")
    return frames


def _ffmpeg(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-hide_banner", "-nostdin", *arguments]
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"ffmpeg took longer than {TIMEOUT_SECONDS:g} s: {' '.join(arguments)}") from error


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if "At least one output file" not in line]
    return lines[-1].strip()[:200] if lines else "ffmpeg says nothing"
