"""Independent jobs in processes side by side, over the GPUs that there are."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TypeVar

__all__ = ["places", "run_jobs"]

J = TypeVar("J")


def run_jobs(work: Callable[[J, str], object], jobs: Sequence[J], *, workers: int, device: str) -> Iterator[J]:
    """Do the jobs, so many at a time and the first ones first; yield each as soon as it is done.

    Each job should leave a file, so that a run that was cut off goes on after it. A generator that is left early starts
    no further job, and ends when those that run are done.

    Args:
        work: Does a job on a device. With several workers it goes to other processes: a function of a module, or a
            ``functools.partial`` of one, whose arguments can be pickled.
        jobs: What to do.
        workers: Processes; 1 is this one.
        device: Where. ``cuda`` with several workers is every visible GPU, each with as many workers as any other.

    Raises:
        Exception: What a job raised; jobs that were not begun are dropped.
    """
    if workers == 1:
        for job in jobs:
            work(job, device)
            yield job
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    free, left = places(workers, device)[::-1], list(jobs)[::-1]
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        running: dict[Future[None], tuple[J, str]] = {}
        try:
            while left or running:
                while left and free:
                    job, place = left.pop(), free.pop()
                    running[pool.submit(_do, work, job, place, threads)] = job, place
                ready, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    job, place = running.pop(future)
                    free.append(place)
                    future.result()
                    yield job
        finally:
            pool.shutdown(cancel_futures=True)


def places(workers: int, device: str) -> list[str]:
    """The device of each worker: with ``cuda`` the visible GPUs in turn, else ``device`` for all."""
    if device != "cuda":
        return [device] * workers
    import torch

    count = torch.cuda.device_count()
    return [f"cuda:{index % count}" for index in range(workers)]


def _do(work: Callable[[J, str], object], job: J, device: str, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    if device.startswith("cuda:"):
        # What names no device of its own, such as a stream, belongs to the job's.
        torch.cuda.set_device(device)
    work(job, device)
