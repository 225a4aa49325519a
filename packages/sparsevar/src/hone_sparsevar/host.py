"""The tiny host: a BSQ tokenizer, a small Infinity and a grader, trained on generated scenes of 64 px."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from hone_core import hosts
from hone_core.hosts import HostFacts, ModuleHost
from hone_visual_ar.generation import Generation, Policy, generate
from hone_visual_ar.infinity import Infinity
from hone_visual_ar.sampling import Sampling
from hone_visual_ar.schedules import ScaleSchedule, infinity_schedule
from hone_visual_ar.tokenizers import BSQVAE
from torch import Tensor

from .config import HostConfig
from .data import MAX_WORDS, TEXT_CHANNELS, word_table, words
from .grader import Grader

__all__ = ["PACKAGE", "PACKAGED", "SCHEDULE", "Host", "load_host", "save_host"]

PACKAGE = "hone-sparsevar"
PACKAGED = hosts.packaged_host(PACKAGE)
"""The host that ships with the package."""
SCHEDULE: ScaleSchedule = infinity_schedule("0.06M")
"""Scales of 1, 2, 4, 6, 8, 12 and 16 tokens a side, as Infinity's smallest images have."""


@dataclass
class Host(ModuleHost):
    """A trained host.

    Attributes:
        config: Architecture.
        tokenizer: Images of 64 px to 16 x 16 codes.
        transformer: Small Infinity.
        grader: Reads what an image shows.
        table: Vectors of the words.
        facts: How it was made; None for one without.
    """

    package: ClassVar[str] = PACKAGE
    architecture: ClassVar[type[HostConfig]] = HostConfig
    tensors: ClassVar[tuple[str, ...]] = ("table",)
    config: HostConfig
    tokenizer: BSQVAE
    transformer: Infinity
    grader: Grader
    table: Tensor
    facts: HostFacts | None = None

    @classmethod
    def untrained(cls, config: HostConfig | None = None, seed: int = 0) -> Host:
        """Random weights; the global generator stays."""
        config = config or HostConfig()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokenizer = BSQVAE(config.code_dim, config.ae_channels, config.ae_multipliers, config.ae_blocks)
            transformer = Infinity(
                depth=config.depth,
                width=config.width,
                num_heads=config.heads,
                chunks=1,
                code_dim=config.code_dim,
                text_channels=TEXT_CHANNELS,
                text_maxlen=MAX_WORDS,
            )
            grader = Grader(config.grader_channels)
        return cls(config, tokenizer, transformer, grader, word_table(torch.Generator().manual_seed(0)))

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """Prefix in the stored file to module."""
        return {"tokenizer.": self.tokenizer, "transformer.": self.transformer, "grader.": self.grader}

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.table.device

    def draw(
        self,
        labels: Tensor,
        seeds: Sequence[int],
        *,
        policy: Policy | None = None,
        greedy: bool = False,
    ) -> Generation:
        """Draw scenes of labels ``[B, 4, 3]``; ``.image()`` decodes them.

        Args:
            labels: What is asked for.
            seeds: Of each image.
            policy: What of a scale runs; None: what is attached, or everything.
            greedy: Take the likeliest bits.
        """
        with torch.no_grad():
            condition = self.transformer.condition(*words(labels.to(self.device), self.table))
            config = self.config
            sampling = Sampling(guidance=config.guidance, temperature=config.temperature, greedy=greedy)
            return generate(
                self.transformer, self.tokenizer, condition, SCHEDULE, seeds=seeds, sampling=sampling, policy=policy
            )


load_host, save_host = Host.load, Host.save
