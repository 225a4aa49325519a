"""Teacher, student and fake score.

With LoRA, student and fake score are adapters of the same frozen transformer, and the teacher is the transformer
without either, so training holds the weights once (``Trio``). Trained whole, they are three transformers
(``WholeTrio``). The attention goes with the role: the teacher's is dense, the student's sparse, the fake score's as
asked for.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .config import BladeConfig
from .lora import lora_targets
from .models import BladeHandle, attach
from .tdm import Network

__all__ = ["Adapter", "Call", "Experts", "Pair", "Role", "Trio", "WholeTrio"]

Role = Literal["teacher", "student", "fake"]

Call = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""Output of a transformer for states, times and text, each ``[B, ...]``."""


class Adapter:
    """One adapter's weights, as a part of a checkpoint.

    Args:
        model: That has it.
        name: Of it.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self.parameters = [p for key, p in model.named_parameters() if f".{name}." in key]

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors, without its name in theirs."""
        return get_peft_model_state_dict(self.model, adapter_name=self.name)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Fill them.

        Raises:
            RuntimeError: The tensors are others.
        """
        expected, given = ({key: value.shape for key, value in s.items()} for s in (self.state_dict(), state))
        if expected != given:
            raise RuntimeError(
                f"the adapter {self.name} has other tensors than the checkpoint: of another rank or model"
            )
        set_peft_model_state_dict(self.model, state, adapter_name=self.name)


class Experts(nn.Module):
    """The two transformers of Wan2.2 as one: each is called at the noise that it draws at.

    Args:
        transformer: For times from the boundary up.
        transformer_2: For times below.
        boundary: A time, ``boundary_ratio * 1000`` of the pipeline.
    """

    def __init__(self, transformer: Any, transformer_2: Any, boundary: float) -> None:
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary

    def forward(self, *, timestep: Tensor, **arguments: Any) -> Any:
        """What the transformer of the times ``[B]`` gives.

        Raises:
            ValueError: They lie on both sides of the boundary.
        """
        high = (timestep >= self.boundary).tolist()
        if len(set(high)) > 1:
            raise ValueError(f"times of one call must lie on one side of {self.boundary:g}; got {timestep.tolist()}")
        return (self.transformer if high[0] else self.transformer_2)(timestep=timestep, **arguments)

    def enable_gradient_checkpointing(self) -> None:
        """Of both."""
        self.transformer.enable_gradient_checkpointing()
        self.transformer_2.enable_gradient_checkpointing()


class Trio:
    """The three networks.

    Args:
        model: The transformer, or ``Experts``; it is frozen, and gets the adapters ``student`` and ``fake``, both
            beginning as the teacher.
        call: How it is called.
        handle: Sparse attention on it.
        rank: Of the adapters; their alpha is the rank.
        seed: Of the adapters.
        fake_sparse: Whether the fake score's attention is the student's.
    """

    def __init__(
        self, model: Any, call: Call, handle: BladeHandle, *, rank: int, seed: int, fake_sparse: bool = True
    ) -> None:
        self.model, self.call, self.handle, self.fake_sparse = model, call, handle, fake_sparse
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is meant
            torch.manual_seed(seed)
            for part in (model.transformer, model.transformer_2) if isinstance(model, Experts) else (model,):
                for name in ("student", "fake"):
                    part.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=lora_targets(part)), name)
        self.student, self.fake = Adapter(model, "student"), Adapter(model, "fake")
        for parameter in (*self.student.parameters, *self.fake.parameters):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self.layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self.dense = False
        """Whether student and fake score attend densely, as in plain TDM."""

    def switch(self, role: Role) -> None:
        """Make the transformer one of the three; it stays so, since backward computes checkpointed blocks again.

        Which parameters need gradients stays as it is (peft's own ``set_adapter`` would change it): a sharded model has
        to know it once and for all, and an adapter that is not the role's takes no part in a forward anyway.
        """
        for layer in self.layers:
            layer._disable_adapters = role == "teacher"
            if role != "teacher":
                layer._active_adapter = [role]

    @contextmanager
    def attention(self, role: Role) -> Iterator[None]:
        """The role's attention, inside the block."""
        sparse = not self.dense and (role == "student" or (role == "fake" and self.fake_sparse))
        handle = self.handle_of(role)
        with ExitStack() as stack:
            if not sparse and handle is not None:
                stack.enter_context(handle.disabled())
            yield

    def model_of(self, role: Role) -> Any:
        """What is called for a role."""
        return self.model

    def handle_of(self, role: Role) -> BladeHandle | None:
        """Sparse attention on it; None if it never has any."""
        return self.handle

    def network(self, role: Role, text: Tensor) -> Network:
        """One of the three for a batch of texts ``[B, ...]``; each call switches."""

        def run(state: Tensor, time: Tensor) -> Tensor:
            self.switch(role)
            with self.attention(role):
                return self.call(self.model_of(role), state, time, text)

        return run


class Pair(nn.Module):
    """Student and fake score, as the module that is trained.

    Args:
        student: A transformer.
        fake: Another.
    """

    def __init__(self, student: Any, fake: Any) -> None:
        super().__init__()
        self.student, self.fake = student, fake

    def enable_gradient_checkpointing(self) -> None:
        """Of both."""
        self.student.enable_gradient_checkpointing()
        self.fake.enable_gradient_checkpointing()


class WholeTrio(Trio):
    """Three transformers, student and fake score with all their weights in training.

    Args:
        teacher: It is frozen; the others begin as float32 copies of it.
        call: How they are called.
        config: Sparse attention.
        fake_sparse: Whether the fake score's attention is the student's.
    """

    def __init__(self, teacher: Any, call: Call, config: BladeConfig, *, fake_sparse: bool = True) -> None:
        self.call, self.fake_sparse, self.dense = call, fake_sparse, False
        teacher.requires_grad_(False)
        self.pair = Pair(*(copy.deepcopy(teacher).float().requires_grad_(True) for _ in range(2)))
        self.models: dict[Role, Any] = {"teacher": teacher, "student": self.pair.student, "fake": self.pair.fake}
        self.handles = {role: attach(self.models[role], config) for role in ("student", "fake")}

    def switch(self, role: Role) -> None:
        """Nothing: each has a transformer of its own."""

    def model_of(self, role: Role) -> Any:
        """What is called for a role."""
        return self.models[role]

    def handle_of(self, role: Role) -> BladeHandle | None:
        """Sparse attention on it; the teacher never has any."""
        return self.handles.get(role)
