"""Settings of every test session, made before any test module imports torch."""

import os
import random
import sys
from pathlib import Path

import pytest

# Tests are spread over processes; more threads than cores would only slow them down.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# A test that reached for the network would pass or fail with the machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MAX_WORKERS = 4


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process per core for the whole suite or for folders of it, at most four; none for named files or GPU tests.

    A worker imports torch and diffusers anew, which costs seconds and about a gigabyte, and GPU timings want the device
    for themselves.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS or all(Path(arg).is_dir() for arg in config.args)
    wants_gpu = config.getoption("require_gpu", default=False) or "not gpu" not in config.getoption("markexpr")
    if not whole or wants_gpu:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS) if cores > 1 else 0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With ``--durations``, seconds per member too: set-up included, summed over processes."""
    if config.option.durations is None:
        return
    seconds: dict[str, float] = {}
    for report in [report for reports in terminalreporter.stats.values() for report in reports]:
        if hasattr(report, "duration"):
            parts = Path(report.nodeid.partition("::")[0]).parts[1:-1]
            member = "/".join(parts[: 2 if parts[:1] in (("packages",), ("shared",)) else 1])
            seconds[member] = seconds.get(member, 0.0) + report.duration
    terminalreporter.section("seconds per member")
    for member, total in sorted(seconds.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(f"{total:7.1f} {member}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it in this process."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
