"""Two processes that share the tokens of a video by diffusers' Ulysses give what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hone_core.testing import assert_close
from hone_fpsattention.config import FPSAttentionConfig, Regime

WORKER = Path(__file__).parents[2] / "shared" / "video" / "ulysses_worker.py"

STAGED = FPSAttentionConfig(
    regimes=(Regime(window=(1, 1, 1)), Regime(window=(1, 3, 1), e4m3=False)),
    boundaries=(0.5,),
    tile=(2, 4, 4),
    block=64,
)
CASES = [
    (STAGED.constant(0), {}),
    (STAGED, {"times": True}),
    (STAGED.constant(1), {"uneven": True, "late": True}),
    (STAGED.constant(0), {"grad": True}),
]


@pytest.mark.slow
def test_two_processes_give_what_one_does(tmp_path):
    torch.save([("hone_fpsattention.models:attach", *case) for case in CASES], tmp_path / "cases.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, tmp_path / "cases.pt", tmp_path / "found.pt"], check=True, env=environment)
    for case, found in zip(CASES, torch.load(tmp_path / "found.pt"), strict=True):
        for mine, theirs in zip(found["shared"], found["alone"], strict=True):
            assert_close(mine, theirs, atol=2e-5 * max(1.0, float(theirs.abs().max())), what=str(case))
        assert torch.equal(found["detached"][0], found["plain"][0])
        assert float((found["shared"][0] - found["plain"][0]).abs().max()) > 1e-5, case
