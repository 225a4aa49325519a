"""Options of the method, sizes of its models, and the settings of every verb. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Literal, get_args

from hone_core.config import Dtype, Preset, check_least, flag
from hone_core.training import check_budget

__all__ = [
    "ARMS",
    "PRESETS",
    "ArmConfig",
    "BenchConfig",
    "ConvertConfig",
    "DemoConfig",
    "EvalConfig",
    "EvaluatorConfig",
    "GenerateConfig",
    "HostConfig",
    "MakeSetConfig",
    "MotionAnythingConfig",
    "ReproduceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TrainHostConfig",
    "TransformerConfig",
    "UnmaskConfig",
]

Bones = Literal["fixed", "stretched"]
Masking = Literal["attention", "random", "events", "cosine"]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _check_bones(bones: Bones, formats: tuple[str, ...]) -> None:
    _one_of("bones", bones, get_args(Bones))
    if bones == "stretched" and not {"bvh", "gltf"} & set(formats):
        raise ValueError(f"bones are stretched in bvh and gltf; got {', '.join(formats)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MotionAnythingConfig:
    """Which tokens a training hides."""

    masking: Masking = "attention"
    """``attention``: the method, Algorithm 1. ``random``: as many frames and parts at random. ``events``: cells that
    are known to move, and others at random up to as many tokens. ``cosine``: MoMask's random ratio alone."""
    alpha_time: float = 0.3
    """Share of frames that the method hides; 0.3 is the paper's best (table 6)."""
    alpha_parts: float = 0.3
    """Share of parts that it hides in each other frame; 0.3 is the paper's best."""
    p_attention: float = 0.5
    """Chance that a motion takes the method's mask; else it takes MoMask's cosine ratio, without which no generation
    from an empty grid is learned. Ours; the paper says nothing, and 1 is how it reads."""
    score_rows: Literal["condition", "all"] = "condition"
    """Whose attention a frame's score is where there is only a text: the text's, or the mean of all. Ours."""
    corrupt: float = 0.1
    """Share of the hidden tokens that get a wrong id in place of the mask's. MoMask's; the paper says nothing."""

    def __post_init__(self) -> None:
        _one_of("masking", self.masking, get_args(Masking))
        _one_of("score_rows", self.score_rows, ("condition", "all"))
        for name in ("alpha_time", "alpha_parts", "p_attention", "corrupt"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share and must lie in [0, 1]; got {getattr(self, name)}")
        if self.masking != "cosine" and self.p_attention and not self.alpha_time and not self.alpha_parts:
            raise ValueError(
                "with alpha_time and alpha_parts of 0 the method hides nothing, and nothing is learned; give one of "
                "them a share, or take p_attention=0"
            )


PRESETS: dict[str, Preset[MotionAnythingConfig]] = {
    "paper": Preset(
        config=MotionAnythingConfig(p_attention=1.0, corrupt=0.0),
        model="Masked motion transformers",
        provenance="Shares of table 6; every mask by attention, as the text reads. It does not learn to generate.",
    ),
    "default": Preset(
        config=MotionAnythingConfig(),
        model="Masked motion transformers",
        provenance="Shares of table 6; every second mask by MoMask's cosine ratio and its corruption are ours.",
    ),
    "random": Preset(
        config=MotionAnythingConfig(masking="random"),
        model="Masked motion transformers",
        provenance="The ablation's first row: as many tokens at random.",
    ),
    "momask": Preset(
        config=MotionAnythingConfig(masking="cosine"),
        model="Masked motion transformers",
        provenance="MoMask's training: random, by a cosine ratio.",
    ),
    "tiny": Preset(config=MotionAnythingConfig(), model="The tiny host", provenance="Ours: the default."),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Sizes of a masked motion transformer, and what the paper leaves open in it."""

    width: int = 512
    """Channels. The paper gives 12.65 M parameters, which four layers of 512 have (ours)."""
    heads: int = 8
    """Attention heads; ours."""
    hidden: int = 2048
    """Channels of the feed-forward layers; ours."""
    layers: int = 4
    """Layers, half of them TAT and half SAT; 4 is the paper's."""
    dropout: float = 0.2
    """Of attention and feed-forward layers; MoMask's."""
    parts: int = 6
    """Columns of the token grid; ours."""
    codes: int = 512
    """Ids of a column; ours."""
    max_tokens: int = 64
    """Most time steps; ours."""
    text_width: int = 512
    """Channels of the text's vector; CLIP ViT-B/32 has 512."""
    music_width: int = 35
    """Channels of a time step of the music; ours."""
    music_keys: Literal["condition", "condition_and_motion"] = "condition"
    """What the motion asks where there is music: the condition alone, as the paper prints, or itself too (ours)."""
    sat_condition: Literal["projected", "split_channels", "self_plus_condition"] = "projected"
    """How one time step's condition becomes several keys: learned maps, cut channels, or with the parts themselves. The
    paper only says that it is rearranged; all three are ours."""
    gate: Literal["product", "residual", "none"] = "product"
    """How a block joins its input and its output; ``product`` is the figure's."""

    def __post_init__(self) -> None:
        _one_of("music_keys", self.music_keys, ("condition", "condition_and_motion"))
        _one_of("sat_condition", self.sat_condition, ("projected", "split_channels", "self_plus_condition"))
        _one_of("gate", self.gate, ("product", "residual", "none"))
        if self.layers < 2 or self.layers % 2:
            raise ValueError(f"layers are pairs of TAT and SAT: an even number from 2; got {self.layers}")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads must divide width; got {self.heads} and {self.width}")
        if min(self.parts, self.codes, self.max_tokens, self.text_width, self.music_width, self.hidden) < 1:
            raise ValueError("parts, codes, max_tokens, hidden, text_width and music_width must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {self.dropout}")


@dataclass(frozen=True, kw_only=True, slots=True)
class UnmaskConfig:
    """How motion is made from hidden tokens; the paper says nothing, so all is MoMask's or ours."""

    steps: int = 10
    """Passes; MoMask's."""
    text_guidance: float = 4.0
    """Strength of the text; 1 is none. MoMask's."""
    music_guidance: float = 2.0
    """Strength of the music; 1 is none. Ours."""
    temperature: float = 1.0
    """Of the draws; 0 takes the likeliest."""
    keep: float = 0.1
    """Share of the ids that may be drawn; MoMask's."""
    remask: Literal["confidence", "attention"] = "confidence"
    """What is hidden again: what was drawn least surely (MoMask), or what the condition attends to (ours)."""

    def __post_init__(self) -> None:
        _one_of("remask", self.remask, ("confidence", "attention"))
        if self.steps < 1 or not 0 <= self.temperature < inf or not 0 < self.keep <= 1:
            raise ValueError(
                f"steps must be at least 1, temperature finite and not negative, keep a share above 0; got "
                f"{self.steps}, {self.temperature}, {self.keep}"
            )
        if not isfinite(self.text_guidance) or not isfinite(self.music_guidance):
            raise ValueError(
                f"text_guidance and music_guidance must be finite; got {self.text_guidance} and {self.music_guidance}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Ours: a small vector-quantised autoencoder for each part, so that its tokens hold that part alone."""

    width: int = 64
    """Channels of each part's convolutions."""
    depth: int = 2
    """Residual units at each resolution."""
    codes: int = 256
    """Vectors of a codebook."""
    code_dim: int = 32
    """Numbers of one."""
    decay: float = 0.99
    """Of the moving averages that the codebooks are; MoMask's."""

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.codes, self.code_dim) < 1:
            raise ValueError("width, depth, codes and code_dim must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatorConfig:
    """Sizes of a T2M evaluator; the published one has 512, 512, 1024, 512 and 300 (GloVe)."""

    movement: int = 96
    """Channels of the movement encoder."""
    motion: int = 96
    """Hidden numbers of the motion encoder."""
    text: int = 96
    """Hidden numbers of the text encoder."""
    out: int = 64
    """Numbers of an embedding."""
    word: int = 32
    """Numbers of a word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """Architecture of the tiny host: tokenizer by parts, masked transformer, text encoder, evaluator."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Motion to tokens."""
    transformer: TransformerConfig = field(
        default_factory=lambda: TransformerConfig(
            width=128,
            heads=4,
            hidden=384,
            layers=4,
            dropout=0.1,
            codes=256,
            max_tokens=40,
            text_width=96,
            music_keys="condition_and_motion",
            sat_condition="self_plus_condition",
            gate="residual",
        )
    )
    """Masked transformer; what differs from the paper is for its size."""
    evaluator: EvaluatorConfig = field(default_factory=EvaluatorConfig)
    """T2M evaluator."""

    def __post_init__(self) -> None:
        if self.tokenizer.codes != self.transformer.codes:
            raise ValueError(
                f"tokenizer and transformer must have as many codes; got {self.tokenizer.codes} and "
                f"{self.transformer.codes}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainHostConfig:
    """Training of the tiny host on the grammar: tokenizer, evaluator, then transformer with its text encoder."""

    host: HostConfig = field(default_factory=HostConfig, metadata=flag(hidden=True))
    """Architecture."""
    settings: MotionAnythingConfig = field(default_factory=lambda: PRESETS["tiny"].config)
    """The method."""
    seed: int = 0
    """Of weights and data."""
    minutes: float = 6.0
    """Wall clock of the training itself, where steps is not given."""
    steps: int | None = None
    """Optimiser steps in place of a time: reproducible, where minutes are not."""
    batch: int = 128
    """Motions of a step."""
    clips: int = 16384
    """Motions that are generated once and drawn from."""
    tokenizer_share: float = 0.35
    """Share of the budget that trains the tokenizer."""
    evaluator_share: float = 0.1
    """Share of the budget that trains the evaluator."""
    tokenizer_lr: float = 1e-3
    """Peak learning rate of tokenizer and evaluator."""
    lr: float = 1e-3
    """Peak learning rate of the transformer."""
    drop: float = 0.1
    """Share of motions whose text is left out, and of those whose music is, for guidance."""
    ema: float = 0.998
    """Decay of the weights' moving average, which is what is kept."""
    log_every: int = 50
    """Steps between two logged ones."""
    checkpoint_seconds: float = 120.0
    """Least time between two checkpoints, from which a stopped run goes on."""
    eval_clips: int = 512
    """Motions that the grades are over."""

    def __post_init__(self) -> None:
        check_budget(self, "tokenizer_lr", "lr")
        if min(self.tokenizer_share, self.evaluator_share) <= 0 or self.tokenizer_share + self.evaluator_share >= 1:
            raise ValueError(
                "tokenizer_share and evaluator_share must be positive and leave the transformer some; got "
                f"{self.tokenizer_share} and {self.evaluator_share}"
            )
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop is a share in [0, 1]; got {self.drop}")
        if self.batch < 2 or self.clips < self.batch or self.eval_clips < 2:
            raise ValueError(
                "batch and eval_clips must be at least 2, clips at least batch; got "
                f"{self.batch}, {self.eval_clips} and {self.clips}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Text to motion, text and music to dance, and an edit, as videos with sound."""

    host: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one)."""
    texts: tuple[str, ...] = field(
        default=("a person waves the left hand then kicks with the right leg", "someone jumps and then turns left"),
        metadata=flag("text"),
    )
    """What the person does, in the tiny host's words."""
    tempo: float = 110.0
    """Beats a minute of the generated music."""
    unmask: UnmaskConfig = field(default_factory=UnmaskConfig)
    """Generation."""
    limit: int = 64
    """Motions that the numbers are over."""
    seed: int = 0
    """Of the draws and the scenes."""

    def __post_init__(self) -> None:
        if self.limit < 2 or not self.texts:
            raise ValueError(f"expected a text and a limit of 2 at least; got {len(self.texts)} and {self.limit}")
        if len(set(self.texts)) != len(self.texts):
            raise ValueError("texts must be different: each is a motion's name in the pictures")
        if not 60 <= self.tempo <= 180:
            raise ValueError(f"tempo is in beats a minute, from 60 to 180; got {self.tempo}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmConfig:
    """Training of one arm of ``reproduce``."""

    settings: MotionAnythingConfig
    """What it hides."""
    seed: int
    """Of weights, data order and draws."""
    steps: int | None
    """Optimiser steps."""
    batch: int
    """Motions of a step."""
    lr: float
    """Peak learning rate."""
    minutes: float = 0.0
    """Not used: steps are given."""
    log_every: int = 100
    """Steps between two logged ones."""
    checkpoint_seconds: float = 60.0
    """Least time between two checkpoints, from which a stopped run goes on."""

    def __post_init__(self) -> None:
        check_budget(self, "batch", "lr")


ARMS = ("attention", "random", "events", "cosine")
"""Trainings that ``reproduce`` compares."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceConfig:
    """The paper's claim on the tiny host: transformers trained with attention masks against the controls."""

    host: Path | None = None
    """A host.safetensors made by train-host, whose tokenizer and evaluator all arms share (default: the packaged
    one)."""
    arms: tuple[str, ...] = ARMS
    """Trainings to compare."""
    settings: MotionAnythingConfig = field(default_factory=lambda: PRESETS["tiny"].config)
    """The method, whose masking each arm replaces."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of weights, data order and draws."""
    steps: int = 4000
    """Optimiser steps of each arm."""
    batch: int = 128
    """Motions of a step."""
    clips: int = 16384
    """Motions that are generated once and drawn from."""
    lr: float = 1e-3
    """Peak learning rate."""
    limit: int = 1024
    """Held-out scenes that each arm is graded on."""
    workers: int = field(default=1, metadata=flag(stored=False))
    """Processes, a training each, with ``--device cuda`` over all visible GPUs; results are the same. Five to a GPU is
    a good number, under NVIDIA's MPS (``nvidia-cuda-mps-control -d``): without it they take turns."""

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or len(self.arms) < 2:
            raise ValueError(f"arms must be two or more of {', '.join(ARMS)}; got {', '.join(self.arms)}")
        if self.settings.masking != "attention":
            raise ValueError("--arms say what each training hides: leave --masking out")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be different and at least one; got {self.seeds}")
        if min(self.steps, self.workers, self.limit - 1) < 1 or not 2 <= self.batch <= self.clips:
            raise ValueError("steps and workers must be at least 1, limit and batch at least 2, clips at least batch")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """Motions of four seconds for texts, to music, or edits, with a tiny host."""

    host: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one)."""
    texts: tuple[str, ...] = field(default=(), metadata=flag("text"))
    """What the person does, one motion each; may be left out with music."""
    music: Path | None = None
    """WAV to dance to."""
    music_start: float = 0.0
    """Second of the music at which the motion begins."""
    edit: Path | None = None
    """Motion of which a part is made anew: .npy, .npz, .bvh or .pkl."""
    edit_parts: tuple[str, ...] = ()
    """Parts of the body to make anew: root, left leg, right leg, torso, left arm, right arm (default: all)."""
    edit_seconds: tuple[float, float] | None = None
    """Interval to make anew, in seconds: in-betweening (default: everything)."""
    fps: float | None = None
    """Frames a second of the motion, where its file does not say."""
    up: Literal["y", "z"] = "y"
    """Axis that is up in the motion's file."""
    formats: tuple[str, ...] = field(default=("bvh", "mp4"), metadata=flag("to"))
    """Formats to write: bvh, gltf, npz, npy, mp4, and html, a page that shows all motions with the music."""
    bones: Bones = "fixed"
    """In bvh and gltf: fixed, bones of one length as game engines want them, whose ends may miss the joints, or
    stretched, each joint where it is in each frame."""
    unmask: UnmaskConfig = field(default_factory=UnmaskConfig)
    """Generation."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        if not self.texts and self.music is None:
            raise ValueError("say what to make: a --text, --music, or both")
        unknown = [part for part in self.edit_parts if part not in BODY_PARTS]
        if unknown:
            raise ValueError(f"no part {', '.join(unknown)}; they are {', '.join(BODY_PARTS)}")
        if self.edit is None and (self.edit_parts or self.edit_seconds or self.fps is not None or self.up != "y"):
            raise ValueError("edit_parts, edit_seconds, fps and up are of an edit: name the motion with --edit")
        if self.edit_seconds is not None and not 0 <= self.edit_seconds[0] < self.edit_seconds[1] <= 4:
            raise ValueError(f"edit_seconds must be an interval within 0 and 4; got {self.edit_seconds}")
        wrong = [kind for kind in self.formats if kind not in ("bvh", "gltf", "npz", "npy", "mp4", "html")]
        if wrong or not self.formats:
            raise ValueError(f"formats are of bvh, gltf, npz, npy, mp4, html; got {', '.join(wrong) or 'none'}")
        _check_bones(self.bones, self.formats)
        if not 0 <= self.music_start < inf:
            raise ValueError(f"music_start must be finite and not negative; got {self.music_start}")


BODY_PARTS = ("root", "left leg", "right leg", "torso", "left arm", "right arm")
"""As in ``skeletons.PARTS``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """A motion into another format, or a published checkpoint into safetensors."""

    source: Path
    """Motion (.npy of joints or features, .npz of SMPL's poses, .bvh, .pkl of AIST++), or a checkpoint."""
    to: str = "bvh"
    """Format of the motion: bvh, gltf, npz, npy, mp4, or html, a page that shows it."""
    features: bool = False
    """Write features in place of joints, as .npy."""
    bones: Bones = "fixed"
    """In bvh and gltf: fixed, bones of one length as game engines want them, whose ends may miss the joints, or
    stretched, each joint where it is in each frame."""
    skeleton: Literal["humanml3d", "kit"] = "humanml3d"
    """Whose joints the motion has."""
    fps: float | None = None
    """Frames a second, where the file does not say; where it does, they must agree."""
    up: Literal["y", "z"] = "y"
    """Axis that is up in the file."""
    model: str | None = None
    """Which published model the checkpoint is, such as momask-mask."""

    def __post_init__(self) -> None:
        _check_bones(self.bones, (self.to,))


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """The protocol of text to motion and of dance, on generated scenes."""

    host: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one)."""
    unmask: UnmaskConfig = field(default_factory=UnmaskConfig)
    """Generation."""
    repetitions: int = 20
    """Repetitions that intervals are over."""
    limit: int = 1024
    """Texts of a repetition; below 32 R-precision's pool shrinks, below 301 the pairs of the diversity."""
    dances: int = 40
    """Dances of a repetition; AIST++'s protocol has 40."""
    real_dances: int = 1024
    """Other dances, the real ones that distances are to; AIST++'s protocol has all of the set."""
    many_texts: int = 100
    """Texts of the multimodality."""
    many: int = 30
    """Motions of each."""
    seed: int = 0
    """Of scenes and draws."""

    def __post_init__(self) -> None:
        if min(self.repetitions, self.many_texts) < 1 or min(self.limit, self.dances, self.real_dances, self.many) < 3:
            raise ValueError(
                "repetitions and many_texts must be at least 1; limit, dances, real_dances and many at least 3"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Time of the unmasking loop at published shapes, random weights."""

    model: Literal["tiny", "momask", "mogents"] = "tiny"
    """Shapes of."""
    batches: tuple[int, ...] = (1, 32)
    """Motions at a time."""
    tokens: int = 49
    """Time steps: 49 are the 196 frames that HumanML3D has at most."""
    steps: int = 10
    """Passes; MoMask's."""
    guidance: float = 4.0
    """Strength of the text; MoMask's."""
    graphs: bool = False
    """Also the pass as one CUDA graph."""
    dtype: Dtype = "auto"
    """Of the weights; auto is bfloat16 on a GPU, float32 on a CPU."""
    rounds: int = 10
    """Timed generations of each way."""
    seed: int = 0
    """Of weights and draws."""

    def __post_init__(self) -> None:
        _one_of("model", self.model, ("tiny", "momask", "mogents"))
        if not self.batches or min(*self.batches, self.tokens, self.steps, self.rounds) < 1:
            raise ValueError("batches, tokens, steps and rounds must be at least 1")
        if not isfinite(self.guidance):
            raise ValueError(f"guidance must be finite; got {self.guidance}")
        if self.guidance == 1:
            raise ValueError("a guidance of 1 is none, and the ways would not differ; give another")


@dataclass(frozen=True, kw_only=True, slots=True)
class MakeSetConfig:
    """Generated motions with captions and music, as a folder of text, music and dance that ``train`` reads."""

    train: int = 512
    """Motions of the training split."""
    val: int = 64
    """Motions of the validation split."""
    test: int = 64
    """Motions of the test split."""
    kinds: tuple[str, ...] = ("text", "both")
    """That take turns: ``text`` stands without music, ``both`` dances with a caption, ``music`` without one."""
    seed: int = 0
    """Of the scenes."""

    def __post_init__(self) -> None:
        wrong = [kind for kind in self.kinds if kind not in ("text", "both", "music")]
        if wrong or not self.kinds:
            raise ValueError(f"kinds are of text, both, music; got {', '.join(wrong) or 'none'}")
        if min(self.train, self.val, self.test) < 1:
            raise ValueError(f"every split needs a motion; got {self.train}, {self.val} and {self.test}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The tokenizer by parts, then the masked transformer with the method, on HumanML3D or text, music and dance."""

    data: Path
    """Folder of HumanML3D, with new_joint_vecs, texts and train.txt; or of text, music and dance, with motions, texts,
    music and train.txt, as make-set writes one."""
    stage: Literal["tokenizer", "transformer"] = "tokenizer"
    """What is trained; the transformer needs a tokenizer that was."""
    tokenizer: Path | None = None
    """``transformer``: a tokenizer.safetensors of the first stage."""
    text_encoder: Path | None = None
    """``transformer``: folder of CLIP's text model and tokenizer, openai/clip-vit-base-patch32."""
    tokenizer_sizes: TokenizerConfig = field(
        default_factory=lambda: TokenizerConfig(width=192, depth=3, codes=512, code_dim=128), metadata=flag(hidden=True)
    )
    """Sizes of the tokenizer; ours."""
    transformer: TransformerConfig = field(default_factory=TransformerConfig, metadata=flag(hidden=True))
    """Sizes of the transformer."""
    settings: MotionAnythingConfig = field(default_factory=lambda: PRESETS["default"].config)
    """The method."""
    seed: int = 0
    """Of weights, order and draws."""
    minutes: float = 240.0
    """Wall clock of the training itself, where steps is not given. Ours."""
    steps: int | None = None
    """Optimiser steps in place of a time: reproducible, where minutes are not."""
    batch: int = 64
    """Motions of a step, over all processes; the paper has 512 for the tokenizer and 64 for the transformer."""
    lr: float = 2e-4
    """Peak learning rate; the paper's. A tenth of it in the last fifth, which is ours."""
    warmup_steps: int = 2000
    """Steps over which the learning rate rises; the paper's."""
    weight_decay: float = 0.01
    """Of AdamW; ours."""
    drop: float = 0.1
    """Share of texts that are left out, and of music, for guidance; MoMask's."""
    log_every: int = 50
    """Steps between two logged ones."""
    checkpoint_seconds: float = 300.0
    """Least time between two checkpoints, from which a stopped run goes on."""

    def __post_init__(self) -> None:
        check_budget(self, "batch", "lr", "warmup_steps")
        check_least(self, 0, "weight_decay")
        if self.stage == "transformer" and (self.tokenizer is None or self.text_encoder is None):
            raise ValueError("the transformer needs --tokenizer, made by --stage tokenizer, and --text-encoder")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop is a share in [0, 1]; got {self.drop}")
