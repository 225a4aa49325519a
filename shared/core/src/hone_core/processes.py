"""Several processes of one command, as ``torchrun`` and ``accelerate launch`` start them."""

import gc
import json
import os
from datetime import timedelta
from typing import Any, Self

__all__ = ["Processes", "load_whole_weights"]

LONG = timedelta(days=30)
"""What a process waits for another one: a video can take an hour, and a launcher ends all if one fails."""


def load_whole_weights() -> None:
    """Have every process load the weights it asks for; call it before accelerate and transformers look.

    Launched with FSDP, accelerate's default is that the first process alone reads weights and hands them out when the
    model is wrapped. Until then those of all others are zeros, and those of a model that is never wrapped stay so.
    """
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


class Processes:
    """The processes of this command, and what little they tell each other: whole JSON values, and counters.

    Make it once in a process: a second one would read what the first one was told.

    They talk through the store that the launcher's variables name, which needs no device and no process group. A
    process that runs alone has no store, and the same calls do the obvious thing.

    Attributes:
        rank: This process, from 0, which is the one that writes what belongs to the run.
        count: How many there are.
        local_rank: This process among those of its machine.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self._store: Any = None
        self._counters: dict[str, int] = {}
        self._uses: dict[str, int] = {}

    @classmethod
    def of_launcher(cls) -> Self:
        """As the launcher's environment variables say; one process where there are none."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if any(name not in os.environ for name in names):
            return cls()
        return cls(*(int(os.environ[name]) for name in names))

    @property
    def main(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def alone(self, what: str) -> None:
        """Refuse several processes, for what they would all do.

        Raises:
            ValueError: There are several.
        """
        if self.count > 1:
            raise ValueError(f"{what} runs in one process; it was launched in {self.count}. Leave the launcher out")

    def share(self, name: str, value: Any = None) -> Any:
        """The first process's value, in JSON types, in every process; the others wait for it.

        Args:
            name: Of the value; used again, it is another one.
            value: That of the first process; the others' is not looked at.
        """
        if self.count == 1:
            return value
        key = self._key(name)
        if self.main:
            self._open().set(key, json.dumps(value))
            return value
        self._open().wait([key], LONG)
        return json.loads(self._open().get(key))

    def take(self, name: str) -> int:
        """The next number of a counter that all processes share, from 0."""
        if self.count == 1:
            self._counters[name] = self._counters.get(name, -1) + 1
            return self._counters[name]
        return self._open().add(name, 1) - 1

    def wait(self, name: str) -> None:
        """Return once every process has come here.

        Args:
            name: Of the place; used again, it is another one.
        """
        if self.count > 1:
            key = self._key(name)
            if self._open().add(f"{key}/here", 1) == self.count:
                self._open().set(f"{key}/all", "1")
            self._open().wait([f"{key}/all"], LONG)

    def end(self) -> None:
        """End the process group, where the work made one, once every process is done with it.

        Its threads may else still let go of what they sent while the interpreter ends, which aborts a process that has
        done its work.
        """
        if self.count == 1:
            return
        import torch.distributed as dist

        if dist.is_initialized():
            self.wait("end")
            gc.collect()  # models that hold the group, and so its threads
            dist.destroy_process_group()

    def _key(self, name: str) -> str:
        self._uses[name] = self._uses.get(name, -1) + 1
        return f"{name}/{self._uses[name]}"

    def _open(self) -> Any:
        if self._store is None:
            import torch.distributed as dist

            store, _, _ = next(dist.rendezvous("env://", self.rank, self.count))
            self._store = dist.PrefixStore("hone", store)
        return self._store
