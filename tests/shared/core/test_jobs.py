"""Jobs in processes side by side."""

import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from hone_core.jobs import places, run_jobs


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Other processes find the functions below by the name of this module."""
    monkeypatch.syspath_prepend(Path(__file__).parents[__name__.count(".")])


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


def test_one_worker_is_this_process(tmp_path):
    assert list(run_jobs(partial(write, tmp_path), ["a", "b"], workers=1, device="cpu")) == ["a", "b"]
    found = [(tmp_path / f"{job}.txt").read_text().split() for job in "ab"]
    assert {line[0] for line in found} == {"cpu"}
    assert {int(line[2]) for line in found} == {os.getpid()}


def test_workers_share_the_threads_and_do_every_job_once(tmp_path):
    done = list(run_jobs(partial(write, tmp_path), list("abcde"), workers=2, device="cpu"))
    assert sorted(done) == list("abcde")
    found = [(tmp_path / f"{job}.txt").read_text().split() for job in "abcde"]
    assert {line[:2] == ["cpu", str(max(1, os.cpu_count() // 2))] for line in found} == {True}
    assert os.getpid() not in {int(line[2]) for line in found}


def test_workers_run_at_the_same_time(tmp_path):
    assert sorted(run_jobs(partial(wait_for, tmp_path), ["a", "b"], workers=2, device="cpu")) == ["a", "b"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_ends_them_all(tmp_path, workers):
    jobs = ["bad", *map(str, range(20))]
    with pytest.raises(ValueError, match="this one fails"):
        list(run_jobs(partial(write_after_the_bad_one, tmp_path), jobs, workers=workers, device="cpu"))
    assert len(list(tmp_path.glob("*.txt"))) < 20


def test_workers_are_spread_over_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert places(5, "cuda") == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
    assert places(2, "cuda:1") == ["cuda:1", "cuda:1"]
    assert places(2, "cpu") == ["cpu", "cpu"]
