"""Triton's interpreter needs a process of its own: the variable is read when a kernel is decorated."""

import os
import re
import subprocess
import sys
from pathlib import Path

__all__ = ["run_interpreted"]


def run_interpreted(path: str | Path, *options: str, timeout: float | None = None) -> int:
    """Run the tests marked ``interpret`` under ``path`` in a fresh pytest with ``TRITON_INTERPRET=1``.

    Args:
        path: Test file or folder.
        options: Further pytest options.
        timeout: Limit in seconds.

    Returns:
        How many tests passed.

    Raises:
        AssertionError: A test failed, or none ran. The message holds pytest's full report.
        subprocess.TimeoutExpired: It took longer than ``timeout``.
    """
    __tracebackhide__ = True
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "COV_"))}
    environment["TRITON_INTERPRET"] = "1"
    # -P: the working directory stays off sys.path, where folders such as kernels/ would pass for packages.
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        str(path),
        "-m",
        "interpret and not gpu and not slow",
        "-q",
        *options,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    if done.returncode != 0 or passed is None:
        raise AssertionError(
            f"{' '.join(command)} exited {done.returncode} with TRITON_INTERPRET=1\n{done.stdout}\n{done.stderr}"
        )
    return int(passed[1])
