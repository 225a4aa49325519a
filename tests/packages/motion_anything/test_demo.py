import subprocess

import imageio_ffmpeg
from hone_core.runs import Run
from hone_motion_anything.config import DemoConfig, UnmaskConfig
from hone_motion_anything.demo import demo


def streams(path):
    done = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True, check=False
    )
    return [line for line in done.stderr.splitlines() if "Stream #" in line]


def test_videos_with_sound_and_a_row_for_each(untrained, tmp_path):
    cfg = DemoConfig(host=untrained, limit=2, texts=("a person bows",), unmask=UnmaskConfig(steps=2))
    run = Run.start(
        config=cfg, package="hone-motion-anything", verb="demo", out=tmp_path / "run", seed=0, device="cpu", quiet=True,
        command="x",
    )  # fmt: skip
    with run:
        report = demo(cfg, run)
    assert len(streams(report.texts)) == 1
    assert len(streams(report.edit)) == 1
    sound = streams(report.dance)
    assert len(sound) == 2
    assert any("Audio: aac" in line for line in sound)
    assert report.sheet.stat().st_size > 1000
    values = {(row.metric, row.variant): row.value for row in report.rows}
    assert values["largest change of kept columns", "this edit"] == 0
    assert {"events all right, text", "beat alignment", "mask recall, text"} <= {row.metric for row in report.rows}
    assert "mask precision" in str(report)
