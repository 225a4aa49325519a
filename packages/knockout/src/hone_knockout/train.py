"""Train the tiny host: clips drawn on the device, six questions on each, and an early stop when every kind is learned.

One command makes the checkpoint that ships in ``assets/``: ``hone-knockout train-host --device cuda``. A second loss
asks visual tokens in the middle of the decoder what they show and where it moves; it gets the circuits started, which
the answers alone are slow to do, and has faded to nothing before the learning rate falls.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hone_core.devices import resolve_device
from hone_core.runs import Run
from hone_core.training import HOST, Training, TrainReport, finish_host
from hone_lm.choices import choice_inputs, choice_prompt
from hone_lm.question_sets import read_clip
from torch import Tensor, nn

from .config import QUESTIONS, TrainConfig, TrainHostConfig
from .data import COLORS, CORNERS, DIRECTIONS, SHAPES, Scenes, draw_scenes, generated_items, render
from .host import WORDS, Host, build_host, load_host, pixel_values, save_host

__all__ = ["GATES", "Schedule", "Turns", "grade_host", "train", "train_host"]

log = logging.getLogger(__name__)

GATES = {"shape": 0.95, "place": 0.95, "order": 0.95, "direction": 0.90}
"""Accuracy per kind of question that a host must reach before a knockout of it says anything."""


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


def train_host(cfg: TrainHostConfig, run: Run) -> TrainReport:
    """Train, export and grade the tiny host of a size."""
    return train(cfg.training, run)


def train(cfg: TrainConfig, run: Run) -> TrainReport:
    """Train, export and grade a tiny host.

    A run that was stopped continues from its checkpoint when it is started again with the same folder.

    Args:
        cfg: The training.
        run: A started ``hone_core.runs.Run``.

    Raises:
        CheckpointError: The folder's checkpoint belongs to another config.
        RuntimeError: The batches made on the device are not what the processor makes of the same clips, or the loss
            is not finite.
    """
    device = resolve_device(run.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    host = build_host(cfg.host, seed=cfg.seed)
    host.model.to(device)
    _check_batches(host, device)
    work = _Work(cfg, host, run.artifacts / "checkpoint.pt", device)
    work.training.resume()
    work.training.follow(work.loop(), run, show=("loss", *QUESTIONS))
    exported = save_host(host, run.artifacts / HOST)
    # Graded as shipped: 16-bit weights read back, float32 arithmetic.
    grades = grade_host(load_host(device, path=exported), clips=2 * cfg.eval_clips, seed=20_000 + cfg.seed)
    for kind, value in grades.items():
        spread = math.sqrt(value * (1 - value))
        run.row(f"{kind}_accuracy", value, better="higher", n=2 * cfg.eval_clips, spread=spread, split="held_out")
    details = {
        "graded": f"{2 * cfg.eval_clips} held-out clips a kind",
        "parameters": sum(parameter.numel() for parameter in host.model.parameters()),
    }
    return finish_host(run, work.training, grades, gates=GATES, details=details)


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


class Schedule:
    """The learning rate, and the weight of the second loss: when each falls depends on what has been learned.

    Args:
        cfg: The training.

    Attributes:
        fading: step when the second loss began to fade.
        falling: step, and share of the budget, when the learning rate began to fall.
    """

    def __init__(self, cfg: TrainConfig) -> None:
        self.cfg = cfg
        self.fading: int | None = None
        self.falling: tuple[int, float] | None = None

    def rate(self, step: int, spent: float) -> float:
        """Factor of the learning rate: warm-up, constant, then a fall to zero.

        Args:
            step: Updates done.
            spent: Share of the budget.
        """
        warmup = min(1.0, (step + 1) / self.cfg.warmup_steps)
        if self.falling is None:
            return warmup
        since, length = step - self.falling[0], max(1.0, self.cfg.decay * self.falling[0])
        by_steps = since / length
        by_budget = (spent - self.falling[1]) / max(1e-6, 1 - self.falling[1])
        return warmup * max(0.0, 1 - max(by_steps, by_budget))

    def aux_weight(self, step: int) -> float:
        """Weight of the second loss: constant, then a fade to zero."""
        if self.fading is None:
            return self.cfg.aux
        length = max(1.0, self.cfg.aux_fade * self.fading)
        return self.cfg.aux * max(0.0, 1 - (step - self.fading) / length)

    def learned(self, step: int, spent: float) -> None:
        """Every gate is passed: the second loss fades, and once it is gone the rate falls."""
        if self.fading is None:
            log.info("every gate is passed at step %d; the second loss fades", step)
            self.fading = step
        elif self.falling is None and not self.aux_weight(step):
            log.info("every gate is passed without it at step %d; the learning rate falls", step)
            self.falling = (step, spent)

    def advance(self, step: int, spent: float) -> None:
        """Begin what the budget leaves no more time to wait for."""
        if self.fading is None and spent >= self.cfg.aux_until:
            self.fading = step
        # What is left must hold the fall, which lasts ``decay`` of what came before it.
        if self.falling is None and spent >= 1 / (1 + self.cfg.decay):
            self.falling = (step, spent)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"fading": self.fading, "falling": self.falling}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.fading = state["fading"]
        self.falling = None if state["falling"] is None else tuple(state["falling"])


class _Work:
    """Model, probe and optimisers of a training, and the loop that changes them."""

    def __init__(self, cfg: TrainConfig, host: Host, path: Path, device: torch.device) -> None:
        self.cfg, self.host, self.device = cfg, host, device
        self.generator = torch.Generator(device).manual_seed(cfg.seed)
        self.turns = Turns(host, device)
        self.schedule = Schedule(cfg)
        layers = host.model.model.language_model.layers
        self.layer = layers[cfg.host.layers // 2 - 1 if cfg.aux_layer is None else cfg.aux_layer]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.probe = nn.Linear(cfg.host.width, len(SHAPES) + len(DIRECTIONS) + 2).to(device)
        matrices: list[nn.Parameter] = []
        others = list(self.probe.parameters())
        for name, parameter in host.model.named_parameters():
            muon = cfg.optimizer == "muon" and parameter.ndim == 2 and ".layers." in name
            (matrices if muon else others).append(parameter)
        fused, decay = device.type == "cuda", 0.0 if matrices else 0.05
        adamw = torch.optim.AdamW(others, cfg.adamw_lr, betas=(0.9, 0.98), fused=fused, weight_decay=decay)
        self.optimizers: list[torch.optim.Optimizer] = [adamw]
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(matrices, cfg.lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        self.peaks = [cfg.adamw_lr, cfg.lr]
        parts = {"model": host.model, "probe": self.probe, "generator": self.generator, "schedule": self.schedule}
        parts |= {type(optimizer).__name__: optimizer for optimizer in self.optimizers}
        self.training = Training(cfg, path, parts)

    def loop(self) -> Iterator[dict[str, float] | None]:
        """Train to the end; yield what is to be logged, or None."""
        cfg, training, schedule = self.cfg, self.training, self.schedule
        training.start()
        self._compile()
        self.host.model.train()
        while training.spent() < 1 and (schedule.falling is None or schedule.rate(training.step, training.spent()) > 0):
            loss, answers, probed = self._advance()
            training.step += 1
            values: dict[str, float] | None = None
            if training.due():
                rate = schedule.rate(training.step, training.spent())
                values = {"loss": float(loss), "right": float(answers), "seconds": training.elapsed(), "rate": rate}
                values |= {f"probe_{name}": value for name, value in probed.items()}
            if training.step % cfg.eval_every == 0:
                self.host.model.eval()
                grades = grade_host(self.host, clips=cfg.eval_clips, seed=10_000)
                self.host.model.train()
                values = (values or {}) | grades
                if all(grades[kind] >= min(1.0, gate + cfg.margin) for kind, gate in GATES.items()):
                    schedule.learned(training.step, training.spent())
            schedule.advance(training.step, training.spent())
            yield values
        self.host.model.eval()

    def _advance(self) -> tuple[Tensor, Tensor, dict[str, float]]:
        cfg, model, device = self.cfg, self.host.model, self.device
        scenes = draw_scenes(cfg.batch, cfg.host.clip, self.generator)
        pixels = pixel_values(render(scenes, cfg.host.clip, self.generator))
        ids, marks, answers = self.turns.pack(scenes, self.generator)
        weight = self.schedule.aux_weight(self.training.step)
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
        total = loss
        probed: dict[str, float] = {}
        if weight:
            aux, probed = self._aux(kept[0].float(), scenes)
            total = loss + weight * aux
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *self.probe.parameters()], 1.0)
        rate = self.schedule.rate(self.training.step, self.training.spent())
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
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
        report = (self.training.step + 1) % self.cfg.log_every == 0
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
        clip = read_clip(item, num_frames=host.config.clip.frames)
        inputs = choice_inputs(host.processor, [prompt], [clip])
        made = [line[index].cpu() for kind, line, _ in lines if kind == item.category]
        tail = inputs["input_ids"][0, host.config.tokens + 2 :]
        if not any(torch.equal(line, tail) for line in made):
            raise RuntimeError(f"the question {item.question!r} is not tokenised as in training: {tail.tolist()}")
        if not torch.allclose(inputs["pixel_values_videos"][0], pixels[index], atol=1e-5):
            raise RuntimeError("pixels of a clip differ between training and processor")
