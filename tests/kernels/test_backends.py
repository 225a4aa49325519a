"""What the choice of a backend costs at import, and that torch.compile still takes it for a constant."""

import subprocess
import sys

import torch
from hone_kernels import backends


def test_constants_are_marked_as_torch_marks_them():
    def probe():
        pass

    assert backends._constant(lambda: None).__dict__ == torch.compiler.assume_constant_result(probe).__dict__ != {}


def test_the_compiler_is_not_imported():
    code = "import hone_kernels.attention, sys; assert 'torch._dynamo' not in sys.modules, 'torch._dynamo is there'"
    subprocess.run([sys.executable, "-c", code], check=True)
