"""Jobs of ``test_jobs.py``, in a file of their own that other processes find by its name."""

import os
import time

import torch


def write(folder, job, device):
    """Leave what it was told and where it ran."""
    if job == "bad":
        raise ValueError("this one fails")
    (folder / f"{job}.txt").write_text(f"{device} {torch.get_num_threads()} {os.getpid()}")


def write_after_the_bad_one(folder, job, device):
    """As ``write``, and slowly: not before the job that fails has begun."""
    if job == "bad":
        (folder / "begun").touch()
    until = time.monotonic() + 60
    while not (folder / "begun").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    write(folder, job, device)
    time.sleep(0.2)


def wait_for(folder, job, device):
    """The first job is done when the second is, so both have to run at a time."""
    (folder / job).touch()
    until = time.monotonic() + 60
    while not ((folder / "a").exists() and (folder / "b").exists()):
        assert time.monotonic() < until
        time.sleep(0.01)
