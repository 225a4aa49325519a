"""How heads are mixed, and the settings of every verb. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from hone_core.config import Dtype, Preset, check_least, flag
from hone_core.training import check_budget
from hone_video.training_config import LoopConfig

__all__ = ["HEADS", "PRESETS", "BenchConfig", "DemoConfig", "EvalConfig", "GenerateConfig", "HostConfig", "NARConfig"]
__all__ += ["ExtractConfig", "ReproduceConfig", "TrainConfig", "TrainHostConfig"]

Mix = Literal["average", "right", "below", "back"]
HEADS: tuple[Mix, ...] = ("right", "below", "back")
"""Heads by the axis that they move along: the last, the one before, the one before that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NARConfig:
    """How the heads' logits become one distribution where several reach a token."""

    mix: Mix = "average"
    """``average`` of their logits, as trained; or one head alone wherever it reaches, an ablation."""

    def __post_init__(self) -> None:
        if self.mix not in get_args(Mix):
            raise ValueError(f"mix must be one of {', '.join(get_args(Mix))}; got {self.mix!r}")


PRESETS: dict[str, Preset[NARConfig]] = {
    "nar": Preset(config=NARConfig(), model="Every NAR", provenance="Section 3.3, and the release's average of logits"),
    "right-only": Preset(
        config=NARConfig(mix="right"), model="NAR of images", provenance="Table 5, first row: the right head alone"
    ),
    "below-only": Preset(
        config=NARConfig(mix="below"), model="NAR of images", provenance="Table 5, second row: the below head alone"
    ),
    "tiny": Preset(config=NARConfig(), model="The tiny host", provenance="As nar"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """Architecture of the tiny host: a NAR, and a raster LlamaGen of as many blocks in all."""

    data: Literal["digits", "shapes"] = "digits"
    """What it draws: handwritten digits, or clips of a moving shape."""
    dim: int = 64
    """Channels."""
    layers: int = 3
    """Blocks before those of further heads; the raster model has as many in all."""
    heads: int = 4
    """Of attention."""

    def __post_init__(self) -> None:
        if min(self.dim, self.layers, self.heads) < 1 or self.dim % (4 * self.heads):
            raise ValueError(f"dim must be a multiple of 4 heads; got {self.dim} and {self.heads}")
        if self.data not in ("digits", "shapes"):
            raise ValueError(f"data must be digits or shapes; got {self.data!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainHostConfig:
    """Training of the tiny host: NAR and the raster model in turns, as many steps each."""

    host: HostConfig = field(default_factory=HostConfig, metadata=flag(hidden=True))
    """Architecture."""
    data: Literal["digits", "shapes"] = "digits"
    """What it learns to draw: handwritten digits, or clips of a moving shape (on a GPU)."""
    seed: int = 0
    """Of weights and data."""
    minutes: float = 4.0
    """Wall clock of the training itself, where steps is not given."""
    steps: int | None = 3000
    """Optimiser steps of both models together, in place of a time."""
    batch: int = 64
    """Images of a step."""
    lr: float = 2e-3
    """Peak learning rate."""
    drop: float = 0.1
    """Share of classes that are dropped, for guidance."""
    dropout: float = 0.1
    """Of tokens, residual branches and feed-forward."""
    ema: float = 0.995
    """Decay of the weights' moving average, which is what is kept."""
    log_every: int = 50
    """Steps between two logged ones."""
    checkpoint_seconds: float = 120.0
    """Least time between two checkpoints, from which a stopped run goes on."""
    eval_images: int = 500
    """Drawn images that the grades are over."""

    def __post_init__(self) -> None:
        check_budget(self, "batch", "lr")
        HostConfig(data=self.data)
        if self.steps is not None and self.steps < 2:
            raise ValueError(f"steps are of two models; got {self.steps}")
        if not 0 <= self.drop < 1 or not 0 <= self.dropout < 1 or not 0 < self.ema < 1:
            raise ValueError(
                f"drop, dropout and ema are shares in [0, 1); got {self.drop}, {self.dropout} and {self.ema}"
            )
        check_least(self, 20, "eval_images")


def _release_loop() -> LoopConfig:
    return LoopConfig(
        steps=1_500_000, batch=256, micro_batch=32, lr=1e-4, warmup_steps=1, weight_decay=0.05, ema=0.9999,
        log_every=100, checkpoint_every=5000,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Training on stored codes; by itself as the release trains on ImageNet: 300 passes of 256 images a step."""

    data: Path
    """Folder of codes: what ``extract`` wrote, or the release's ``*_codes`` and ``*_labels``."""
    model: str = "nar_b"
    """A published size that the codes are for, such as nar_l, llamagen_b or flashar_l of classes, nar_xl_t2i of texts,
    nar_video_l of clips; or tiny, tiny-raster, tiny-flashar."""
    text_encoder: str | None = None
    """Folder or hub address of the T5 that reads the images' texts, such as google/flan-t5-xl."""
    grid: tuple[int, ...] = (16, 16)
    """Rows and columns of tokens, of clips frames before them; those of the codes."""
    codebook: int = 16384
    """Entries; those of the codes."""
    classes: int = 1000
    """Classes of the model; not fewer than the codes have."""
    start: Path | None = None
    """Weights of this size to begin with."""
    raster: Path | None = None
    """Weights of a raster LlamaGen of this size: its last block and head are cloned for the below head."""
    loss: Literal["mixture", "separate", "flashar"] = "mixture"
    """Cross-entropy of the heads' averaged logits, as published; of each head; or, of FlashAR, of the mixture and a
    twentieth of each head's."""
    first_stage: float = 0.2
    """FlashAR: share of the training in which the new parts alone learn."""
    backbone_rate: float = 0.2
    """FlashAR: rate of the backbone over that of the new parts, after the first stage."""
    drop: float = 0.1
    """Share of conditions that are dropped, for guidance."""
    dropout: float = 0.1
    """Of tokens, residual branches and feed-forward."""
    schedule: Literal["steps", "cosine"] = "steps"
    """How the rate falls: at milestones, or as half a cosine, as of texts and in the clips' scripts."""
    milestones: tuple[float, ...] = (1 / 2, 2 / 3, 5 / 6)
    """Shares of the training at which the rate falls."""
    factor: float = 0.2
    """What the rate falls by."""
    least: float = 0.0
    """Share of the rate that a cosine ends at."""
    decayed: Literal["matrices", "linear"] = "matrices"
    """What weight decay is of: matrices and tables, as of images; or linear layers alone, as of clips."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward; weights are float32."""
    prefixes: bool = False
    """Attend by a kernel in which each row reads its prefix of the sequence, in place of a mask."""
    loop: LoopConfig = field(default_factory=_release_loop)
    """Length, batch, rate and what is kept on the way."""

    def __post_init__(self) -> None:
        for name, words in (
            ("loss", ("mixture", "separate", "flashar")), ("schedule", ("steps", "cosine")),
            ("decayed", ("matrices", "linear")),
        ):  # fmt: skip
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}; got {getattr(self, name)!r}")
        if not 0 <= self.first_stage < 1 or not 0 < self.backbone_rate <= 1 or not 0 <= self.least < 1:
            raise ValueError(
                "first_stage and least are shares in [0, 1), backbone_rate lies in (0, 1]; got "
                f"{self.first_stage}, {self.least} and {self.backbone_rate}"
            )
        if self.start is not None and self.raster is not None:
            raise ValueError("give start or raster, and not both")
        if not 0 <= self.drop < 1 or not 0 <= self.dropout < 1 or not 0 < self.factor <= 1:
            raise ValueError(
                f"drop and dropout are shares in [0, 1), factor lies in (0, 1]; got {self.drop}, {self.dropout} and "
                f"{self.factor}"
            )
        if any(not 0 < share < 1 for share in self.milestones):
            raise ValueError(f"milestones are shares of the training in (0, 1); got {self.milestones}")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype must be auto, bfloat16 or float32; got {self.dtype!r}")
        check_least(self, 1, "classes", "codebook")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig:
    """Codes of images of classes, of images with texts, or of clips of classes."""

    images: Path
    """Folder with a folder of images for each class, which are numbered by name; of texts, a folder of images with a
    ``metadata.jsonl``, a line for each: ``{"file_name": "a.png", "text": "a red cat"}``; of clips, a folder of videos
    for each class."""
    vae: Path
    """``vq_ds16_c2i.pt`` (``vq_ds16_t2i.pt`` of texts), or a folder of a saved ``LlamaGenVQModel``; of clips, LARP's
    file, or a folder of a saved ``LARPTokenizer``."""
    kind: Literal["classes", "texts", "clips"] = "classes"
    """What is read."""
    size: int = 256
    """Side of a view in pixels; of clips, the tokenizer says."""
    crops: Literal["ten", "center"] = "ten"
    """Views of an image: corners and centre of one a tenth larger, each mirrored too; or its centre. Of clips, those of
    all frames: a centre, and with ``ten`` its mirror too."""
    grid: tuple[int, int, int] = (4, 16, 16)
    """Of clips: frames, rows and columns that the tokenizer's row of tokens is laid out as."""
    shard: int = 1000
    """Of texts: images of a file."""
    dtype: Dtype = "float32"
    """Of the tokenizer; in 16 bits some codes come out otherwise."""

    def __post_init__(self) -> None:
        if self.crops not in ("ten", "center"):
            raise ValueError(f"crops must be ten or center; got {self.crops!r}")
        if self.kind not in ("classes", "texts", "clips"):
            raise ValueError(f"kind must be classes, texts or clips; got {self.kind!r}")
        check_least(self, 1, "size", "shard")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Digits, or clips of another host, by NAR and by a raster model, the picture growing from the corner."""

    host: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one of ``data``)."""
    data: Literal["digits", "shapes"] = "digits"
    """Which packaged host: of digits, or of clips of a moving shape."""
    limit: int = 10
    """Images, whose classes count up."""
    guidance: float = 1.0
    """Strength of guidance; 1 is none."""
    seed: int = 0
    """Of the first image."""

    def __post_init__(self) -> None:
        check_least(self, 1, "limit")
        HostConfig(data=self.data)
        if self.host is not None and self.data != "digits":
            raise ValueError("--data chooses among the packaged hosts; leave it out with --host")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Quality of drawn digits, or likelihoods alone, of the tiny host; likelihoods of a saved model; a benchmark."""

    protocol: Literal["host", "imagenet", "ucf", "geneval"] = "host"
    """``host``: the tiny host, or ``--nll`` of a saved model. Of a saved pipeline: ``imagenet`` (FID and IS), ``ucf``
    (FVD of clips), ``geneval``."""
    model: Path | None = None
    """Folder of a saved NAR, LlamaGen or FlashAR, whose likelihoods of ``data`` are taken; of a pipeline with the other
    protocols, as its ``save_pretrained`` writes it."""
    data: Path | None = None
    """Folder of codes, as ``train`` reads it."""
    text_encoder: str | None = None
    """With ``data``: the T5 that reads the images' texts."""
    host: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one)."""
    nll: bool = False
    """Likelihoods alone; nothing is drawn."""
    limit: int | None = None
    """Images that are drawn of each variant (default: 1000), or by the protocol (default: 50000 of imagenet, 10000 of
    ucf); with ``data``, that likelihoods are taken of (default: 1000); prompts of geneval (default: all)."""
    batch: int = 250
    """Images at a time."""
    graphs: bool = False
    """Of a pipeline: steps as CUDA graphs with fused kernels."""
    guidance: float | None = None
    """Strength of guidance; 1 is none (default: 1; of a pipeline the published one)."""
    seed: int = 0
    """Of the first image."""
    reference: Path | None = None
    """imagenet: ADM's reference batch (with ``scorer``), or a folder of real images (by torch-fidelity, extra ``fid``).
    ucf: a folder of videos for each class."""
    detector: Path | None = None
    """ucf: the I3D that StyleGAN-V ships as TorchScript."""
    prompts: Path | None = None
    """geneval: its ``evaluation_metadata.jsonl``."""
    scorer: Path | None = None
    """Checkout of openai/guided-diffusion (imagenet) or djghosh13/geneval; without one, images are only drawn."""
    scorer_python: str = "python"
    """Interpreter that has the scorer's own, older packages."""
    weights: Path | None = None
    """geneval: folder of its Mask2Former."""

    def __post_init__(self) -> None:
        check_least(self, 1, "batch")
        if self.limit is not None:
            check_least(self, 20 if self.protocol == "host" else 1, "limit")
        if self.protocol not in ("host", "imagenet", "ucf", "geneval"):
            raise ValueError(f"protocol must be host, imagenet, ucf or geneval; got {self.protocol!r}")
        others = ("reference", "detector", "prompts", "scorer", "weights")
        given = [name for name in others if getattr(self, name) is not None]
        if self.protocol == "host":
            if given:
                raise ValueError(f"--{given[0]} belongs to another protocol than host")
            if self.graphs:
                raise ValueError("--graphs belongs to another protocol than host")
            if (self.model is None) != (self.data is None) or (self.model is not None and not self.nll):
                raise ValueError("likelihoods of a saved model need --model, --data and --nll together")
            if self.model is not None and self.host is not None:
                raise ValueError("give a host or a saved model, and not both")
            if self.nll:
                # The host's likelihoods are of all held-out ones.
                idle = ("guidance",) if self.model is not None else ("limit", "guidance")
                told = [name for name in idle if getattr(self, name) is not None]
                if told:
                    raise ValueError(f"nothing is drawn with --nll: leave --{told[0]} out")
            if self.text_encoder is not None and self.model is None:
                raise ValueError("--text-encoder belongs to --model")
            return
        if self.model is None or self.nll or any((self.data, self.host, self.text_encoder)):
            raise ValueError(f"protocol {self.protocol} takes a saved pipeline, --model FOLDER, and no host or codes")
        takes = {
            "imagenet": ("reference", "scorer"), "ucf": ("reference", "detector"),
            "geneval": ("prompts", "scorer", "weights"),
        }[self.protocol]  # fmt: skip
        needs = {"imagenet": (), "ucf": ("reference", "detector"), "geneval": ("prompts",)}[self.protocol]
        wrong, lacking = [name for name in given if name not in takes], [name for name in needs if name not in given]
        if wrong or lacking:
            raise ValueError(
                f"protocol {self.protocol} takes {', '.join(f'--{name}' for name in takes)}; got --{wrong[0]}"
                if wrong
                else f"protocol {self.protocol} needs {' and '.join(f'--{name}' for name in lacking)}"
            )
        if self.protocol == "geneval" and (self.scorer is None) != (self.weights is None):
            raise ValueError("GenEval's scorer needs --scorer and --weights together")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """Images of classes or prompts, or clips of classes, with a saved pipeline."""

    model: Path
    """Folder of a ``NARPipeline`` or ``NARVideoPipeline``, as its ``save_pretrained`` writes it."""
    classes: tuple[int, ...] = ()
    """Of each image or clip, for a model of classes."""
    prompts: tuple[str, ...] = field(default=(), metadata=flag("prompt"))
    """What to draw, one image each, for a model of texts."""
    guidance: float | None = None
    """Strength of guidance; 1 is none (default: as published, 2 of classes, 7.5 of texts, 1.25 of clips)."""
    temperature: float = 1.0
    """Of the tokens."""
    top_k: int = 0
    """Entries of the codebook that are kept; 0 keeps all."""
    top_p: float = 0.0
    """Least mass that is kept; 0 keeps all."""
    batch: int = 1
    """Images at a time."""
    graphs: bool = False
    """Steps as CUDA graphs with fused kernels; the first batch takes some seconds more."""
    seed: int = 0
    """Of the first image; the following ones count up."""
    fps: int = 25
    """Frames per second of a clip's file; UCF-101 has 25."""
    dtype: Dtype = "auto"
    """Of transformer and text encoder."""

    def __post_init__(self) -> None:
        if bool(self.classes) == bool(self.prompts):
            raise ValueError("give classes or prompts, and not both")
        check_least(self, 1, "batch", "fps")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Time of drawing at real sizes with random weights: the release's loop, ours, and raster in the same engine."""

    models: tuple[str, ...] = field(default=("tiny",), metadata=flag("model"))
    """``tiny``, or published sizes such as nar_l, nar_xl_t2i (texts, at 512 px) or nar_video_l (need a CUDA device)."""
    batches: tuple[int, ...] = (1,)
    """Images at a time, each of them timed."""
    raster: bool = True
    """Also time a raster LlamaGen of the size; of clips there is none."""
    graphs: bool | None = None
    """Steps as CUDA graphs (default: where there is a CUDA device)."""
    modes: tuple[Literal["eager", "graphs", "compiled", "fused", "few"], ...] = (
        "eager",
        "graphs",
        "compiled",
        "fused",
        "few",
    )
    """What is timed beside the release's loop; all but eager need graphs."""
    guidance: float = 2.0
    """Strength of guidance; 1 is none, at half the work."""
    dtype: Dtype = "auto"
    """Of the weights."""
    warmup: int = 2
    """Untimed batches first."""
    rounds: int = 10
    """Timed batches of each."""
    bandwidth: float | None = None
    """Memory bandwidth of the device in TB/s, for the least time in which weights can be read (H100 SXM 3.35, H200
    4.8); without it that floor is left out."""
    seed: int = 0
    """Of weights and classes."""

    def __post_init__(self) -> None:
        if not self.models or not self.batches or min(self.batches) < 1:
            raise ValueError(f"expected models and batches of at least 1; got {self.models} and {self.batches}")
        if not self.modes or not set(self.modes) <= {"eager", "graphs", "compiled", "fused", "few"}:
            raise ValueError(f"modes must be of eager, graphs, compiled, fused and few; got {self.modes}")
        check_least(self, 1, "rounds")
        check_least(self, 0, "warmup")
        if self.bandwidth is not None and self.bandwidth <= 0:
            raise ValueError(f"bandwidth must be positive; got {self.bandwidth}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceConfig:
    """The paper's central claim on digits or on moving shapes: several ways to train and draw, over several seeds."""

    host: HostConfig = field(default_factory=HostConfig, metadata=flag(hidden=True))
    """Architecture."""
    data: Literal["digits", "shapes"] = "digits"
    """Digits; or clips of a moving shape, where it is asked too whether the order must follow the clip."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights, order of data and draws."""
    steps: int = 900
    """Optimiser steps of each training."""
    batch: int = 64
    """Images of a step."""
    lr: float = 1e-3
    """Peak learning rate."""
    dropout: float = 0.1
    """Of tokens, residual branches and feed-forward."""
    limit: int = 1500
    """Images that are drawn of each variant."""

    def __post_init__(self) -> None:
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds must be different and at least one; got {self.seeds}")
        HostConfig(data=self.data)
        check_least(self, 1, "steps", "batch")
        check_least(self, 20, "limit")
