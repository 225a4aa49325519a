"""A command that tests start in several processes, with the environment that ``torchrun`` gives them."""

import os
from contextlib import nullcontext

import torch
from hone_blade import cli
from torch.nn.attention import SDPBackend, sdpa_kernel

if __name__ == "__main__":
    if stop := os.environ.get("STOP"):
        from hone_blade.pipelines import PipelineDistillation

        real = PipelineDistillation.update

        def update(self: PipelineDistillation) -> dict[str, float]:
            """As a process that is killed before the update of that number."""
            if self.loop.step + 1 == int(stop):
                os._exit(9)
            return real(self)

        PipelineDistillation.update = update
    # On a GPU the fast backward differs from run to run, which updates without momentum enlarge.
    with sdpa_kernel(SDPBackend.MATH) if torch.cuda.is_available() else nullcontext():
        cli.main()
