"""The published protocols on a saved pipeline: ImageNet (FID, IS), UCF-101 (FVD), GenEval.

ImageNet: classes are drawn evenly, images are kept as PNG and as the ``.npz`` that ADM's evaluator reads. That
evaluator (``--scorer``, in an environment with TensorFlow) with the reference batch gives the paper's numbers;
torch-fidelity against a folder of real images gives others, under names of their own, since its network and reference
differ.

UCF-101: real clips are random windows of random videos, drawn ones have their classes; features are those of the I3D
file of StyleGAN-V.

Source: Section 4.1; openai/guided-diffusion, ``evaluations/evaluator.py``; the release's ``sample.py`` of clips.
"""

from __future__ import annotations

import json
import re
import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import CheckpointError
from hone_core.io import atomic_path, atomic_write_json, save_safetensors
from hone_core.progress import progress_bar
from hone_core.runs import Better, Run
from hone_visual_ar import geneval
from hone_visual_ar.quality import frechet
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from .config import EvalConfig
from .extract import clips_of
from .pipelines import NARPipeline, NARVideoPipeline
from .places import EVALUATOR, VIDEO_SUFFIXES, check_benchmark, fidelity, find_images, read_pipeline
from .sample import graph_device, padded

__all__ = ["COUNTS", "judge", "write_npz"]

COUNTS = {"imagenet": 50_000, "ucf": 10_000}
"""Images and clips that are drawn by each protocol."""
ADM_METRICS: dict[str, tuple[str, Better]] = {
    "Inception Score": ("inception_score", "higher"),
    "FID": ("fid", "lower"),
    "sFID": ("sfid", "lower"),
    "Precision": ("precision", "higher"),
    "Recall": ("recall", "higher"),
}
FIDELITY_METRICS: dict[str, tuple[str, Better]] = {
    "frechet_inception_distance": ("fid_torch_fidelity", "lower"),
    "inception_score_mean": ("inception_score_torch_fidelity", "higher"),
    "precision": ("precision_torch_fidelity", "higher"),
    "recall": ("recall_torch_fidelity", "higher"),
}


def judge(cfg: EvalConfig, run: Run) -> None:
    """Draw what the protocol asks for and measure it; what is drawn is not drawn again.

    Raises:
        ValueError: What ``check_benchmark`` refuses; nothing was drawn then.
        RuntimeError: A scorer failed.
    """
    check_benchmark(cfg)
    {"imagenet": _imagenet, "ucf": _ucf, "geneval": _geneval}[cfg.protocol](cfg, run)


def _options(cfg: EvalConfig, pipe: Any) -> dict[str, Any]:
    """Guidance where it is given, else the pipeline's published one; in what draws, where steps are graphs."""
    options = {} if cfg.guidance is None else {"guidance_scale": cfg.guidance}
    return {"decoding": pipe.graphs(cfg.batch, **options)} if cfg.graphs else options


def _load(cls: Any, cfg: EvalConfig, run: Run) -> Any:
    device = graph_device(run, graphs=cfg.graphs)
    dtype = resolve_dtype("auto", device)
    parts = {"transformer": dtype} if cls is NARVideoPipeline else {"transformer": dtype, "text_encoder": dtype}
    return cls.from_pretrained(cfg.model, dtype=parts, local_files_only=True).to(device)


def _draw_images(cfg: EvalConfig, run: Run, files: Sequence[Path], asked: dict[str, Sequence[Any]]) -> None:
    """Draw those images that are not there; ``asked`` has the classes or prompts, one for each."""
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    if not missing:
        return
    pipe = _load(NARPipeline, cfg, run)
    options = _options(cfg, pipe)
    with progress_bar(len(missing), desc="images", quiet=run.quiet) as bar:
        for at in range(0, len(missing), cfg.batch):
            part = missing[at : at + cfg.batch]
            batch = padded(part, cfg.batch) if cfg.graphs else part
            given = {name: [values[number] for number in batch] for name, values in asked.items()}
            images = pipe(**given, seeds=[cfg.seed + number for number in batch], **options).images
            for number, image in zip(part, images[: len(part)], strict=True):
                files[number].parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(files[number]) as scratch:
                    image.save(scratch, "PNG")
            bar.update(len(part))


def write_npz(files: Sequence[Path], path: Path) -> None:
    """Images as ``arr_0`` ``[N, H, W, 3]`` uint8 of an ``.npz``, written one after the other."""
    with Image.open(files[0]) as first:
        wide, high = first.size
    head = {"descr": "|u1", "fortran_order": False, "shape": (len(files), high, wide, 3)}
    with (
        atomic_path(path) as scratch,
        zipfile.ZipFile(scratch, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as out,
    ):
        np.lib.format.write_array_header_1_0(out, head)
        for file in files:
            with Image.open(file) as image:
                out.write(np.asarray(image.convert("RGB")).tobytes())


def _imagenet(cfg: EvalConfig, run: Run) -> None:
    assert cfg.model is not None
    count = cfg.limit or COUNTS["imagenet"]
    _, model = read_pipeline(cfg.model)
    generator = torch.Generator().manual_seed(cfg.seed)
    labels = torch.randint(model["num_classes"], (count,), generator=generator).tolist()
    folder, samples = run.artifacts / "images", run.artifacts / "samples.npz"
    files = [folder / f"{number:06}.png" for number in range(count)]
    _draw_images(cfg, run, files, {"class_labels": labels})
    write_npz(files, samples)
    run.row("images", count, better="none", split="imagenet")
    if cfg.scorer is not None:
        assert cfg.reference is not None
        found = _adm(cfg, cfg.reference, samples)
        metrics = ADM_METRICS
    elif cfg.reference is not None:
        options = {
            "fid": True,
            "isc": True,
            "prc": True,
            "verbose": False,
            "cuda": resolve_device(run.device).type == "cuda",
        }
        options |= {"samples_find_deep": True}
        found = fidelity().calculate_metrics(input1=str(folder), input2=str(cfg.reference), **options)
        metrics = FIDELITY_METRICS
    else:
        return
    for key, (name, better) in metrics.items():
        run.row(name, float(found[key]), better=better, n=count, split="imagenet")


def _adm(cfg: EvalConfig, reference: Path, samples: Path) -> dict[str, float]:
    """What ADM's evaluator prints."""
    assert cfg.scorer is not None
    command = [geneval.interpreter(cfg.scorer_python), EVALUATOR, reference.absolute(), samples.absolute()]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=cfg.scorer)
    found = {name: float(value) for name, value in re.findall(r"^([\w ]+): ([\d.eE+-]+)$", done.stdout, re.M)}
    if done.returncode or not set(ADM_METRICS) <= set(found):
        raise RuntimeError(
            f"ADM's evaluator failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-2000:]}"
        )
    return found


def _geneval(cfg: EvalConfig, run: Run) -> None:
    assert cfg.prompts is not None
    prompts = geneval.read_prompts(cfg.prompts, limit=cfg.limit)
    folder = run.artifacts / "images"
    files = [folder / file for prompt in prompts for file in prompt.files]
    _draw_images(cfg, run, files, {"prompt": [prompt.text for prompt in prompts for _ in prompt.files]})
    geneval.write_facts(folder, prompts)
    run.row("images", len(files), better="none", split="geneval")
    if cfg.scorer is None:
        return
    assert cfg.weights is not None
    grades = geneval.score(
        folder, run.path / "scorer" / "geneval.jsonl",
        scorer=cfg.scorer, python=cfg.scorer_python, weights=cfg.weights,
    )  # fmt: skip
    for task, values in grades.items():
        run.row(task, mean(values), better="higher", n=len(values), split="geneval")
    run.row("score", mean(mean(values) for values in grades.values()), better="higher", split="geneval")


def _ucf(cfg: EvalConfig, run: Run) -> None:
    """FVD of as many drawn clips as real ones, whose classes they have."""
    assert cfg.reference is not None
    count = cfg.limit or COUNTS["ucf"]
    videos = [
        (file, label)
        for label, files in enumerate(find_images(cfg.reference, VIDEO_SUFFIXES).values())
        for file in files
    ]
    # The release draws its classes from the training clips with this seed.
    generator = torch.Generator().manual_seed(42)
    chosen = [videos[at] for at in torch.randint(len(videos), (count,), generator=generator)]
    # A window's place is drawn before its video is read, so that a run that was stopped goes on with the same ones.
    shares = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    _begin_or_go_on(run, chosen)
    parts = {at: run.artifacts / "features" / f"{at:06}.safetensors" for at in range(0, count, cfg.batch)}
    missing = [at for at, file in parts.items() if not file.is_file()]
    if missing:
        _write_features(cfg, run, chosen, shares, {at: parts[at] for at in missing})
    found = [load_file(file) for file in parts.values()]
    real, drawn = (torch.cat([part[name] for part in found]) for name in ("real", "drawn"))
    run.row("fvd", frechet(drawn, real, ddof=0), better="lower", n=count, split="ucf")


def _begin_or_go_on(run: Run, chosen: list[tuple[Path, int]]) -> None:
    """Write which videos are taken, and their classes; refuse to go on with others."""
    stored = run.artifacts / "clips.json"
    listed = [[str(file), label] for file, label in chosen]
    if not stored.is_file():
        atomic_write_json(stored, listed)
    elif json.loads(stored.read_text(encoding="utf-8")) != listed:
        raise CheckpointError(f"videos were added or removed since {run.path} was begun; choose another --out")


def _write_features(
    cfg: EvalConfig, run: Run, chosen: list[tuple[Path, int]], shares: list[float], files: dict[int, Path]
) -> None:
    """Features of real and drawn clips, a file for each batch, by its first clip."""
    assert cfg.detector is not None
    pipe, device = _load(NARVideoPipeline, cfg, run), resolve_device(run.device)
    options = _options(cfg, pipe)
    _, frames, side, _ = pipe.vae.shape
    detector = torch.jit.load(cfg.detector, map_location=device).eval()

    def features(clips_01: Tensor) -> Tensor:
        found = detector(2 * clips_01.to(device) - 1, rescale=False, resize=True, return_features=True)
        return found.float().cpu()

    with torch.no_grad(), progress_bar(len(chosen), desc="clips", quiet=run.quiet) as bar:
        bar.update(len(chosen) - sum(len(chosen[at : at + cfg.batch]) for at in files))
        for at, stored in files.items():
            part = chosen[at : at + cfg.batch]
            windows = []
            for (file, _), share in zip(part, shares[at:], strict=False):
                found = clips_of(file, frames, side, "center")[:, 0]
                windows.append(found[int(share * len(found))])
            numbers = [*range(len(part))]
            numbers = padded(numbers, cfg.batch) if cfg.graphs else numbers
            seeds = [cfg.seed + at + number for number in numbers]
            clips = pipe([part[number][1] for number in numbers], seeds=seeds, output_type="pt", **options)
            save_safetensors({"real": features(torch.stack(windows)), "drawn": features(clips[: len(part)])}, stored)
            bar.update(len(part))
