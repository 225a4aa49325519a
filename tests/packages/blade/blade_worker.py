"""A command that tests start in several processes, with the environment that ``torchrun`` gives them."""

import os

from hone_blade import cli

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
    cli.main()
