"""What lies where: packaged hosts, saved pipelines, images, texts, codes, benchmarks. Imports no torch to look."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hone_core.errors import CheckpointError, MissingExtraError
from hone_core.hosts import packaged_host
from hone_core.io import read_lines

from .config import EvalConfig, ExtractConfig, GenerateConfig, TrainConfig

__all__ = ["check_benchmark", "check_codes", "check_start", "cleaned", "fidelity", "find_drawn", "find_extracted"]
__all__ += ["find_images", "find_texts", "host_of", "parts_of", "read_pipeline"]

PACKAGE = "hone-nar"
INDEX = "codes.json"
"""What a folder of codes says of itself in."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm", ".mov", ".gif")
LISTING = "metadata.jsonl"
EVALUATOR = Path("evaluations", "evaluator.py")
"""ADM's, in its checkout."""


def host_of(data: str) -> Path:
    """Where the packaged host of digits, or of moving shapes, lies."""
    packaged = packaged_host(PACKAGE)
    return packaged if data == "digits" else packaged.parent / data / packaged.name


def read_pipeline(folder: Path) -> tuple[str, dict[str, Any]]:
    """Class of a saved pipeline, and the config of its transformer.

    Raises:
        CheckpointError: There is none.
    """
    try:
        kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        found = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        return kind, dict(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no saved pipeline; make it with from_published and save_pretrained of NARPipeline"
        ) from error


def cleaned(prompts: Sequence[str]) -> list[str]:
    """Prompts as models of texts were trained on: lower-cased, without blanks around them.

    Raises:
        ValueError: One holds no word.
    """
    found = [prompt.lower().strip() for prompt in prompts]
    if not all(found):
        raise ValueError(f"prompt {found.index('')} holds no word")
    return found


def find_drawn(cfg: GenerateConfig) -> GenerateConfig:
    """Hold classes, prompts and sampling against the folder's configs; no weight is read.

    Raises:
        CheckpointError: The folder holds no saved pipeline.
        ValueError: A class does not exist, a prompt is empty or too long, a value is out of range, or the model takes
            the other kind.
    """
    kind, model = read_pipeline(cfg.model)
    if kind not in ("NARPipeline", "NARVideoPipeline"):
        raise CheckpointError(f"{cfg.model} holds a {kind}; expected a NARPipeline or a NARVideoPipeline")
    classes = model["num_classes"]
    if (classes is None) == bool(cfg.classes):
        wanted, given = ("prompts", "classes") if classes is None else ("classes", "prompts")
        raise ValueError(f"this model draws {wanted}; got {given}")
    wrong = [number for number in cfg.classes if not 0 <= number < classes]
    if wrong:
        raise ValueError(f"classes are 0 to {classes - 1}; got {', '.join(map(str, wrong))}")
    prompts = cleaned(cfg.prompts)
    from hone_visual_ar.pipelines import check_prompts
    from hone_visual_ar.sampling import Sampling

    strength = 1.0 if cfg.guidance is None else cfg.guidance
    Sampling(guidance=strength, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)
    if prompts:
        check_prompts(cfg.model, prompts, model["cls_token_num"])
    return cfg


def find_images(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> dict[str, list[Path]]:
    """Files of each class, by the names of the folders, sorted.

    Raises:
        CheckpointError: There is no folder, no class in it, or a class without a file.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder of images at {folder}")
    found = {
        part.name: sorted(file for file in part.rglob("*") if file.suffix.lower() in suffixes)
        for part in sorted(folder.iterdir())
        if part.is_dir()
    }
    empty = [name for name, files in found.items() if not files]
    if not found or empty:
        what = f"no image of class {', '.join(empty[:3])}" if empty else "no folder of a class"
        raise CheckpointError(f"{folder} holds {what}; expected one for each class, of {', '.join(suffixes)} files")
    return found


def find_texts(folder: Path) -> list[tuple[Path, str]]:
    """Images that ``metadata.jsonl`` lists, and their texts.

    Raises:
        CheckpointError: There is none, a line is no such entry, an image is missing, or a text holds no word.
    """
    listing = folder / LISTING
    if not listing.is_file():
        raise CheckpointError(f"there is no {listing}; expected a line for each image, with file_name and text")
    found = []
    for number, line in enumerate(read_lines(listing), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            file, text = folder / entry["file_name"], entry["text"].strip()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{listing}, line {number}: expected file_name and text; got {line[:80]}") from error
        if not file.is_file():
            raise CheckpointError(f"{listing}, line {number}: there is no {file}")
        if not text:
            raise CheckpointError(f"{listing}, line {number}: the text holds no word")
        found.append((file, text))
    if not found:
        raise CheckpointError(f"{listing} lists no image")
    return found


def parts_of(cfg: ExtractConfig) -> list[tuple[str, list[tuple[Path, str]]]]:
    """Files of each part, with their texts; parts are classes, or some images with texts.

    Raises:
        CheckpointError: As ``find_images`` and ``find_texts``.
    """
    if cfg.kind == "texts":
        pairs = find_texts(cfg.images)
        return [("", pairs[at : at + cfg.shard]) for at in range(0, len(pairs), cfg.shard)]
    found = find_images(cfg.images, VIDEO_SUFFIXES if cfg.kind == "clips" else SUFFIXES)
    return [(name, [(file, "") for file in files]) for name, files in found.items()]


def find_extracted(cfg: ExtractConfig) -> ExtractConfig:
    """Look for images and tokenizer; no weight is read.

    Raises:
        CheckpointError: One of them is missing.
    """
    if not cfg.vae.exists():
        raise CheckpointError(f"there is no tokenizer at {cfg.vae}; name vq_ds16_c2i.pt or a saved folder")
    parts_of(cfg)
    return cfg


def check_codes(folder: Path) -> None:
    """Look whether a folder holds codes, or the release's.

    Raises:
        CheckpointError: It does not.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder of codes at {folder}; make one with hone-nar extract")
    if not (folder / INDEX).is_file() and not all(any(folder.glob(f"*_{what}")) for what in ("codes", "labels")):
        raise CheckpointError(
            f"{folder} holds no codes: neither {INDEX}, as hone-nar extract writes it, nor the release's folders "
            "*_codes and *_labels"
        )


def check_start(cfg: TrainConfig) -> None:
    """Look for codes, and for weights to begin with.

    Raises:
        CheckpointError: They are not there.
    """
    for file in (cfg.start, cfg.raster):
        if file is not None and not file.exists():
            raise CheckpointError(f"there are no weights at {file}")
    check_codes(cfg.data)


def check_benchmark(cfg: EvalConfig) -> None:
    """Look for everything that a protocol needs; no weight is read.

    Raises:
        CheckpointError: Pipeline, reference, detector, prompts or scorer are not there.
        MissingExtraError: torch-fidelity is asked for and not installed.
        ValueError: The pipeline is of another kind, a prompt is empty or too long, or there is no Python for the
            scorer.
    """
    from hone_visual_ar import geneval

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
            if cfg.reference is None:
                raise CheckpointError("ADM's evaluator needs --reference VIRTUAL_imagenet256_labeled.npz")
            if not cfg.reference.is_file():
                raise CheckpointError(
                    f"there is no {cfg.reference}; ADM's evaluator needs --reference VIRTUAL_imagenet256_labeled.npz"
                )
            geneval.interpreter(cfg.scorer_python)
        elif cfg.reference is not None:
            if not cfg.reference.is_dir():
                raise CheckpointError(f"there is no folder of real images at {cfg.reference}; an .npz needs --scorer")
            fidelity()
    elif cfg.protocol == "ucf":
        assert cfg.reference is not None
        assert cfg.detector is not None
        if not cfg.detector.is_file():
            raise CheckpointError(f"there is no I3D at {cfg.detector}; name the TorchScript file of StyleGAN-V")
        classes = find_images(cfg.reference, VIDEO_SUFFIXES)
        if len(classes) != model["num_classes"]:
            raise ValueError(f"{cfg.reference} holds {len(classes)} classes; the model has {model['num_classes']}")
    else:
        assert cfg.prompts is not None
        prompts = [prompt.text for prompt in geneval.read_prompts(cfg.prompts, limit=cfg.limit)]
        if cfg.scorer is not None:
            assert cfg.weights is not None
            geneval.check_scorer(cfg.scorer)
            if not cfg.weights.is_dir():
                raise CheckpointError(f"there is no folder of GenEval's Mask2Former at {cfg.weights}")
            geneval.interpreter(cfg.scorer_python)
        from hone_visual_ar.pipelines import check_prompts

        check_prompts(cfg.model, cleaned(prompts), model["cls_token_num"])


def fidelity() -> Any:
    """The module ``torch_fidelity``.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module("torch_fidelity")
    except ImportError as error:
        raise MissingExtraError("fid", "hone-nar", "FID against a folder") from error
