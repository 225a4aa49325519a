"""The interpreted tests of every op, in two processes with TRITON_INTERPRET=1 that two workers can run at once.

The variable is read when a kernel is decorated, so a process runs all its Triton kernels interpreted or none. Tests
marked ``interpret`` are left out of the normal session and run here.
"""

from pathlib import Path

import pytest
from hone_core.testing import run_interpreted

HERE = Path(__file__).parent
OPS = sorted(
    {
        file.relative_to(HERE).parts[0]
        for file in HERE.glob("*/**/test_*.py")
        if "mark.interpret" in file.read_text(encoding="utf-8")
    }
)
# A process costs some seconds before its first test; these two take about the same time.
HALVES = [["attention_fp8"], [op for op in OPS if op != "attention_fp8"]]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ops", HALVES, ids="+".join)
def test_interpreted(ops):
    first, *others = (str(HERE / op) for op in ops)
    assert run_interpreted(first, *others, "-n", "0") > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interpreted_slow():
    assert run_interpreted(HERE, "-n", "0", "-m", "interpret and slow and not gpu") > 0
