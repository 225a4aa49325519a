"""``train``: the tokenizer by parts, or the masked transformer with the method, on HumanML3D or text, music and dance.

Runs in one process, or in several that ``accelerate launch`` starts: each takes its share of every batch, and gradients
are averaged. What a step does depends on its number alone, so that a stopped training goes on exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hone_core import hosts
from hone_core.devices import resolve_device
from hone_core.runs import Report, Run
from hone_core.training import SharedTraining
from torch import Tensor, nn

from .config import TokenizerConfig, TrainConfig, TransformerConfig
from .data import statistics
from .host import PACKAGE
from .humanml3d import Clip, read_clips
from .masking import masked_loss
from .method import Condition, MotionTransformer
from .models import attach, draw_mask
from .texts import ClipText
from .tokenizers import PartTokenizer
from .train import seeded
from .triples import is_triples, read_triples

__all__ = ["Fitting", "TrainedReport", "load_tokenizer", "load_transformer", "train"]

WINDOW = 64
"""Frames that the tokenizer is trained on at a time."""


@dataclass(frozen=True, kw_only=True)
class TrainedReport(Report):
    """What a training reached; as text, losses and the file.

    Attributes:
        weights: What was trained.
    """

    weights: Path

    @classmethod
    def of(cls, run: Run) -> TrainedReport:
        """Return the report of a finished run."""
        (weights,) = run.artifacts.glob("*.safetensors")
        return cls(path=run.path, rows=tuple(run.rows), weights=weights)

    def __str__(self) -> str:
        lines = [f"{row.metric:<12}{row.split:<8}{row.value:>10.4f}" for row in self.rows]
        return "\n".join([*lines, f"weights  {self.weights}", f"results  {self.path / 'results.json'}"])


def load_tokenizer(path: Path, device: torch.device | str = "cpu") -> PartTokenizer:
    """A tokenizer that ``train --stage tokenizer`` wrote.

    Raises:
        CheckpointError: It is missing, damaged or another one.
    """
    stored = hosts.open_host(TokenizerConfig, PACKAGE, path)
    tokenizer = PartTokenizer(stored.config)
    stored.load({"tokenizer.": tokenizer})
    return tokenizer.eval().requires_grad_(False).to(device)


def load_transformer(path: Path, device: torch.device | str = "cpu") -> MotionTransformer:
    """A transformer that ``train --stage transformer`` wrote.

    Raises:
        CheckpointError: It is missing, damaged or another one.
    """
    stored = hosts.open_host(TransformerConfig, PACKAGE, path)
    model = MotionTransformer(stored.config)
    stored.load({"transformer.": model})
    return model.eval().requires_grad_(False).to(device)


class Fitting:
    """One stage in training.

    Args:
        cfg: The run.
        clips: Of the training split.
        accelerator: Of ``accelerate``.
        device: Where.
        path: File of the resumable state.
    """

    def __init__(self, cfg: TrainConfig, clips: list[Clip], accelerator: Any, device: torch.device, path: Path) -> None:
        self.cfg, self.clips, self.accelerator, self.device = cfg, clips, accelerator, device
        self.process, self.count = accelerator.process_index, accelerator.num_processes
        quiet = [index for index, clip in enumerate(clips) if clip.music is None]
        danced = [index for index, clip in enumerate(clips) if clip.music is not None]
        # The tokenizer learns of all alike.
        self.kinds = ([*quiet, *danced], []) if cfg.stage == "tokenizer" else (quiet, danced)
        self.tokens: list[Tensor] = []
        self.texts: list[Tensor] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.model: Any
            if cfg.stage == "tokenizer":
                self.model = PartTokenizer(cfg.tokenizer_sizes)
                mean, std = statistics(torch.cat([clip.features for clip in clips])[None])
                self.model.mean.copy_(mean)
                self.model.std.copy_(std)
            else:
                self.model = MotionTransformer(cfg.transformer)
                attach(self.model, cfg.settings)
                self._prepare_texts()
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay
        )
        parts = {"model": self.model, "optimizer": self.optimizer}
        self.training = SharedTraining(cfg, path, parts, accelerator)

    def _prepare_texts(self) -> None:
        assert self.cfg.tokenizer is not None
        assert self.cfg.text_encoder is not None
        tokenizer = load_tokenizer(self.cfg.tokenizer, self.device)
        if len(tokenizer.quantizers[0].codebook) != self.cfg.transformer.codes:  # type: ignore[arg-type]
            raise ValueError(
                f"{self.cfg.tokenizer} has {len(tokenizer.quantizers[0].codebook)} codes and the transformer "  # type: ignore[arg-type]
                f"{self.cfg.transformer.codes}; set transformer.codes in a --config"
            )
        encode = ClipText(self.cfg.text_encoder, self.device)
        wide = encode.width
        if wide != self.cfg.transformer.text_width:
            raise ValueError(
                f"{self.cfg.text_encoder} gives texts of {wide} numbers and the transformer takes "
                f"{self.cfg.transformer.text_width}; set transformer.text_width in a --config"
            )
        for clip in self.clips:
            rows = min(len(clip.features) // 4, self.cfg.transformer.max_tokens) * 4
            self.tokens.append(tokenizer.encode(clip.features[None, :rows].to(self.device))[0])
            # Without a caption a row of zeros stands there, which is left out for the learned vector.
            self.texts.append(encode(clip.captions) if clip.captions else torch.zeros(1, wide, device=self.device))

    def _generator(self, purpose: int) -> torch.Generator:
        # Of the step and the process alone.
        seed = ((self.cfg.seed * 1_000_003 + self.training.step) * 64 + self.process) * 4 + purpose
        return torch.Generator(self.device).manual_seed(seed)

    def _batch(self) -> list[int]:
        own = self.cfg.batch // self.count
        draw = torch.Generator().manual_seed(self.cfg.seed * 1_000_003 + self.training.step)
        # A batch has music or has none, since the two attend differently: as often as its kind is in the set.
        kind = self.kinds[int(torch.randint(len(self.clips), (), generator=draw)) >= len(self.kinds[0])]
        whole = [kind[at] for at in torch.randint(len(kind), (self.cfg.batch,), generator=draw).tolist()]
        return whole[self.process * own : (self.process + 1) * own]

    def loss(self) -> Tensor:
        """Of this process's share of the step's batch."""
        chosen, generator = self._batch(), self._generator(0)
        if self.cfg.stage == "tokenizer":
            windows = []
            for index in chosen:
                features = self.clips[index].features
                first = int(
                    torch.rand((), generator=generator, device=self.device) * max(1, len(features) - WINDOW + 1)
                )
                part = features[first : first + WINDOW]
                if len(part) < WINDOW:  # short clips stand still at their end
                    part = torch.cat([part, part[-1:].expand(WINDOW - len(part), -1)])
                windows.append(part)
            return self.model.loss(torch.stack(windows).to(self.device), generator)[0]
        longest = max(len(self.tokens[index]) for index in chosen)
        ids = torch.full((len(chosen), longest, 6), self.model.pad_id, device=self.device)
        valid = torch.zeros(len(chosen), longest, dtype=torch.bool, device=self.device)
        texts = []
        for row, index in enumerate(chosen):
            own = self.tokens[index]
            ids[row, : len(own)], valid[row, : len(own)] = own, True
            which = int(torch.rand((), generator=generator, device=self.device) * len(self.texts[index]))
            texts.append(self.texts[index][which])
        untold = torch.tensor([not self.clips[index].captions for index in chosen], device=self.device)
        condition = Condition(text=torch.stack(texts), music=self._music(chosen, longest), no_text=untold)
        mask, _ = draw_mask(self.model, ids, condition, valid, generator)
        gone = torch.rand(2, len(chosen), generator=generator, device=self.device) < self.cfg.drop
        return masked_loss(self.model, ids, condition.dropped(*gone), valid, mask, generator, self.cfg.settings.corrupt)

    def _music(self, chosen: list[int], longest: int) -> Tensor | None:
        if self.clips[chosen[0]].music is None:
            return None
        music = torch.zeros(len(chosen), longest, self.cfg.transformer.music_width, device=self.device)
        for row, index in enumerate(chosen):
            own = self.clips[index].music
            assert own is not None
            count = len(self.tokens[index])
            music[row, :count] = own[:count]
        return music

    def train(self) -> Iterator[dict[str, float] | None]:
        """Run to the end of the budget; see ``hone_core.training.Training``."""
        cfg, training = self.cfg, self.training
        self.model.train()
        training.start()
        while training.spent() < 1:
            rate = min(1.0, (training.step + 1) / cfg.warmup_steps) * (0.1 if training.spent() > 0.8 else 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = cfg.lr * rate
            with seeded(self.device, 64 * cfg.seed + self.process, training.step):
                loss = self.loss()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.count > 1:
                self._together()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            training.step += 1
            yield {"loss": loss.item()} if training.due() else None

    def _together(self) -> None:
        for parameter in self.model.parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(grad, "mean")
        for name, buffer in self.model.named_buffers():
            if name.rsplit(".", 1)[-1] in ("code_sum", "code_count", "codebook"):
                buffer.copy_(self.accelerator.reduce(buffer.clone(), "mean"))


def train(cfg: TrainConfig, run: Run) -> TrainedReport:
    """Train a stage and write its weights; a stopped run goes on where it was.

    Raises:
        CheckpointError: The folder's checkpoint is of another config, or the tokenizer is missing.
        ValueError: A motion or a text is damaged; the message names file and row or line.
        RuntimeError: The loss is not finite.
    """
    from accelerate import Accelerator  # type: ignore[import-untyped]

    device = resolve_device(run.device)
    accelerator = Accelerator(cpu=device.type != "cuda")
    if accelerator.num_processes > 1:
        device = accelerator.device
    if cfg.batch % accelerator.num_processes:
        raise ValueError(f"batch must be a multiple of {accelerator.num_processes} processes; got {cfg.batch}")
    clips = (read_triples if is_triples(cfg.data) else read_clips)(cfg.data, "train")
    fitting = Fitting(cfg, clips, accelerator, device, run.artifacts / "checkpoint.pt")
    fitting.training.resume()
    fitting.training.follow(fitting.train(), run)
    if accelerator.is_main_process:
        sizes = cfg.tokenizer_sizes if cfg.stage == "tokenizer" else cfg.transformer
        hosts.save_host(
            run.artifacts / f"{cfg.stage}.safetensors", sizes, {f"{cfg.stage}.": fitting.model}, package=PACKAGE
        )
        if fitting.training.step >= cfg.log_every:
            run.row_of_end("loss", split="train")
        run.row("clips", len(clips), better="none", split="train")
    accelerator.wait_for_everyone()
    return TrainedReport.of(run)
