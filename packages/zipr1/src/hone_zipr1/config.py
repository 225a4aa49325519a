"""Which tokens a layer keeps, and the settings of each verb. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from hone_core.config import Dtype, Preset, check_least, flag
from hone_core.training import check_budget

__all__ = [
    "GRID",
    "KINDS",
    "PRESETS",
    "TESTED",
    "AskConfig",
    "BenchConfig",
    "DemoConfig",
    "EvalConfig",
    "GenerateConfig",
    "HostConfig",
    "Kind",
    "Objective",
    "ProfileConfig",
    "ReinforceConfig",
    "ReproduceConfig",
    "SparseConfig",
    "TrainConfig",
    "TrainHostConfig",
]

Policy = Literal["top-p", "top-k", "random", "fastv", "visionzip"]
BY_RATIO = ("top-k", "fastv", "visionzip")
"""Policies whose budget is a share of the prompt."""
Kind = Literal["digit", "sum"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Questions of a mosaic: the digit of a cell, one character, or the sum of two cells, two characters."""
Objective = Literal["paper", "budget-policy", "soft-ratio", "supervised"]
GRID = (0.94, 0.945, 0.95, 0.955, 0.96, 0.965, 0.97, 0.975)
"""Thresholds of the paper's rollouts, one per rollout of a group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseConfig:
    """What each layer keeps of a prompt, and what becomes of the rest."""

    p: float = 0.975
    """Share of the attention mass that sets the budget of tokens, in (0, 1]; 1 is the dense model, bit for bit."""
    rows: Literal["probe", "all"] = "probe"
    """Rows of the attention map that are looked at: some, or all, which costs a second attention. Ratios of the two do
    not compare."""
    recent: float = 64
    """Probe rows at the end of the prompt; below 1 a share of it."""
    random: float = 64
    """Probe rows drawn among the others; below 1 a share."""
    normalizer: Literal["count", "zipcache"] = "count"
    """What column sums are divided by to rank tokens: the rows looked at that see a column, or all rows that do."""
    protect: Literal["text", "none"] = "text"
    """Tokens that stay in any case and count in the budget: all text, or only the last token of the prompt."""
    policy: Policy = "top-p"
    """``top-p``: the paper. ``top-k``: its ranking at a fixed ratio. ``random``: top-p's budget in each layer, spent on
    random tokens. ``fastv``: from one layer on, the tokens that the last row attends to most there. ``visionzip``: all
    text, the tokens that the vision tower attends to most, and a few that the others are merged into."""
    ratio: float | None = None
    """``top-k``, ``fastv`` and ``visionzip``: share of the prompt that is kept."""
    fastv_layer: int = 2
    """``fastv``: first layer, counted from 0, without the dropped tokens."""
    dense_layers: tuple[int, ...] = ()
    """Layers that keep everything, counted from 0."""
    cache: Literal["evict", "retrieve"] = "evict"
    """``evict``: dropped tokens leave the layer's cache for good. ``retrieve``: they stay and are not read, until a new
    turn selects anew."""
    compute: Literal["gather", "varlen", "mask"] = "gather"
    """``gather``: attention of the kept tokens alone, samples filled up to the one that keeps most; of prompts so short
    that waiting to hear how many these are would cost more, as ``varlen`` where that can be. ``varlen``: samples one
    after the other, by torch's attention of unequal lengths; 16 bits on a GPU, without gradients. ``mask``: the same
    under a mask, no faster, for training on short prompts."""
    captured: bool = False
    """Decode by a step that a GPU replays as a CUDA graph, on a cache that stays where it is; a CPU runs the same step
    without one. Not with beams, prompt lookup or an assistant."""
    soft: Literal["entropy", "participation"] = "entropy"
    """Differentiable size of the support, where a training objective asks for it."""
    seed: int = 0
    """Of the probe rows and of random tokens."""

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p is a share of attention mass in (0, 1]; got {self.p}")
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}")
        if self.recent <= 0 or self.random < 0:
            raise ValueError(
                f"recent must be positive, so that every token is seen by a probe row, and random not negative; got "
                f"{self.recent} and {self.random}"
            )
        for name in ("recent", "random"):
            if (amount := getattr(self, name)) > 1 and amount != int(amount):
                raise ValueError(f"{name} is a number of rows, or below 1 a share of the prompt; got {amount:g}")
        if (self.policy in BY_RATIO) != (self.ratio is not None):
            raise ValueError(
                f"ratio belongs to policy {', '.join(BY_RATIO)}, which need it; got {self.policy} and {self.ratio}"
            )
        if self.policy == "visionzip" and (self.dense_layers or self.cache == "retrieve" or self.protect == "none"):
            raise ValueError(
                "visionzip drops visual tokens before the first layer, for good: it has no dense_layers, no "
                "cache='retrieve' and no protect='none'"
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is a share of the prompt in (0, 1]; got {self.ratio}")
        if self.fastv_layer < 1:
            raise ValueError(
                f"fastv_layer must be at least 1: the layer before it is looked at; got {self.fastv_layer}"
            )
        if any(layer < 0 for layer in self.dense_layers):
            raise ValueError(f"layers are counted from 0; got {self.dense_layers}")

    @property
    def label(self) -> str:
        """Short name, such as ``top-p 0.975``."""
        amount = f"{self.p:g}" if self.ratio is None else f"ratio {self.ratio:g}"
        return f"{self.policy} {amount}"


TESTED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision")
"""``model_type`` of the classes on which every part was tried; others are taken where their layout is known."""

PRESETS: dict[str, Preset[SparseConfig]] = {
    "paper": Preset(
        config=SparseConfig(),
        model="Qwen2-VL-7B, Qwen2.5-VL-7B, LLaVA-Video-7B",
        provenance="Paper: p of inference, the top of the training grid. Which probe rows was not found: ZipVL's.",
    ),
    "grid-low": Preset(
        config=SparseConfig(p=0.94),
        model="Qwen2-VL-7B, Qwen2.5-VL-7B, LLaVA-Video-7B",
        provenance="Paper: the bottom of the training grid.",
    ),
    "zipcache": Preset(
        config=SparseConfig(recent=0.05, random=0.05, normalizer="zipcache"),
        model="Any supported class",
        provenance="The paper's p with the probe rows and the normalizer of ZipCache's release, of the same authors.",
    ),
    "tiny": Preset(
        config=SparseConfig(rows="all"),
        model="The tiny host of the demo (6 layers, 69 tokens)",
        provenance="Ours: the paper's p over all rows, as short prompts have too few for probes.",
    ),
}


# The tiny host.


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """Architecture of the tiny host, a Qwen2.5-VL that sees a mosaic of digits."""

    cells: int = 4
    """Digits along a side of the mosaic; each is 8 x 8 pixels and four visual tokens."""
    layers: int = 6
    """Decoder layers."""
    width: int = 128
    """Channels of the decoder."""
    heads: int = 4
    """Query heads."""
    heads_k: int = 2
    """Key-value heads."""
    intermediate: int = 384
    """Channels within a feed-forward layer of the decoder."""
    vision_width: int = 64
    """Channels of the vision tower, which is a patch embedding and the merger."""

    def __post_init__(self) -> None:
        if not 2 <= self.cells <= 8:
            raise ValueError(f"cells must lie in 2 .. 8; got {self.cells}")
        if self.width % self.heads or self.heads % self.heads_k or (self.width // self.heads) % 8:
            raise ValueError(
                "width must be a multiple of heads by 8, and heads of heads_k; "
                f"got {self.width}, {self.heads}, {self.heads_k}"
            )

    @property
    def size(self) -> int:
        """Pixels along a side."""
        return 8 * self.cells

    @property
    def visual_tokens(self) -> int:
        """Tokens of a mosaic."""
        return 4 * self.cells**2


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainHostConfig:
    """Dense training of the tiny host on generated mosaics."""

    seed: int = 0
    """Of weights and data."""
    host: HostConfig = field(default_factory=HostConfig)
    """Architecture."""
    minutes: float = 4.0
    """Wall clock of the training itself, where steps is not given."""
    steps: int | None = None
    """Optimiser steps in place of a time: reproducible, where minutes are not."""
    batch: int = 256
    """Questions of a step."""
    lr: float = 4e-3
    """Peak learning rate of the decoder's matrices, under Muon."""
    adamw_lr: float = 1e-3
    """Peak learning rate of everything else, under AdamW."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises."""
    decay: float = 0.5
    """Share of the budget over which the learning rate falls to zero."""
    held_out: int = 4000
    """Questions of the final grade, on digits that were not trained on."""
    log_every: int = 50
    """Steps between two logged ones."""
    checkpoint_seconds: float = 60.0
    """Least time between two checkpoints, from which a stopped run goes on."""

    def __post_init__(self) -> None:
        check_budget(self, "lr", "adamw_lr", "warmup_steps")
        if min(self.batch, self.held_out) < 2:
            raise ValueError(f"batch and held_out must be at least 2; got {self.batch} and {self.held_out}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is a share of the budget in (0, 1]; got {self.decay}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReinforceConfig:
    """What is trained for, and how; where the paper's value was not found, ours."""

    objective: Objective = "paper"
    """``paper``: GRPO with r_per + C r_eff. ``budget-policy``: the threshold is drawn from a learned distribution and
    is the answer's first token. ``soft-ratio``: GRPO on correctness, plus the differentiable size of the attention's
    support. ``supervised``: cross-entropy of the right answers under the same sparse forward."""
    ps: tuple[float, ...] = GRID
    """Thresholds: the rollouts of a group take them in turn; of budget-policy the choices."""
    group: int = 8
    """Rollouts of a prompt, a multiple of the number of thresholds unless they are drawn."""
    prompts: int = 8
    """Prompts per step and process."""
    micro_batch: int = 0
    """Rows of one forward of the update, whose gradients are summed; 0: all at once."""
    updates: int = 1
    """Optimiser steps on each batch of rollouts."""
    performance: float = 1.0
    """Weight of a right answer in the reward."""
    efficiency: float = 1.0
    """Weight of 1 - tau in the reward; of soft-ratio it is not used."""
    gated: bool = True
    """Whether efficiency counts only in groups with a right answer (C)."""
    beta: float = 0.04
    """Weight of the KL to the dense reference."""
    epsilon: float = 0.2
    """Clip range of the importance ratios."""
    temperature: float = 1.0
    """Of the rollouts."""
    floor: float = 0.05
    """Least standard deviation of a group's rewards."""
    lr: float = 1e-6
    """Learning rate, AdamW, constant."""
    budget_lr: float = 1e-3
    """Learning rate of the budget's distribution."""
    soft_weight: float = 0.0
    """soft-ratio and supervised: weight of the support's size."""
    soft_log: bool = False
    """Take the logarithm of the size: with soft "entropy" the entropy of the column mass itself."""

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ValueError(f"objective must be one of {', '.join(get_args(Objective))}; got {self.objective!r}")
        check_ps(self.ps)
        if self.objective != "supervised" and self.group < 2:
            raise ValueError(f"a group needs at least 2 rollouts to compare; got {self.group}")
        if self.objective != "budget-policy" and self.group % len(self.ps):
            raise ValueError(
                f"the rollouts of a group take the {len(self.ps)} thresholds in turn: group must be a multiple of "
                f"them; got {self.group}"
            )
        if (
            min(self.prompts, self.updates) < 1
            or self.micro_batch < 0
            or min(self.lr, self.budget_lr, self.temperature, self.floor) <= 0
        ):
            raise ValueError(
                "prompts, updates, lr, budget_lr, temperature and floor must be positive, and micro_batch not "
                f"negative; got {self.prompts}, {self.updates}, {self.lr}, {self.budget_lr}, {self.temperature}, "
                f"{self.floor} and {self.micro_batch}"
            )
        if not 0 < self.epsilon < 1 or self.beta < 0:
            raise ValueError(f"epsilon lies in (0, 1) and beta is not negative; got {self.epsilon} and {self.beta}")
        if (
            self.soft_weight < 0
            or (self.objective == "soft-ratio" and not self.soft_weight)
            or (self.soft_weight and self.objective in ("paper", "budget-policy"))
        ):
            raise ValueError(
                f"soft_weight is positive with soft-ratio, may be with supervised and is 0 else; got {self.soft_weight}"
                f" with {self.objective}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Reinforcement of a model on questions whose answers can be checked."""

    model: str | None = None
    """Folder or hub address of a model (default: the tiny host, asked about generated mosaics)."""
    data: Path | None = None
    """Questions for a model, a JSON object per line: image or video, question, answer, type."""
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    """Objective."""
    sparse: SparseConfig = field(default_factory=SparseConfig)
    """Selection, at the thresholds of the objective."""
    lora_rank: int = 0
    """Rank of adapters on the decoder's attention and MLP, whose model without them is the reference; 0 trains every
    weight of the decoder, beside a frozen copy."""
    shard: bool = False
    """Share the decoder's layers, and of a whole training those of the frozen copy, out over the processes (FSDP2)
    instead of holding them whole in each: for a model whose optimiser does not fit a card."""
    frames: int = 32
    """Frames of a video."""
    max_new_tokens: int = 64
    """Length of an answer."""
    dtype: Dtype = "auto"
    """Of the weights; auto is bfloat16 for adapters on a GPU and float32 otherwise, since small steps vanish in it."""
    seed: int = 0
    """Of questions and draws."""
    minutes: float = 60.0
    """Wall clock of the training itself, where steps is not given."""
    steps: int | None = None
    """Batches of rollouts in place of a time."""
    log_every: int = 1
    """Steps between two logged ones."""
    checkpoint_seconds: float = 600.0
    """Least time between two checkpoints, from which a stopped run goes on."""

    def __post_init__(self) -> None:
        check_budget(self, "frames", "max_new_tokens")
        if (self.model is None) != (self.data is None):
            raise ValueError("a model needs --data with questions; the tiny host (no --model) makes its own")
        if self.model is None and (self.lora_rank or self.shard or self.dtype != "auto"):
            raise ValueError("lora_rank, shard and dtype are of a model; the tiny host is trained whole, in float32")
        if self.shard and self.sparse.captured:
            raise ValueError(
                "a captured step does not fetch the weights of other processes; leave shard or captured out"
            )
        check_least(self, 0, "lora_rank")
        if self.sparse.policy in BY_RATIO or self.sparse.p != SparseConfig().p:
            raise ValueError(f"thresholds are those of --ps, one per rollout; got {self.sparse.label}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmConfig:
    """One training of ``reproduce``; has what a training needs."""

    reinforce: ReinforceConfig
    """What is trained for."""
    sparse: SparseConfig
    """Selection in its forward pass."""
    host: str
    """Digest of the weights that it starts from."""
    seed: int
    """Of prompts and draws."""
    steps: int
    """Batches of rollouts."""
    minutes: float = 0.0
    """Not used: arms are compared at equal steps."""
    log_every: int = 20
    """Steps between two logged ones."""
    checkpoint_seconds: float = 20.0
    """Least time between two checkpoints, from which a stopped run goes on."""

    def __post_init__(self) -> None:
        check_budget(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceConfig:
    """The paper's claim and the two other objectives on tiny hosts."""

    hosts: tuple[Path, ...] = ()
    """Files made by train-host, of several seeds (default: the packaged one)."""
    arms: tuple[str, ...] = ()
    """Arms to train, by name (default: all). The verdict needs paper, correctness and sft."""
    steps: int = 1200
    """Steps of every arm."""
    prompts: int = 48
    """Prompts per step, each with eight rollouts."""
    lr: float = 1e-4
    """Learning rate of every arm."""
    soft_weight: float = 1.0
    """Of the arm soft-ratio."""
    items: int = field(default=4000, metadata=flag("limit"))
    """Held-out questions of each evaluation."""
    batch: int = 500
    """Questions at a time there."""
    workers: int = field(default=1, metadata=flag(stored=False))
    """Arms that are trained at the same time, each in a process, with ``--device cuda`` over all visible GPUs."""
    seed: int = 0
    """Of prompts, draws and the held-out questions."""

    def __post_init__(self) -> None:
        if min(self.steps, self.prompts, self.batch, self.workers) < 1 or self.items < 2:
            raise ValueError(
                "steps, prompts, batch and workers must be positive, and items at least 2; got "
                f"{self.steps}, {self.prompts}, {self.batch}, {self.workers} and {self.items}"
            )
        if self.lr <= 0 or self.soft_weight <= 0:
            raise ValueError(f"lr and soft_weight must be positive; got {self.lr} and {self.soft_weight}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """What the demo asks the tiny host."""

    items: int = field(default=200, metadata=flag("limit"))
    """Questions of each row of the table."""
    ps: tuple[float, ...] = (0.6, 0.8, 0.9, 0.94, 0.975)
    """Thresholds."""
    shown: int = 4
    """Answers printed, at every threshold."""
    batch: int = 100
    """Questions at a time."""
    host: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one)."""
    seed: int = 0
    """Of the questions."""

    def __post_init__(self) -> None:
        if self.items < 2 or not 1 <= self.shown <= self.items or self.batch < 1:
            raise ValueError(
                f"expected at least 2 items, 1 .. items shown and a positive batch; got {self.items}, {self.shown}, "
                f"{self.batch}"
            )
        check_ps(self.ps)


@dataclass(frozen=True, kw_only=True, slots=True)
class AskConfig:
    """A question about a picture or a video, and the selection for it."""

    ask: str
    """Question. Of the tiny host: "digit B3" or "sum A1 C2" (rows are letters, columns numbers)."""
    model: str | None = None
    """Folder or hub address of a model, or a folder of adapters that train wrote (default: the tiny host, asked about a
    generated mosaic)."""
    image: Path | None = None
    """Picture."""
    video: Path | None = None
    """File, folder of pictures or .npy array, in place of a picture."""
    frames: int = 32
    """Frames to sample of a video, all that there are if fewer."""
    p: float | None = None
    """Share of the attention mass, in (0, 1]; in place of the preset's."""
    preset: str = "paper"
    """Selection by name; of the tiny host the preset is tiny unless another is named."""
    dtype: Dtype = "auto"
    """Of the weights; auto is bfloat16 on a GPU, float32 on a CPU."""
    seed: int = 0
    """Of the tiny host's mosaic."""

    def __post_init__(self) -> None:
        if not self.ask.strip():
            raise ValueError("the question is empty")
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {self.preset!r}")
        if self.p is not None and not 0 < self.p <= 1:
            raise ValueError(f"p is a share of attention mass in (0, 1]; got {self.p}")
        if (self.model is None) != (self.image is None and self.video is None):
            raise ValueError("a model needs an image or a video to look at; the tiny host (no --model) makes its own")
        if self.image is not None and self.video is not None:
            raise ValueError("give an image or a video, not both")
        if self.frames < 1:
            raise ValueError(f"frames must be positive; got {self.frames}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig(AskConfig):
    """A question about a picture or a video, and how it is answered."""

    cache: Literal["evict", "retrieve"] = "evict"
    """Whether dropped tokens leave the cache or are only not read."""
    captured: bool = False
    """Decode by a step that a GPU replays as a CUDA graph, also where dense: the same answers, faster on a GPU."""
    compare_dense: bool = False
    """Answer with the dense model too: texts, tokens in the cache and times side by side."""
    max_new_tokens: int = 64
    """Length of the answer."""
    rounds: int = 3
    """Timed answers of each, in turns after one that warms up; times are medians."""

    def __post_init__(self) -> None:
        AskConfig.__post_init__(self)
        if min(self.max_new_tokens, self.rounds) < 1:
            raise ValueError(f"max_new_tokens and rounds must be positive; got {self.max_new_tokens} and {self.rounds}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig(AskConfig):
    """A question about a picture or a video, and what each layer keeps for it."""

    shown: int = 6
    """Frames in the picture, spread over the video; and layers, spread over the decoder."""

    def __post_init__(self) -> None:
        AskConfig.__post_init__(self)
        if self.shown < 1:
            raise ValueError(f"shown must be positive; got {self.shown}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """A model's accuracy on checkable questions, dense and at falling thresholds, each question alone."""

    model: str
    """Folder or hub address, or a folder of adapters that train wrote."""
    data: Path
    """Questions, a JSON object per line: image or video, question, answer, type."""
    ps: tuple[float, ...] = (0.8, 0.94, 0.975)
    """Thresholds, beside the dense model."""
    budget: Path | None = None
    """Also answer each question at the threshold that a learned budget gives it: the budget.safetensors of a training
    with budget-policy."""
    preset: str = "paper"
    """Selection by name, but for its threshold."""
    peers: bool = False
    """Also spend each threshold's budget as others do: on the best-ranked tokens in equal shares, on random ones, as
    FastV, which keeps everything in its first two layers, and where that is too much next to nothing later, and, on
    Qwen models, as VisionZip, which keeps all text."""
    limit: int | None = None
    """First questions only."""
    frames: int = 32
    """Frames of a video."""
    max_new_tokens: int = 64
    """Length of an answer."""
    dtype: Dtype = "auto"
    """Of the weights; auto is bfloat16 on a GPU, float32 on a CPU."""

    def __post_init__(self) -> None:
        check_ps(self.ps)
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {self.preset!r}")
        if min(self.frames, self.max_new_tokens, 1 if self.limit is None else self.limit) < 1:
            raise ValueError(
                "frames, max_new_tokens and limit must be positive; got "
                f"{self.frames}, {self.max_new_tokens} and {self.limit}"
            )

    @property
    def selections(self) -> list[SparseConfig]:
        """The selection at each threshold."""
        return [replace(PRESETS[self.preset].config, p=p) for p in self.ps]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Times of prefill and decoding with random weights, at ratios that are set: no content decides them."""

    model: Literal["tiny", "qwen2.5-vl-3b", "qwen2.5-vl-7b"] = "tiny"
    """``tiny``: the tiny host. Others: the decoder of Qwen2.5-VL with random weights; prompts come as text tokens."""
    tokens: tuple[int, ...] = (64,)
    """Lengths of the prompt."""
    batches: tuple[int, ...] = (1,)
    """Prompts at once."""
    ratios: tuple[float, ...] = (0.25,)
    """Shares of the prompt that every layer keeps, beside the dense model."""
    recent: float = 64
    """Probe rows at the end of the prompt."""
    random: float = 64
    """Probe rows drawn among the others."""
    decode_only: bool = False
    """Fill the caches with random keys and values in place of a prefill, for caches beside which the activations of one
    would not fit: decoding alone is timed. A sample keeps between a half and one and a half of the set share."""
    captured: bool = False
    """Also time a decoding step that a GPU replays as a CUDA graph, dense and with selected tokens."""
    unequal: bool = False
    """Also time one layer whose samples keep between a half and one and a half of the set share, filled up and one
    after the other."""
    rounds: int = 10
    """Turns that each variant gets after two that warm up."""
    dtype: Dtype = "auto"
    """Of the weights; auto is bfloat16 on a GPU, float32 on a CPU."""
    seed: int = 0
    """Of weights and prompts."""

    def __post_init__(self) -> None:
        if min(*self.tokens, *self.batches, self.rounds, 1 << 30) < 1 or not self.tokens or not self.batches:
            raise ValueError(
                "tokens, batches and rounds must be positive, at least one of each; got "
                f"{self.tokens}, {self.batches} and {self.rounds}"
            )
        check_ps(self.ratios, "ratios")
        SparseConfig(policy="top-k", ratio=self.ratios[0], recent=self.recent, random=self.random)
        if (self.decode_only or self.unequal) and max(self.ratios) > 2 / 3:
            raise ValueError(
                f"some samples keep one and a half of the ratio with decode_only or unequal, so that it is at most "
                f"2/3; got {max(self.ratios)}"
            )
        if self.unequal and (self.decode_only or self.model == "tiny"):
            raise ValueError("unequal times the prefill of a model other than tiny; leave decode_only out")
        if self.model == "tiny" and max(self.tokens) > 1000:
            raise ValueError(f"the tiny host has 1024 positions; got {max(self.tokens)} tokens")


def check_ps(ps: tuple[float, ...], what: str = "thresholds") -> None:
    """Refuse thresholds that are none.

    Args:
        ps: Shares.
        what: Their name in the message.

    Raises:
        ValueError: There are none, two are the same, or one lies outside (0, 1].
    """
    if not ps or len(set(ps)) < len(ps) or not all(0 < p <= 1 for p in ps):
        raise ValueError(f"{what} are distinct shares in (0, 1], at least one; got {ps}")
