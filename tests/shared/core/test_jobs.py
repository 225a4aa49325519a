"""Jobs in processes side by side."""

import importlib
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from hone_core.jobs import places, run_jobs


@pytest.fixture
def work(monkeypatch):
    """The functions of ``jobs_worker.py``; a name such as ``tests.shared`` may be another distribution's."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("jobs_worker")


def test_one_worker_is_this_process(work, tmp_path):
    assert list(run_jobs(partial(work.write, tmp_path), ["a", "b"], workers=1, device="cpu")) == ["a", "b"]
    found = [(tmp_path / f"{job}.txt").read_text().split() for job in "ab"]
    assert {line[0] for line in found} == {"cpu"}
    assert {int(line[2]) for line in found} == {os.getpid()}


def test_workers_share_the_threads_and_do_every_job_once(work, tmp_path):
    done = list(run_jobs(partial(work.write, tmp_path), list("abcde"), workers=2, device="cpu"))
    assert sorted(done) == list("abcde")
    found = [(tmp_path / f"{job}.txt").read_text().split() for job in "abcde"]
    assert {line[:2] == ["cpu", str(max(1, os.cpu_count() // 2))] for line in found} == {True}
    assert os.getpid() not in {int(line[2]) for line in found}


def test_workers_run_at_the_same_time(work, tmp_path):
    assert sorted(run_jobs(partial(work.wait_for, tmp_path), ["a", "b"], workers=2, device="cpu")) == ["a", "b"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_ends_them_all(work, tmp_path, workers):
    jobs = ["bad", *map(str, range(20))]
    with pytest.raises(ValueError, match="this one fails"):
        list(run_jobs(partial(work.write_after_the_bad_one, tmp_path), jobs, workers=workers, device="cpu"))
    assert len(list(tmp_path.glob("*.txt"))) < 20


def test_workers_are_spread_over_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert places(5, "cuda") == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
    assert places(2, "cuda:1") == ["cuda:1", "cuda:1"]
    assert places(2, "cpu") == ["cpu", "cpu"]
