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

import importlib
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
from hone_core.errors import CheckpointError, MissingExtraError
from hone_core.io import atomic_path
from hone_core.progress import progress_bar
from hone_core.runs import Better, Run
from hone_visual_ar import geneval
from hone_visual_ar.pipelines import check_prompts
from hone_visual_ar.quality import frechet
from PIL import Image
from torch import Tensor

from .config import EvalConfig
from .extract import VIDEO_SUFFIXES, clips_of, find_images
from .pipelines import NARPipeline, NARVideoPipeline
from .sample import graph_device, padded, read_pipeline

__all__ = ["COUNTS", "check_benchmark", "judge", "write_npz"]

COUNTS = {"imagenet": 50_000, "ucf": 10_000}
"""Images and clips that are drawn by each protocol."""
EVALUATOR = Path("evaluations", "evaluator.py")
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


def check_benchmark(cfg: EvalConfig) -> None:
    """Look for everything that a protocol needs; no weight is read.

    Raises:
        CheckpointError: Pipeline, reference, detector, prompts or scorer are not there.
        MissingExtraError: torch-fidelity is asked for and not installed.
        ValueError: The pipeline is of another kind, or a prompt is too long.
    """
    assert cfg.model is not None
    kind, model = read_pipeline(cfg.model)
    wanted = "NARVideoPipeline" if cfg.protocol == "ucf" else "NARPipeline"
    if kind != wanted:
        raise CheckpointError(f"{cfg.model} holds a {kind}; protocol {cfg.protocol} needs a {wanted}")
    texts = model.get("num_classes") is None
    if texts != (cfg.protocol == "geneval"):
        raise ValueError(f"protocol {cfg.protocol} needs a model of {'classes' if texts else 'texts'}")
    if cfg.protocol == "imagenet":
        if cfg.scorer is not None:
            if not (cfg.scorer / EVALUATOR).is_file():
                raise CheckpointError(
                    f"there is no {cfg.scorer / EVALUATOR}; name a checkout of openai/guided-diffusion"
                )
            if cfg.reference is None or not cfg.reference.is_file():
                raise CheckpointError("ADM's evaluator needs --reference VIRTUAL_imagenet256_labeled.npz")
        elif cfg.reference is not None:
            if not cfg.reference.is_dir():
                raise CheckpointError(f"there is no folder of real images at {cfg.reference}; an .npz needs --scorer")
            _fidelity()
    elif cfg.protocol == "ucf":
        assert cfg.reference is not None
        assert cfg.detector is not None
        classes = find_images(cfg.reference, VIDEO_SUFFIXES)
        if len(classes) != model["num_classes"]:
            raise ValueError(f"{cfg.reference} holds {len(classes)} classes; the model has {model['num_classes']}")
        if not cfg.detector.is_file():
            raise CheckpointError(f"there is no I3D at {cfg.detector}; name the TorchScript file of StyleGAN-V")
    else:
        assert cfg.prompts is not None
        prompts = geneval.read_prompts(cfg.prompts, limit=cfg.limit)
        check_prompts(cfg.model, [prompt.text for prompt in prompts], model["cls_token_num"])
        if cfg.scorer is not None:
            geneval.check_scorer(cfg.scorer)


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
        found = _fidelity().calculate_metrics(input1=str(folder), input2=str(cfg.reference), **options)
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


def _fidelity() -> Any:
    try:
        return importlib.import_module("torch_fidelity")
    except ImportError as error:
        raise MissingExtraError("fid", "hone-nar", "FID against a folder") from error


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
    assert cfg.detector is not None
    device, count = resolve_device(run.device), cfg.limit or COUNTS["ucf"]
    videos = [
        (file, label)
        for label, files in enumerate(find_images(cfg.reference, VIDEO_SUFFIXES).values())
        for file in files
    ]
    # The release draws its classes from the training clips with this seed.
    generator = torch.Generator().manual_seed(42)
    chosen = [videos[at] for at in torch.randint(len(videos), (count,), generator=generator)]
    pipe = _load(NARVideoPipeline, cfg, run)
    options = _options(cfg, pipe)
    _, frames, side, _ = pipe.vae.shape
    detector = torch.jit.load(cfg.detector, map_location=device).eval()

    def features(clips_01: Tensor) -> Tensor:
        found = detector(2 * clips_01.to(device) - 1, rescale=False, resize=True, return_features=True)
        return found.float().cpu()

    real, drawn = [], []
    with torch.no_grad(), progress_bar(count, desc="clips", quiet=run.quiet) as bar:
        for at in range(0, count, cfg.batch):
            part = chosen[at : at + cfg.batch]
            windows = []
            for file, _ in part:
                found = clips_of(file, frames, side, "center")[:, 0]
                windows.append(found[int(torch.randint(len(found), (1,), generator=generator))])
            real.append(features(torch.stack(windows)))
            numbers = [*range(len(part))]
            numbers = padded(numbers, cfg.batch) if cfg.graphs else numbers
            seeds = [cfg.seed + at + number for number in numbers]
            clips = pipe([part[number][1] for number in numbers], seeds=seeds, output_type="pt", **options)
            drawn.append(features(clips[: len(part)]))
            bar.update(len(part))
    value = frechet(torch.cat(drawn), torch.cat(real), ddof=0)
    run.row("fvd", value, better="lower", n=count, split="ucf")
    run.artifacts.mkdir(parents=True, exist_ok=True)
    with atomic_path(run.artifacts / "classes.json") as scratch:
        scratch.write_text(json.dumps([label for _, label in chosen]), encoding="utf-8")
