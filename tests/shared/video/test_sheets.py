import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hone_video.sheets import contact_sheet, write_video
from matplotlib.image import imread

PROMPTS = ["first prompt", "second prompt"]
LOOKS = {"dense": ("dense", "#4c566a"), "asa": ("ASA", "#0072b2")}


@pytest.fixture
def clips():
    """Flat clips: red dense, blue ASA; brighter with every frame."""
    levels = (torch.arange(4) + 1) / 4
    red, blue = torch.zeros(2, 3, 4, 8, 8), torch.zeros(2, 3, 4, 8, 8)
    red[:, 0], blue[:, 2] = levels[:, None, None], levels[:, None, None]
    return {"dense": red, "asa": blue}


def test_contact_sheet_shows_first_and_last_frame(clips, tmp_path):
    captions = {"dense": ["reads 1", "reads 2"], "asa": ["reads 1", "!reads 3"]}
    path = contact_sheet(
        clips, PROMPTS, captions, tmp_path / "sheet.png", title="title", frames=2, scale=10, looks=LOOKS
    )
    picture = imread(path)[..., :3]
    red, blue = (np.isclose(picture, color, atol=0.01).all(-1) for color in ([1, 0, 0], [0, 0, 1]))
    # per clip 80 x 80 pixels of the last frame, and as many of the first at a quarter of the brightness
    assert red.sum() == blue.sum() == 2 * 80 * 80
    faint = np.isclose(picture, [0.25, 0, 0], atol=0.01).all(-1)
    assert faint.sum() == 2 * 80 * 80
    # dense stands left of asa; in a cell the first frame stands left of the last
    assert np.nonzero(red)[1].max() < np.nonzero(blue)[1].min()
    assert np.nonzero(faint)[1].max() < np.nonzero(red)[1].min()
    # the caption of a fault is drawn in another color than the rest
    fault = (picture[..., 0] > 0.6) & (picture[..., 1] < 0.1) & (picture[..., 2] < 0.2) & ~red
    assert fault.any()


def test_titles_that_are_wider_than_their_cells_are_broken(clips, tmp_path):
    """Each column's letters stay above it, and no line is cut off at the top."""
    looks = {"dense": ("fifty guided dense steps", "#ff00ff"), "asa": ("distilled: eight sparse steps", "#00ff00")}
    captions = {name: [""] * 2 for name in clips}
    for title in ("", "title"):
        path = contact_sheet(clips, PROMPTS, captions, tmp_path / "s.png", title=title, frames=1, scale=16, looks=looks)
        picture = (imread(path)[..., :3] * 255).round()
        for column, (_, color) in enumerate(looks.values()):
            wanted = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
            rows, columns = np.nonzero((picture == wanted).all(-1))
            left = 6 + column * (128 + 6)
            assert left <= columns.min()
            assert columns.max() < left + 128
            # two lines of letters, with a gap between them
            filled = np.diff(np.unique(rows))
            assert (filled > 4).sum() == 1
            assert rows.min() > (26 if title else 2)


def test_video_has_every_frame(clips, tmp_path):
    path = write_video(clips, PROMPTS, tmp_path / "clips.mp4", title="title", scale=8, fps=4, loops=2, looks=LOOKS)
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)]
    done = subprocess.run([*ffmpeg, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    width, height, fps = re.search(r"h264.*?, (\d+)x(\d+).*? (\d+) fps", done.stderr.decode()).groups()
    assert fps == "4"
    width, height = int(width), int(height)
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)
    assert len(frames) == 8
    assert height % 2 == width % 2 == 0
    # the left half holds the red clips, which brighten within a loop and start anew in the next
    peaks = [frame[:, : width // 2, 0][(frame[:, : width // 2, 1] < 60)].max() for frame in frames]
    assert peaks[0] + 20 < peaks[1] < peaks[2] < peaks[3]
    assert abs(int(peaks[4]) - int(peaks[0])) < 20
