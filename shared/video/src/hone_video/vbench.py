"""The standard evaluation of text-to-video models: VBench's prompts, its file names, and its own grades.

A video lies in one folder with all others and is called by its whole prompt and its number, ``a cat-0.mp4``. The
package vbench is not imported: what it depends on is older than what this repository runs with, so it lives in an
environment of its own, and its command ``vbench`` grades the folder, one dimension after the other.

Source: VBench (arXiv 2311.17982) and the command line of its package.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hone_core.errors import CheckpointError
from hone_core.io import atomic_write_json, read_prompts, read_published
from hone_core.runs import Row, Run

from .vbench_config import VBenchConfig

__all__ = ["Suite", "describe_grades", "find_suite", "grade_videos"]

log = logging.getLogger(__name__)

INFO = "VBench_full_info.json"
COMMAND = "vbench"
LONGEST = 230
"""Bytes of a file's name, with room for what is added while it is written; file systems end at 255."""


@dataclass(frozen=True)
class Suite:
    """Prompts to make videos of.

    Attributes:
        prompts: Each once.
        info: The file that grading reads, or None for prompts of a text file.
        samples: Videos of each.
    """

    prompts: tuple[str, ...]
    info: Path | None
    samples: int

    @property
    def expanded(self) -> tuple[str, ...]:
        """The prompt of each video."""
        return tuple(prompt for prompt in self.prompts for _ in range(self.samples))

    def targets(self, run: Run) -> list[Path]:
        """The file of each video."""
        folder = run.artifacts / "videos"
        return [folder / f"{prompt}-{number}.mp4" for prompt in self.prompts for number in range(self.samples)]


def find_suite(cfg: VBenchConfig, *, limit: int | None = None) -> Suite:
    """The prompts, once everything that the run needs is known to be there.

    Args:
        cfg: Which.
        limit: Take only so many prompts.

    Raises:
        CheckpointError: There is no list of prompts, or it is none.
        FileNotFoundError: There is no such text file.
        ValueError: A text file holds no prompt; it is to be graded and cannot be, or a prompt is no file name.
    """
    info = cfg.vbench_info
    if info is None:
        found = importlib.util.find_spec("vbench")
        if found is None or found.origin is None or not (Path(found.origin).parent / INFO).is_file():
            raise CheckpointError(
                f"the package vbench, which holds the prompts, is not in this environment; pass --vbench-info with its "
                f"{INFO}, or a text file of prompts"
            )
        info = Path(found.origin).parent / INFO
    graded = info.suffix == ".json"
    published = read_published(info, "VBench", lambda: _of_json(info, cfg.graded)) if graded else read_prompts(info)
    prompts = list(dict.fromkeys(prompt for prompt in published if prompt))[:limit]
    for prompt in prompts:
        if "/" in prompt or len(f"{prompt}-99.mp4".encode()) > LONGEST:
            raise ValueError(f"a video is called by its prompt, and this one is no file name: {prompt[:80]!r}")
    if cfg.grade and not graded:
        raise ValueError(f"VBench grades the prompts of its {INFO} only; {info} is a text file. Add --no-grade")
    if cfg.grade and shutil.which(COMMAND) is None:
        raise ValueError(
            "the command vbench is not on the path. Install vbench in an environment of its own and put its bin folder "
            "on the path, or add --no-grade and grade the videos there"
        )
    return Suite(tuple(prompts), info if graded else None, cfg.videos_per_prompt)


def _of_json(file: Path, dimensions: tuple[str, ...]) -> list[str]:
    entries = json.loads(file.read_text(encoding="utf-8"))
    return [entry["prompt_en"] for entry in entries if not set(dimensions).isdisjoint(entry["dimension"])]


def grade_videos(cfg: VBenchConfig, suite: Suite, run: Run) -> None:
    """Grade the folder of videos, a row per dimension; what is graded already is kept. Of several processes, the first.

    Raises:
        RuntimeError: ``vbench`` left no result.
    """
    if not cfg.grade or not run.processes.main:
        return
    assert suite.info is not None
    videos = (run.artifacts / "videos").absolute()
    for dimension in cfg.graded:
        kept = run.path / "vbench" / f"{dimension}.json"
        if not kept.is_file():
            atomic_write_json(kept, {"score": _grade(dimension, videos, suite.info, kept.parent / dimension)})
        score = json.loads(kept.read_text(encoding="utf-8"))["score"]
        run.row(dimension, score, better="higher", n=len(suite.expanded), split="vbench")


def _grade(dimension: str, videos: Path, info: Path, out: Path) -> float:
    out = out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    command = [COMMAND, "evaluate", "--videos_path", str(videos), "--dimension", dimension]
    command += ["--full_json_dir", str(info.absolute()), "--output_path", str(out)]
    log.info("grading %s", dimension)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # It ends with 0 whatever happened.
    results = sorted(out.glob("*_eval_results.json"))
    if not results:
        said = " ".join((done.stderr or done.stdout).split())[-400:]
        raise RuntimeError(f"vbench left no result for {dimension}: {said}. The videos are in {videos}")
    value = json.loads(results[-1].read_text(encoding="utf-8"))[dimension]
    return float(value[0] if isinstance(value, list) else value)


def describe_grades(rows: tuple[Row, ...], folder: Path) -> str:
    """The grades as text, or what to do for them."""
    lines = [f"{row.metric:<23} {row.value:.4f}" for row in rows if row.split == "vbench"]
    lines = lines or [
        "not graded; in an environment with vbench: vbench evaluate --videos_path FOLDER --dimension NAME"
    ]
    return "\n".join([*lines, f"videos   {folder / 'artifacts' / 'videos'}", f"results  {folder / 'results.json'}"])
