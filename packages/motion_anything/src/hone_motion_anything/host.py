"""The tiny host: tokenizer by parts, masked transformer, text encoder and evaluator, trained on the grammar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from hone_core import hosts
from hone_core.hosts import HostFacts, ModuleHost
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .config import HostConfig, UnmaskConfig
from .decoding import draw_motion
from .evaluator import Evaluator, TextReader
from .grammar import FRAMES, TOKEN_FRAMES, WORDS
from .method import Condition, MotionTransformer
from .tokenizers import PartTokenizer

__all__ = ["PACKAGE", "PACKAGED", "Host", "load_host", "save_host"]

PACKAGE = "hone-motion-anything"
PACKAGED = hosts.packaged_host(PACKAGE)
"""The host that ships with the package."""


@dataclass
class Host(ModuleHost):
    """A trained host.

    Attributes:
        config: Architecture.
        tokenizer: Features to tokens of time and part, and back.
        transformer: Masked transformer.
        reader: Captions to the text's vector.
        evaluator: Captions and motions to vectors that are compared.
        facts: How it was made; None for one without.
    """

    package: ClassVar[str] = PACKAGE
    architecture: ClassVar[type[HostConfig]] = HostConfig
    config: HostConfig
    tokenizer: PartTokenizer
    transformer: MotionTransformer
    reader: TextReader
    evaluator: Evaluator
    facts: HostFacts | None = None

    @classmethod
    def untrained(cls, config: HostConfig | None = None, seed: int = 0) -> Host:
        """Random weights; the global generator stays."""
        config = config or HostConfig()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokenizer = PartTokenizer(config.tokenizer)
            for quantizer in tokenizer.quantizers:
                nn.init.normal_(quantizer.codebook)  # type: ignore[arg-type]
            return cls(
                config,
                tokenizer,
                MotionTransformer(config.transformer),
                TextReader(len(WORDS), config.evaluator, config.transformer.text_width),
                Evaluator(len(WORDS), config.evaluator),
            )

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Prefix in the stored file to module."""
        return {
            "tokenizer.": self.tokenizer,
            "transformer.": self.transformer,
            "reader.": self.reader,
            "evaluator.": self.evaluator,
        }

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.tokenizer.mean.device

    def condition(
        self, words: Int[Tensor, "batch words"] | None, music: Float[Tensor, "batch tokens 35"] | None = None
    ) -> Condition:
        """What a motion is to follow, of word ids and pooled music features."""
        text = None if words is None else self.reader(words.to(self.device))
        return Condition(text=text, music=None if music is None else music.to(self.device))

    @torch.no_grad()
    def tokens(
        self,
        condition: Condition,
        generator: torch.Generator,
        settings: UnmaskConfig | None = None,
        *,
        time: int = FRAMES // TOKEN_FRAMES,
        start: Int[Tensor, "batch time 6"] | None = None,
        edit: Bool[Tensor, "batch time 6"] | None = None,
    ) -> Int[Tensor, "batch time 6"]:
        """Draw tokens; with ``start`` and ``edit`` make the marked ones anew and keep the others.

        Args:
            condition: What to follow.
            generator: On the host's device.
            settings: Of the generation.
            time: Time steps of four frames.
            start: Tokens of a motion.
            edit: What to make anew.
        """
        valid = torch.ones(condition.batch, time, dtype=torch.bool, device=self.device)
        return draw_motion(self.transformer, condition, valid, generator, settings, start=start, edit=edit)

    @torch.no_grad()
    def draw(
        self, condition: Condition, generator: torch.Generator, settings: UnmaskConfig | None = None
    ) -> Float[Tensor, "batch 80 263"]:
        """Features of motions of four seconds."""
        return self.tokenizer.decode(self.tokens(condition, generator, settings))


load_host, save_host = Host.load, Host.save
