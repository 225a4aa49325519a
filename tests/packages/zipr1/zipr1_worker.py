"""A command that tests start in several processes, with the environment that ``torchrun`` gives them."""

import os
import sys

import torch
from hone_core.training import SharedTraining
from hone_zipr1 import cli, questions
from hone_zipr1.reinforce import Reinforcement
from torch.distributed.tensor import DTensor

if __name__ == "__main__":
    follow, advance = SharedTraining.follow, Reinforcement.advance

    def followed(self, loop, run, **options):
        """Training, and then each process's weights."""
        follow(self, loop, run, **options)
        shared = [isinstance(value, DTensor) for value in self.parts["model"]._weights.values()]
        assert any(shared) == ("--shard" in sys.argv)
        weights = self.parts["model"].state_dict()
        torch.save(weights, run.path / f"weights-{os.environ['RANK']}.pt")

    def stopping(self, step):
        """As processes that are killed before the update of that number."""
        if str(step) == os.environ.get("STOP"):
            os._exit(9)
        return advance(self, step)

    SharedTraining.follow, Reinforcement.advance = followed, stopping
    # Answers of random weights are all wrong, and would be worth the same.
    questions.is_right = lambda text, item: text == item.answer or len(text) % 2 == 0
    cli.main()
