"""A command that tests start in several processes, with the environment that ``torchrun`` gives them."""

import os

import torch
from hone_zipr1 import cli, finetune
from hone_zipr1.reinforce import Reinforcement

if __name__ == "__main__":
    follow, advance = finetune._Together.follow, Reinforcement.advance

    def followed(self, loop, run, **options):
        """Training, and then each process's weights."""
        follow(self, loop, run, **options)
        weights = self.parts["model"].state_dict()
        torch.save(weights, run.path / f"weights-{os.environ['RANK']}.pt")

    def stopping(self, step):
        """As processes that are killed before the update of that number."""
        if str(step) == os.environ.get("STOP"):
            os._exit(9)
        return advance(self, step)

    finetune._Together.follow, Reinforcement.advance = followed, stopping
    cli.main()
