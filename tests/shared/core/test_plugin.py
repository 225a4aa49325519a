"""The plugin in sessions of its own."""

import os
import subprocess
import sys

import pytest
import torch
from hone_core.testing import run_interpreted

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="checks what happens without a GPU")

GPU_FILE = """
import pytest
from hone_core.testing import requires_gpu

@requires_gpu(min_sm=90)
def test_kernel():
    assert True

@pytest.mark.gpu
def test_other():
    pytest.importorskip("no_such_module_at_all")

def test_plain():
    pass
"""

INTERPRET_FILE = """
import os
import pytest

@pytest.mark.interpret
def test_value():
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert {flag}

def test_plain():
    raise RuntimeError("belongs to the normal process")
"""


HUNG_FILE = """
import ctypes
import pytest
from hone_core.testing import hardware

hardware.missing_gpu = lambda **wanted: None

@pytest.mark.gpu
{mark}
def test_hangs_outside_python():
    lock, threads = ctypes.create_string_buffer(256), ctypes.CDLL(None)
    threads.pthread_mutex_init(lock, None)
    for _ in range(2):  # the second waits for the first, as a device that never answers is waited for
        threads.pthread_mutex_lock(lock)
"""


def session(folder, *options, timeout=None):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-P", "-m", "pytest", "--strict-markers", "-p", "no:cacheprovider", "-rs", *options]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=timeout)


@needs_no_gpu
def test_gpu_tests_skip_with_a_reason_and_fail_when_required(tmp_path):
    (tmp_path / "test_a.py").write_text(GPU_FILE)
    done = session(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 skipped" in done.stdout
    assert "needs a CUDA device; found none" in done.stdout

    required = session(tmp_path, "--require-gpu")
    assert required.returncode == 1
    assert "1 passed, 2 errors" in required.stdout
    assert "--require-gpu: skipped: needs a CUDA device; found none" in required.stdout

    deselected = session(tmp_path, "--require-gpu", "-m", "not gpu")
    assert deselected.returncode == 1
    assert "no GPU test passed" in deselected.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="locks by POSIX threads")
@pytest.mark.parametrize(
    ("mark", "limit"),
    [
        ("", "--timeout=1"),
        ("@pytest.mark.timeout(1)", "--timeout=300"),
        ("@pytest.mark.timeout(timeout=1, func_only=True, method='signal')", "--timeout=300"),
    ],
)
def test_a_gpu_test_that_hangs_outside_python_is_ended(tmp_path, mark, limit):
    (tmp_path / "test_a.py").write_text(HUNG_FILE.format(mark=mark))
    done = session(tmp_path, limit, timeout=120)
    assert done.returncode == 1
    assert "Timeout" in done.stdout + done.stderr
    assert "pthread_mutex_lock" in done.stdout + done.stderr  # where it hung


def test_run_interpreted_runs_the_marked_tests_only(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    file = tmp_path / "test_lane.py"
    file.write_text(INTERPRET_FILE.format(flag=True))
    assert run_interpreted(file, "-p", "no:cacheprovider") == 1
    file.write_text(INTERPRET_FILE.format(flag="1 == 2"))
    with pytest.raises(AssertionError, match="1 == 2"):
        run_interpreted(file, "-p", "no:cacheprovider")
    file.write_text("def test_plain():\n    pass\n")
    with pytest.raises(AssertionError, match="exited 5"):
        run_interpreted(file, "-p", "no:cacheprovider")


def test_plugin_import_is_light():
    code = "import hone_core.testing.plugin, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
