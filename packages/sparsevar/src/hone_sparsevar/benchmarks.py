"""The benchmarks of text-to-image models: their prompts, their file names, and their own scorers.

None of their packages is imported: what they depend on is older than what this repository runs with, so each lives in
an environment of its own, ``scorer_python``, and is run as a command.

Source: djghosh13/geneval; TencentQQGYLab/ELLA, ``dpg_bench``; tgxs002/HPSv2; THUDM/ImageReward.
"""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from hone_core.devices import resolve_device
from hone_core.errors import CheckpointError, MissingExtraError
from hone_core.io import atomic_path, read_published
from hone_core.runs import Run
from hone_visual_ar import geneval
from PIL import Image

from .config import IMAGES_PER_PROMPT, EvalConfig
from .models import variant_of
from .sample import Wanted, check_inputs, draw_images

__all__ = ["Prompt", "judge", "read_prompts"]

log = logging.getLogger(__name__)

DPG = Path("dpg_bench", "compute_dpg_bench.py")
MODULES = {"hps": "hpsv2", "imagereward": "ImageReward"}
SCORES = {
    "hps": "import hpsv2; score = lambda file, prompt: hpsv2.score(file, prompt, hps_version='v2.1')[0]",
    "imagereward": "import ImageReward; score = ImageReward.load('ImageReward-v1.0'); "
    "score = lambda file, prompt, model=score: model.score(prompt, file)",
}
LOOP = "import json, sys; pairs = json.load(sys.stdin); "
TELL = "; json.dump([float(score(*pair)) for pair in pairs], open(sys.argv[1], 'w'))"


@dataclass(frozen=True, kw_only=True)
class Prompt(geneval.GenEvalPrompt):
    """A prompt of a benchmark; ``group`` is what its score is averaged under."""

    group: str
    facts: dict[str, Any] = field(default_factory=dict)


def read_prompts(protocol: str, path: Path, images: int, limit: int | None = None) -> list[Prompt]:
    """Prompts as they are published, with the names that the benchmark gives to images.

    Args:
        protocol: Which benchmark.
        path: Its prompts, see ``BenchmarkConfig.prompts``.
        images: Of each prompt.
        limit: Only so many prompts, the first (of HPS, of each style).

    Raises:
        CheckpointError: The file or folder is missing, or is none of this benchmark.
    """
    return read_published(path, protocol, lambda: _READERS[protocol](path, images, limit))


def _geneval(path: Path, images: int, limit: int | None) -> list[Prompt]:
    return [
        Prompt(text=prompt.text, files=prompt.files, group=prompt.facts["tag"], facts=prompt.facts)
        for prompt in geneval.read_prompts(path, images, limit)
    ]


def _hps(path: Path, images: int, limit: int | None) -> list[Prompt]:
    if images != 1:
        raise ValueError(f"HPS v2 reads one image of each prompt; got {images}")
    found = []
    for file in sorted(path.glob("*.json")):
        for at, text in enumerate(json.loads(file.read_text(encoding="utf-8"))[:limit]):
            found.append(Prompt(text=str(text), files=(Path(file.stem, f"{at:05}.jpg"),), group=file.stem))
    return found


def _imagereward(path: Path, images: int, limit: int | None) -> list[Prompt]:
    entries = json.loads(path.read_text(encoding="utf-8"))[:limit]
    return [
        Prompt(
            text=entry["prompt"],
            files=tuple(Path(f"{entry['id']}_{number}.png") for number in range(images)),
            group="all",
        )
        for entry in entries
    ]


def _dpg(path: Path, images: int, limit: int | None) -> list[Prompt]:
    return [
        Prompt(
            text=file.read_text(encoding="utf-8").strip(),
            files=tuple(Path(f"{file.stem}_{number}.png") for number in range(images)),
            group="all",
        )
        for file in sorted(path.glob("*.txt"))[:limit]
    ]


_READERS = {"geneval": _geneval, "hps": _hps, "imagereward": _imagereward, "dpg": _dpg}


def check_benchmark(cfg: EvalConfig) -> list[Prompt]:
    """Look for prompts, pipeline and scorer; no weight is read. Return the prompts.

    Raises:
        CheckpointError, ValueError: One is not there, or they do not fit together.
        MissingExtraError: FID is asked for without its extra.
    """
    own = cfg.benchmark
    assert own.model is not None
    assert own.prompts is not None
    count = IMAGES_PER_PROMPT[cfg.protocol] if own.images_per_prompt is None else own.images_per_prompt
    prompts = read_prompts(cfg.protocol, own.prompts, count, cfg.limit)
    check_inputs(own.model, [prompt.text for prompt in prompts], own.image, cfg.used)
    if own.grade:
        _check_scorer(cfg)
    if own.fid is not None:
        _fidelity()
        if not own.fid.is_dir():
            raise CheckpointError(f"there is no folder of images at {own.fid}")
    return prompts


def judge(cfg: EvalConfig, run: Run) -> None:
    """Draw a benchmark's images and have them scored: a row for each of its groups, and ``score`` over them.

    Raises:
        CheckpointError, ValueError: Prompts, pipeline or scorer are not there; nothing was drawn then.
        RuntimeError: The scorer failed.
    """
    own, prompts = cfg.benchmark, check_benchmark(cfg)
    assert own.model is not None
    folder = run.artifacts / "images"
    # As the benchmarks' own scripts: every prompt starts from the same seed.
    wanted = [
        Wanted(prompt=prompt.text, seed=cfg.seed + number, file=folder / file)
        for prompt in prompts
        for number, file in enumerate(prompt.files)
    ]
    draw_images(own.model, wanted, own.image, variant_of(own.variant, cfg.used), run, batch=cfg.batch)
    if cfg.protocol == "geneval":
        geneval.write_facts(folder, prompts)
    run.row("images", len(wanted), better="none", split=cfg.protocol)
    if own.grade:
        grades = _SCORERS[cfg.protocol](cfg, prompts, folder, run.path / "scorer")
        for group, values in grades.items():
            run.row(group, mean(values), better="higher", n=len(values), split=cfg.protocol)
        run.row("score", mean(mean(values) for values in grades.values()), better="higher", split=cfg.protocol)
    if own.fid is not None:
        options = {"fid": True, "samples_find_deep": True, "verbose": False}
        options["cuda"] = resolve_device(run.device).type == "cuda"
        value = _fidelity().calculate_metrics(input1=str(folder), input2=str(own.fid), **options)
        distance = value["frechet_inception_distance"]
        run.row("fid", distance, better="lower", n=len(wanted), split=cfg.protocol)


def _fidelity() -> Any:
    try:
        return importlib.import_module("torch_fidelity")
    except ImportError as error:
        raise MissingExtraError("fid", "hone-sparsevar", "The FID of a folder") from error


def _check_scorer(cfg: EvalConfig) -> None:
    own = cfg.benchmark
    python = geneval.interpreter(own.scorer_python)
    if cfg.protocol in MODULES:
        test = [python, "-c", f"import importlib.util as u; assert u.find_spec({MODULES[cfg.protocol]!r})"]
        if subprocess.run(test, capture_output=True, check=False).returncode:
            what = f"the package {MODULES[cfg.protocol]}"
            raise ValueError(f"{own.scorer_python!r} has not {what}; pass --scorer-python PATH, or --no-grade")
        return
    assert own.scorer is not None
    if cfg.protocol == "geneval":
        geneval.check_scorer(own.scorer)
    elif not (own.scorer / DPG).is_file():
        raise CheckpointError(f"there is no {own.scorer / DPG}; --scorer is a checkout of the benchmark's repository")


def _call(command: Sequence[str | Path], result: Path, *, cwd: Path | None = None, stdin: str = "") -> str:
    """Run a scorer, whose result is a file; what it wrote there."""
    result.parent.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    log.info("scoring by %s", command[0])
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=cwd, input=stdin)
    if done.returncode or not result.is_file():
        raise RuntimeError(f"the scorer failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    return result.read_text(encoding="utf-8")


def _score_geneval(cfg: EvalConfig, prompts: list[Prompt], folder: Path, out: Path) -> dict[str, list[float]]:
    own = cfg.benchmark
    assert own.scorer is not None
    assert own.weights is not None
    return geneval.score(
        folder, out / "geneval.jsonl", scorer=own.scorer, python=own.scorer_python, weights=own.weights
    )


def _score_dpg(cfg: EvalConfig, prompts: list[Prompt], folder: Path, out: Path) -> dict[str, list[float]]:
    """Share of questions answered yes, of each prompt, in percent."""
    own, result = cfg.benchmark, (out / "dpg.txt").absolute()
    assert own.scorer is not None
    squares = out / "squares"
    side = _squares(prompts, folder, squares)
    options = ["--image-root-path", squares.absolute(), "--resolution", side, "--pic-num", 4, "--res-path", result]
    text = _call([geneval.interpreter(own.scorer_python), DPG, *map(str, options)], result, cwd=own.scorer)
    lines = [line.rsplit(", ", 1) for line in text.splitlines() if ".png, " in line]
    if len(lines) != len(prompts):
        raise RuntimeError(f"DPG-Bench scored {len(lines)} of {len(prompts)} prompts; see {result}")
    return {"all": [100 * float(value) for _, value in lines]}


def _squares(prompts: list[Prompt], folder: Path, out: Path) -> int:
    """Four images of each prompt as one square, under the prompt's name; the side of an image."""
    side = 0
    for prompt in prompts:
        images = [Image.open(folder / file) for file in prompt.files]
        side = images[0].width
        if images[0].height != side:
            raise ValueError(f"DPG-Bench cuts squares; got images of {images[0].size}. Draw with aspect 1.")
        square = Image.new("RGB", (2 * side, 2 * side))
        for number, image in enumerate(images):
            square.paste(image, (number % 2 * side, number // 2 * side))
        with atomic_path(out / f"{prompt.files[0].stem.rpartition('_')[0]}.png") as scratch:
            square.save(scratch)
    return side


def _score_pairs(cfg: EvalConfig, prompts: list[Prompt], folder: Path, out: Path) -> dict[str, list[float]]:
    """A score of each image and its prompt, by group; of HPS in percent."""
    pairs = [(str((folder / file).absolute()), prompt.text) for prompt in prompts for file in prompt.files]
    result = (out / f"{cfg.protocol}.json").absolute()
    script = LOOP + SCORES[cfg.protocol] + TELL
    values = json.loads(_call([cfg.benchmark.scorer_python, "-c", script, result], result, stdin=json.dumps(pairs)))
    groups = [prompt.group for prompt in prompts for _ in prompt.files]
    grades: dict[str, list[float]] = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        grades[group].append(100 * value if cfg.protocol == "hps" else value)
    return dict(grades)


_SCORERS = {"geneval": _score_geneval, "dpg": _score_dpg, "hps": _score_pairs, "imagereward": _score_pairs}
