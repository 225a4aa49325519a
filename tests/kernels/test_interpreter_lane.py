"""The interpreted tests of every op, each op in a process of its own with TRITON_INTERPRET=1.

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


@pytest.mark.timeout(900)
@pytest.mark.parametrize("op", OPS)
def test_interpreted(op):
    assert run_interpreted(HERE / op, "-n", "0") > 0
