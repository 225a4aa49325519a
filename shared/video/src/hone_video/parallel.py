"""Diffusers' context parallelism under an attached method: Ulysses, where each process has some heads of all tokens.

Outside attention a process has its share of the tokens, a piece of the order that the method asked for. In attention
the processes exchange: before it they get the whole sequence for their share of the heads, which is what a method needs
to choose keys for a query, and after it their tokens again for all heads. Ring attention leaves the queries where they
are and hands keys around, so no process ever sees what a query could read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_dispatch import (
    SeqAllToAllDim,
    all_to_all_single_any_o_async,
    all_to_all_single_any_qkv_async,
)
from torch import Tensor

__all__ = ["Ulysses", "refusal"]


@dataclass(frozen=True)
class Ulysses:
    """The exchange of one parallel config.

    Attributes:
        group: Process group.
        rank: Of this process in it.
        size: Processes.
        uneven: Whether shares may differ in size (``ulysses_anything``), which has no gradient.
    """

    group: Any
    rank: int
    size: int
    uneven: bool

    @classmethod
    def of(cls, config: Any) -> Ulysses | None:
        """From a ``ParallelConfig`` that ``refusal`` has nothing against; None for None."""
        if config is None:
            return None
        context = config.context_parallel_config
        mesh = context._ulysses_mesh
        return cls(mesh.get_group(), mesh.get_local_rank(), context.ulysses_degree, context.ulysses_anything)

    def gather(self, x: Tensor) -> Tensor:
        """``[B, share of S, H, D]`` to ``[B, S, share of H, D]``.

        Raises:
            ValueError: The processes do not divide the heads.
        """
        if self.uneven:
            return all_to_all_single_any_qkv_async(x, self.group)()
        if x.shape[2] % self.size:
            raise ValueError(
                f"ulysses_degree must divide the {x.shape[2]} heads; got {self.size}. Set ulysses_anything=True"
            )
        return SeqAllToAllDim.apply(self.group, x, 2, 1)

    def scatter(self, x: Tensor, like: Tensor) -> Tensor:
        """``[B, S, share of H, D]`` to the share of the tokens and the heads of ``like [B, share of S, H, D]``."""
        if self.uneven:
            return all_to_all_single_any_o_async(x, self.group, NUM_QO_HEAD=like.shape[2], Q_S_LOCAL=like.shape[1])()
        return SeqAllToAllDim.apply(self.group, x, 1, 2)

    def share(self, table: Tensor, dim: int) -> Tensor:
        """This process's tokens, as diffusers splits them."""
        return table.tensor_split(self.size, dim)[self.rank]


def refusal(config: Any, method: str) -> str | None:
    """Why a method does not run under this parallel config; None if it does."""
    advice = "Detach first (handle.detach()), or take ContextParallelConfig(ulysses_degree=...)"
    context = getattr(config, "context_parallel_config", None)
    if context is None:
        return f"{method} attention does not run under tensor parallelism, which splits each layer's heads. {advice}"
    if context.ring_degree > 1:
        return (
            f"{method} attention does not run under ring attention, where a process never has all keys of a query and "
            f"so cannot choose among them. {advice}"
        )
    return None
