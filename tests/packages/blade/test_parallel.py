"""Two processes that share the tokens of a video by diffusers' Ulysses give what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hone_blade.config import BladeConfig
from hone_core.testing import assert_close

WORKER = Path(__file__).parents[2] / "shared" / "video" / "ulysses_worker.py"

SPARSE = BladeConfig(block=16, samples=8, max_density=0.3, pool=8)
CASES = [(SPARSE, {}), (SPARSE, {"uneven": True, "late": True}), (SPARSE, {"grad": True})]


@pytest.mark.slow
def test_two_processes_give_what_one_does(tmp_path):
    torch.save([("hone_blade.models:attach", *case) for case in CASES], tmp_path / "cases.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, tmp_path / "cases.pt", tmp_path / "found.pt"], check=True, env=environment)
    for case, found in zip(CASES, torch.load(tmp_path / "found.pt"), strict=True):
        for mine, theirs in zip(found["shared"], found["alone"], strict=True):
            assert_close(mine, theirs, atol=2e-5 * max(1.0, float(theirs.abs().max())), what=str(case))
        assert torch.equal(found["detached"][0], found["plain"][0])
        assert float((found["shared"][0] - found["plain"][0]).abs().max()) > 1e-5, case
