"""Train the tiny host: clips drawn on the device, six questions on each, and an early stop when every kind is learned.

One command makes the checkpoint that ships in ``assets/``: ``hone-knockout train-host --device cuda``. A second loss
asks visual tokens in the middle of the decoder what they show and where it moves; it gets the circuits started, which
the answers alone are slow to do, and has faded to nothing before the learning rate falls.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from hone_core.environment import environment
from hone_core.errors import CheckpointError
from hone_core.io import atomic_path, atomic_write_json
from hone_lm.choices import choice_inputs, choice_prompt
from torch import Tensor, nn

from .config import QUESTIONS, ClipConfig
from .data import COLORS, CORNERS, DIRECTIONS, SHAPES, Scenes, draw_scenes, generated_items, render
from .host import WORDS, Host, HostConfig, build_host, load_host, pixel_values, save_host

__all__ = ["GATES", "TrainConfig", "TrainReport", "Turns", "train_host"]

log = logging.getLogger(__name__)

GATES = {"shape": 0.95, "place": 0.95, "order": 0.95, "direction": 0.90}
"""Accuracy per kind of question that a host must reach before a knockout of it says anything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run of the tiny host."""

    host: HostConfig = field(default_factory=HostConfig)
    seed: int = 0
    minutes: float = 4.5
    """Wall-clock budget of the training itself, compilation included."""
    steps: int | None = None
    """Number of optimiser steps instead of a time budget: reproducible, where ``minutes`` is not."""
    batch: int = 256
    """Clips per step; each is asked six questions."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Of the matrices of the layers; everything else is AdamW's."""
    lr: float = 4e-3
    """Peak learning rate of the matrices under Muon; under AdamW ``adamw_lr`` is used for all."""
    adamw_lr: float = 1.5e-3
    warmup_steps: int = 200
    weight_decay: float = 0.02
    decay: float = 0.25
    """The learning rate is constant, then falls to zero over this share of the steps done when the fall begins: when
    every gate is passed by ``margin`` without the second loss, or when the budget leaves just so much."""
    margin: float = 0.02
    aux: float = 1.0
    """Weight of the second loss at the start."""
    aux_until: float = 0.5
    """Share of the budget at which the second loss begins to fade at the latest; it does so earlier once every gate is
    passed."""
    aux_fade: float = 0.3
    """It fades to zero over this share of the steps before that."""
    aux_layer: int | None = None
    """Layer after which it looks, counted from 0; the middle if None."""
    eval_every: int = 200
    eval_clips: int = 1024
    compile: bool = False
    """Compile the decoder's layers (CUDA only). Worth its first minute in long runs only."""
    log_every: int = 50
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes <= 0:
            raise ValueError(f"minutes must be positive when steps is not given; got {self.minutes}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")
        if not 0 < self.decay < 1 or not 0 <= self.aux_until <= 1 or not 0 < self.aux_fade <= 1:
            raise ValueError(
                f"decay, aux_until and aux_fade are shares; got {self.decay}, {self.aux_until} and {self.aux_fade}"
            )
        if self.aux_layer is not None and not 0 <= self.aux_layer < self.host.layers:
            raise ValueError(f"aux_layer must be one of 0 .. {self.host.layers - 1}; got {self.aux_layer}")


SIZES: dict[str, TrainConfig] = {
    "full": TrainConfig(),
    "small": TrainConfig(
        host=HostConfig(clip=ClipConfig(frames=6, grid=4, cell=4), width=64, intermediate=128, vision_width=32),
        minutes=9.5,
        batch=48,
        warmup_steps=50,
        eval_clips=256,
    ),
}
"""``full`` wants a GPU. ``small``, on smaller clips, learns all four kinds in ten minutes on two CPU cores."""


@dataclass(frozen=True)
class TrainReport:
    """What a run made.

    Attributes:
        checkpoint: the exported ``host.safetensors``.
        steps: optimiser steps done.
        seconds: training time, over all resumed parts.
        accuracies: kind -> accuracy on held-out clips, of the 16-bit weights as exported.
        passed: whether every gate was reached.
    """

    checkpoint: Path
    steps: int
    seconds: float
    accuracies: dict[str, float]
    passed: bool

    @classmethod
    def of(cls, run: Any) -> TrainReport:
        """Return the report of a finished run."""
        exported = run.artifacts / "host.safetensors"
        facts = json.loads(exported.with_suffix(".json").read_text(encoding="utf-8"))
        return cls(exported, facts["steps"], facts["seconds"], facts["result"], facts["passed"])


class Turns:
    """Questions on a batch of clips as token ids, made on the device.

    Six turns (shape and direction of both, order, place) have the same number of tokens in any order, so that rows of
    a batch are of one length without padding.
    """

    def __init__(self, host: Host, device: torch.device) -> None:
        tokenizer = host.processor.tokenizer

        def ids(words: Any) -> Tensor:
            return torch.tensor([tokenizer.convert_tokens_to_ids(word) for word in words], device=device)

        self.colors, self.shapes = ids(COLORS), ids(SHAPES)
        self.directions, self.corners = ids(DIRECTIONS), ids(CORNERS)
        self.words = {word: int(ids([word])[0]) for word in WORDS}
        video = host.model.config.video_token_index
        head = [tokenizer.bos_token_id] + [video] * (host.config.tokens + 1)
        self.head = torch.tensor(head, device=device)

    def _line(self, words: str, *slots: Tensor) -> Tensor:
        """``[clips, words]``; ``%`` takes the next slot."""
        fill = iter(slots)
        columns = [next(fill) if word == "%" else torch.full_like(slots[0], self.words[word]) for word in words.split()]
        return torch.stack(columns, 1)

    def lines(self, scenes: Scenes, swap: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """(kind, question ``[clips, words]``, answer ``[clips]``) of each turn."""
        colors = self.colors[scenes.color]
        found = []
        for which in (0, 1):
            name = colors[:, which]
            found.append(("shape", self._line("what shape is the % one ?", name), self.shapes[scenes.shape[:, which]]))
            way = self.directions[scenes.direction[:, which]]
            found.append(("direction", self._line("where does the % one move ?", name), way))
        pair = torch.where(swap[:, None], colors.flip(1), colors)
        first = colors.gather(1, scenes.appears.argmin(1, keepdim=True))[:, 0]
        found.append(("order", self._line("which appears first , % or % ?", pair[:, 0], pair[:, 1]), first))
        dot = torch.full_like(first, self.words["dot"])
        found.append(("place", self._line("where is the white % ?", dot), self.corners[scenes.corner]))
        return found

    def pack(self, scenes: Scenes, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """All turns in random order.

        Returns:
            Ids ``[clips, tokens]``, positions ``[clips, 6]`` whose next token is an answer, and the answers.
        """
        count, device = len(scenes), self.head.device
        swap = torch.rand(count, generator=generator, device=device) < 0.5
        lines = self.lines(scenes, swap)
        width = max(line.shape[1] for _, line, _ in lines) + 1
        blocks = torch.stack(
            [F.pad(torch.cat([q, a[:, None]], 1), (0, width - q.shape[1] - 1), value=-1) for _, q, a in lines], 1
        )
        order = torch.rand(count, len(lines), generator=generator, device=device).argsort(dim=1)
        flat = blocks.gather(1, order[..., None].expand(-1, -1, width)).flatten(1)
        kept = (flat >= 0).int().argsort(dim=1, descending=True, stable=True)
        total = int((flat[0] >= 0).sum())
        turns = flat.gather(1, kept)[:, :total]
        ids = torch.cat([self.head.expand(count, -1), turns], 1)
        marks = (ids == self.words["?"]).nonzero()[:, 1].view(count, len(lines))
        return ids, marks, ids.gather(1, marks + 1)


def train_host(
    cfg: TrainConfig,
    run: Any,
    *,
    device: torch.device | str,
    checkpoint: Path | None = None,
    command: str = "",
    quiet: bool = False,
) -> TrainReport:
    """Train, export and grade the tiny host.

    A run that was stopped continues from its checkpoint when it is started again with the same folder.

    Args:
        cfg: the run.
        run: a started ``hone_core.runs.Run``.
        device: where to train.
        checkpoint: where the resumable state is kept; ``artifacts/checkpoint.pt`` if None.
        command: what the user typed, kept in ``host.json``.
        quiet: show no progress.

    Raises:
        CheckpointError: the folder's checkpoint belongs to another config.
        RuntimeError: the batches made on the device are not what the processor makes of the same clips, or the loss
            is not finite.
    """
    from hone_core.progress import progress_bar

    device = torch.device(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    host = build_host(cfg.host, seed=cfg.seed)
    host.model.to(device)
    _check_batches(host, device)
    state = _TrainState(cfg, host, checkpoint or run.artifacts / "checkpoint.pt", device)
    state.resume()
    with progress_bar(cfg.steps, desc="training", quiet=quiet) as bar:
        for step, values in state.train():
            bar.update()
            if values is not None:
                run.log(step=step, **values)
                bar.show(**{name: f"{value:.3f}" for name, value in values.items() if name in ("loss", *QUESTIONS)})
                log.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    state.save()
    seconds = round(state.elapsed(), 1)
    exported = run.artifacts / "host.safetensors"
    save_host(host, exported)
    # Graded as shipped: 16-bit weights read back, float32 arithmetic.
    shipped = load_host(device, path=exported)
    accuracies = grade_host(shipped, clips=2 * cfg.eval_clips, seed=20_000 + cfg.seed)
    for kind, value in accuracies.items():
        spread = math.sqrt(value * (1 - value))
        run.row(f"{kind}_accuracy", value, better="higher", n=2 * cfg.eval_clips, spread=spread, split="held_out")
    passed = all(accuracies[kind] >= gate for kind, gate in GATES.items())
    if not passed:
        log.warning("the gates %s were missed: %s. Train longer before using this host.", GATES, accuracies)
    facts = {
        "command": command,
        "seed": cfg.seed,
        "steps": state.step,
        "batch": cfg.batch,
        "seconds": seconds,
        "result": {kind: round(value, 4) for kind, value in accuracies.items()},
        "gates": GATES,
        "passed": passed,
        "graded": f"{2 * cfg.eval_clips} held-out clips a kind",
        "parameters": sum(parameter.numel() for parameter in host.model.parameters()),
        "bytes": exported.stat().st_size,
        "train_config": json.loads(json.dumps(asdict(cfg))),
        "environment": {key: environment()[key] for key in ("commit", "dirty", "torch", "gpu", "cpu")},
    }
    atomic_write_json(exported.with_suffix(".json"), facts)
    return TrainReport(exported, state.step, seconds, facts["result"], passed)


@torch.no_grad()
def grade_host(host: Host, *, clips: int, seed: int, batch: int = 256) -> dict[str, float]:
    """Accuracy per kind of question, one question after the video, among all words of the vocabulary."""
    device = host.device
    generator = torch.Generator(device).manual_seed(seed)
    turns = Turns(host, device)
    right: dict[str, list[Tensor]] = {kind: [] for kind in QUESTIONS}
    for start in range(0, clips, batch):
        scenes = draw_scenes(min(batch, clips - start), host.config.clip, generator)
        pixels = pixel_values(render(scenes, host.config.clip, generator))
        swap = torch.rand(len(scenes), generator=generator, device=device) < 0.5
        asked = {kind: (line, answer) for kind, line, answer in turns.lines(scenes, swap)}
        for kind, (line, answer) in asked.items():
            ids = torch.cat([turns.head.expand(len(scenes), -1), line], 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = host.model(input_ids=ids, pixel_values_videos=pixels, logits_to_keep=1).logits[:, -1]
            right[kind].append(logits.argmax(-1) == answer)
    return {kind: float(torch.cat(values).float().mean()) for kind, values in right.items()}


class _TrainState:
    """Everything that a resumed run needs to go on, and the loop that changes it."""

    def __init__(self, cfg: TrainConfig, host: Host, path: Path, device: torch.device) -> None:
        self.cfg, self.host, self.path, self.device = cfg, host, path, device
        self.generator = torch.Generator(device).manual_seed(cfg.seed)
        self.turns = Turns(host, device)
        self.step = 0
        self.before = 0.0
        self.fading: int | None = None  # step when the second loss began to fade
        self.falling: tuple[int, float] | None = None  # step and share of the budget when the rate began to fall
        self.started = self.saved = time.perf_counter()
        layers = host.model.model.language_model.layers
        self.layer = layers[cfg.host.layers // 2 - 1 if cfg.aux_layer is None else cfg.aux_layer]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.probe = nn.Linear(cfg.host.width, len(SHAPES) + len(DIRECTIONS) + 2).to(device)
        matrices, others = [], list(self.probe.parameters())
        for name, parameter in host.model.named_parameters():
            muon = cfg.optimizer == "muon" and parameter.ndim == 2 and ".layers." in name
            (matrices if muon else others).append(parameter)
        options = {"betas": (0.9, 0.98), "fused": device.type == "cuda", "weight_decay": 0.0 if matrices else 0.05}
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, cfg.adamw_lr, **options)]
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(matrices, cfg.lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        self.peaks = [cfg.adamw_lr, cfg.lr]

    def elapsed(self) -> float:
        return self.before + time.perf_counter() - self.started

    def spent(self) -> float:
        """Share of the budget."""
        if self.cfg.steps is not None:
            return self.step / self.cfg.steps
        return self.elapsed() / (60 * self.cfg.minutes)

    def rate(self) -> float:
        """Factor of the learning rate: warm-up, constant, then a fall to zero."""
        warmup = min(1.0, (self.step + 1) / self.cfg.warmup_steps)
        if self.falling is None:
            return warmup
        since, length = self.step - self.falling[0], max(1.0, self.cfg.decay * self.falling[0])
        by_steps = since / length
        by_budget = (self.spent() - self.falling[1]) / max(1e-6, 1 - self.falling[1])
        return warmup * max(0.0, 1 - max(by_steps, by_budget))

    def aux_weight(self) -> float:
        """Weight of the second loss: constant, then a fade to zero."""
        if self.fading is None:
            return self.cfg.aux
        length = max(1.0, self.cfg.aux_fade * self.fading)
        return self.cfg.aux * max(0.0, 1 - (self.step - self.fading) / length)

    def train(self) -> Iterator[tuple[int, dict[str, float] | None]]:
        """Run to the end; yield (step, values to log or None)."""
        cfg = self.cfg
        self._compile()
        self.host.model.train()
        while self.spent() < 1 and (self.falling is None or self.rate() > 0):
            loss, answers, probed = self._advance()
            self.step += 1
            values: dict[str, float] | None = None
            if self.step % cfg.log_every == 0:
                values = {"loss": float(loss), "right": float(answers), "seconds": self.elapsed(), "rate": self.rate()}
                values |= {f"probe_{name}": value for name, value in probed.items()}
                if not math.isfinite(values["loss"]):
                    raise RuntimeError(f"the loss is {values['loss']} at step {self.step}; lower the learning rate")
            if self.step % cfg.eval_every == 0:
                self.host.model.eval()
                grades = grade_host(self.host, clips=cfg.eval_clips, seed=10_000)
                self.host.model.train()
                values = (values or {}) | grades
                if all(grades[kind] >= min(1.0, gate + cfg.margin) for kind, gate in GATES.items()):
                    if self.fading is None:
                        log.info("every gate is passed at step %d; the second loss fades", self.step)
                        self.fading = self.step
                    elif self.falling is None and not self.aux_weight():
                        log.info("every gate is passed without it at step %d; the learning rate falls", self.step)
                        self.falling = (self.step, self.spent())
            if self.fading is None and self.spent() >= cfg.aux_until:
                self.fading = self.step
            # What is left must hold the fall, which lasts ``decay`` of what came before it.
            if self.falling is None and self.spent() >= 1 / (1 + cfg.decay):
                self.falling = (self.step, self.spent())
            yield self.step, values
            if time.perf_counter() - self.saved > cfg.checkpoint_seconds:
                self.save()
        self.host.model.eval()

    def _advance(self) -> tuple[Tensor, Tensor, dict[str, float]]:
        cfg, model, device = self.cfg, self.host.model, self.device
        scenes = draw_scenes(cfg.batch, cfg.host.clip, self.generator)
        pixels = pixel_values(render(scenes, cfg.host.clip, self.generator))
        ids, marks, answers = self.turns.pack(scenes, self.generator)
        weight = self.aux_weight()
        kept: list[Tensor] = []
        hook = self.layer.register_forward_hook(lambda module, args, out: kept.append(out)) if weight else None
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                states = model.model(input_ids=ids, pixel_values_videos=pixels, use_cache=False).last_hidden_state
                at = states.gather(1, marks[..., None].expand(-1, -1, states.shape[-1]))
                logits = model.lm_head(at).float()
        finally:
            if hook is not None:
                hook.remove()
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        total, probed = loss, {}
        if weight:
            aux, probed = self._aux(kept[0].float(), scenes)
            total = loss + weight * aux
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *self.probe.parameters()], 1.0)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = peak * self.rate()
            optimizer.step()
        return loss.detach(), (logits.argmax(-1) == answers).float().mean(), probed

    def _aux(self, states: Tensor, scenes: Scenes) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of what the tokens on a shape say of it: its form, its direction, whether it came first."""
        clip = self.cfg.host.clip
        row, column, seen = scenes.path(clip)
        covered = torch.zeros_like(seen)
        covered[:, 0] = (row[:, 0] == row[:, 1]) & (column[:, 0] == column[:, 1]) & seen[:, 1]
        seen = seen & ~covered
        time_axis = torch.arange(clip.frames, device=self.device)
        place = 1 + time_axis * clip.grid**2 + row * clip.grid + column
        tokens = states.gather(1, place.flatten(1)[..., None].expand(-1, -1, states.shape[-1])).view(*place.shape, -1)
        form, way, first = self.probe(tokens).split([len(SHAPES), len(DIRECTIONS), 2], -1)
        moved = seen & (time_axis // 2 > scenes.appears[..., None] // 2)
        both = seen & (time_axis >= scenes.appears.amax(1)[:, None, None])
        came_first = (scenes.appears == scenes.appears.amin(1, keepdim=True)).long()
        losses = []
        report = self.step % self.cfg.log_every == self.cfg.log_every - 1
        probed: dict[str, float] = {}
        for name, scores, label, mask in (
            ("shape", form, scenes.shape, seen),
            ("direction", way, scenes.direction, moved),
            ("order", first, came_first, both),
        ):
            target = label[..., None].expand(place.shape)
            each = F.cross_entropy(scores.flatten(0, 2), target.flatten(), reduction="none").view(place.shape)
            count = mask.sum().clamp(min=1)
            losses.append((each * mask).sum() / count)
            if report:
                probed[name] = float(((scores.argmax(-1) == target) & mask).sum() / count)
        return torch.stack(losses).mean(), probed

    def _compile(self) -> None:
        """Compile the decoder's layers, after a look whether they can be: a host is worth more than a fast step."""
        if self.device.type != "cuda" or not self.cfg.compile:
            return
        layers = self.host.model.model.language_model.layers
        for layer in layers:
            layer.compile(dynamic=False)
        generator = self.generator.get_state()
        try:
            self._advance()
            torch.cuda.synchronize()
        except Exception as error:
            log.warning("the layers do not compile (%s); training goes on without", str(error).splitlines()[0])
            for layer in layers:
                layer._compiled_call_impl = None
        self.generator.set_state(generator)

    def _content(self) -> dict[str, Any]:
        return {
            "config": json.loads(json.dumps(asdict(self.cfg))),
            "model": self.host.model.state_dict(),
            "probe": self.probe.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state().cpu(),
            "step": self.step,
            "seconds": self.elapsed(),
            "fading": self.fading,
            "falling": self.falling,
        }

    def save(self) -> None:
        """Write the resumable state."""
        with atomic_path(self.path) as scratch:
            torch.save(self._content(), scratch)
        self.saved = time.perf_counter()

    def resume(self) -> bool:
        """Read the state, if there is any.

        Raises:
            CheckpointError: It is of another config.
        """
        if not self.path.exists():
            return False
        stored = torch.load(self.path, map_location=self.device, weights_only=True)
        if stored["config"] != json.loads(json.dumps(asdict(self.cfg))):
            raise CheckpointError(f"{self.path} belongs to a run with another config; choose another --out")
        self.host.model.load_state_dict(stored["model"])
        self.probe.load_state_dict(stored["probe"])
        for optimizer, values in zip(self.optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.generator.set_state(stored["generator"].cpu())
        self.step, self.before = stored["step"], stored["seconds"]
        self.fading = stored["fading"]
        self.falling = None if stored["falling"] is None else tuple(stored["falling"])
        self.started = time.perf_counter()
        log.info("resumed at step %d", self.step)
        return True


@torch.no_grad()
def _check_batches(host: Host, device: torch.device) -> None:
    """Compare ids and pixels made on the device with what the processor makes of the same clips.

    Raises:
        RuntimeError: They differ: the host would be trained on one thing and asked another.
    """
    items = generated_items(12, host.config.clip, seed=3)
    generator = torch.Generator().manual_seed(3)
    scenes = draw_scenes(len(items), host.config.clip, generator)
    pixels = pixel_values(render(scenes, host.config.clip, generator))
    scenes = Scenes(*(getattr(scenes, name).to(device) for name in Scenes.__dataclass_fields__))
    lines = Turns(host, device).lines(scenes, scenes.corner % 2 == 1)
    for index, item in enumerate(items):
        prompt = choice_prompt(host.processor, item.question, item.options, style="text")
        inputs = choice_inputs(host.processor, [prompt], [item.clip])
        made = [line[index].cpu() for kind, line, _ in lines if kind == item.category]
        tail = inputs["input_ids"][0, host.config.tokens + 2 :]
        if not any(torch.equal(line, tail) for line in made):
            raise RuntimeError(f"the question {item.question!r} is not tokenised as in training: {tail.tolist()}")
        if not torch.allclose(inputs["pixel_values_videos"][0], pixels[index], atol=1e-5):
            raise RuntimeError("pixels of a clip differ between training and processor")
