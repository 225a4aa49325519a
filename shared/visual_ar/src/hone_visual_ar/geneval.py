"""GenEval: its prompts, its file names, and its own scorer, which runs as a command in an environment of its own.

Source: djghosh13/geneval.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone_core.errors import CheckpointError
from hone_core.io import atomic_write_json, read_published

__all__ = ["GenEvalPrompt", "check_scorer", "interpreter", "read_prompts", "score", "write_facts"]

SCRIPT = Path("evaluation", "evaluate_images.py")


@dataclass(frozen=True)
class GenEvalPrompt:
    """A prompt of GenEval.

    Attributes:
        text: The prompt.
        files: Of its images, below the folder that is scored.
        facts: What the scorer reads beside the images; ``tag`` is the task.
    """

    text: str
    files: tuple[Path, ...]
    facts: dict[str, Any]


def read_prompts(path: Path, images: int = 4, limit: int | None = None) -> list[GenEvalPrompt]:
    """Prompts of ``evaluation_metadata.jsonl``, with the names that the scorer gives to images.

    Args:
        path: The file.
        images: Of each prompt; the benchmark has 4.
        limit: Only the first prompts.

    Raises:
        CheckpointError: The file is missing, or is none of GenEval's.
    """

    def read() -> Iterator[GenEvalPrompt]:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:limit]
        for at, entry in enumerate(entries):
            if entry["tag"]:
                files = tuple(Path(f"{at:05}", "samples", f"{number:05}.png") for number in range(images))
                yield GenEvalPrompt(entry["prompt"], files, entry)

    return read_published(path, "GenEval", read)


def write_facts(folder: Path, prompts: Sequence[GenEvalPrompt]) -> None:
    """Write what the scorer reads beside the images."""
    for prompt in prompts:
        atomic_write_json(folder / prompt.files[0].parts[0] / "metadata.jsonl", prompt.facts)


def check_scorer(scorer: Path) -> None:
    """Look for the scorer.

    Raises:
        CheckpointError: It is not there.
    """
    if not (scorer / SCRIPT).is_file():
        raise CheckpointError(f"there is no {scorer / SCRIPT}; name a checkout of djghosh13/geneval")


def interpreter(name: str) -> str:
    """Absolute path of a scorer's Python: scorers run in folders of their own, from which another path would lead.

    Args:
        name: A path, or a command.

    Raises:
        ValueError: There is none.
    """
    found = shutil.which(name)
    if found is None:
        raise ValueError(f"there is no Python at {name!r}: pass --scorer-python PATH, or leave the scorer out")
    return os.path.abspath(found)  # of a virtual environment, whose link must not be followed


def score(folder: Path, out: Path, *, scorer: Path, python: str, weights: Path) -> dict[str, list[float]]:
    """Run the scorer: whether each image shows what was asked for, by task; the benchmark's score is the tasks' mean.

    Args:
        folder: Of images and facts.
        out: File for the scorer's lines.
        scorer: Checkout of the benchmark.
        python: Interpreter with its packages.
        weights: Folder of its Mask2Former.

    Raises:
        RuntimeError: The scorer failed.
        ValueError: There is no such interpreter.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    command = [interpreter(python), SCRIPT, folder.absolute(), "--outfile", out, "--model-path", weights.absolute()]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=scorer)
    if done.returncode or not out.is_file():
        raise RuntimeError(f"the scorer failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    grades: dict[str, list[float]] = defaultdict(list)
    for line in out.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        grades[entry["tag"]].append(float(entry["correct"]))
    return dict(grades)
