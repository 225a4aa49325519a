"""Pytest plugin: the marks of the repository, ``--require-gpu``, the skip behind ``requires_gpu`` and its time limit.

It is imported at the start of every test session where hone-core is installed, so it imports nothing heavy.
"""

from collections.abc import Generator

import pytest

MARKS = (
    "gpu(min_sm, min_gb): needs a CUDA device (use hone_core.testing.requires_gpu)",
    "interpret: runs Triton kernels in the interpreter (own process)",
    "compile: compiles kernels ahead of time for sm_90",
    "slow: over ten seconds",
    "parity: golden values read off an author's release",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--require-gpu``."""
    parser.getgroup("hone").addoption(
        "--require-gpu",
        action="store_true",
        help="fail GPU tests that would be skipped, and fail the session if none ran (use with -m gpu)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks."""
    for mark in MARKS:
        config.addinivalue_line("markers", mark)
    if config.getoption("require_gpu"):
        config.pluginmanager.register(RequireGpu(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let a thread watch the time limit of ``gpu`` tests, whatever their limit is.

    A signal, pytest-timeout's way elsewhere, is answered between two instructions of Python, and a hung kernel holds
    the test inside ``torch.cuda.synchronize()``. The thread ends the whole session: such a device serves no other test.
    """
    if not config.pluginmanager.hasplugin("timeout"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            own = item.get_closest_marker("timeout")
            limit = own.args[:1] if own else ()
            rest = {name: value for name, value in own.kwargs.items() if name != "method"} if own else {}
            item.add_marker(pytest.mark.timeout(*limit, **rest, method="thread"), append=False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a ``gpu`` test that the machine cannot run."""
    from hone_core.testing.hardware import missing_gpu

    for mark in item.iter_markers("gpu"):
        if reason := missing_gpu(**mark.kwargs):
            pytest.skip(reason)


class RequireGpu:
    """What ``--require-gpu`` adds: a skipped GPU test fails, and so does a session in which none passed."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.passed = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Turn any skip of a ``gpu`` test into a failure, also one that the test itself asked for."""
        report = yield
        if item.get_closest_marker("gpu") and report.skipped and not hasattr(report, "wasxfail"):
            report.outcome = "failed"
            report.longrepr = f"--require-gpu: skipped: {call.excinfo.value if call.excinfo else 'no reason given'}"
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count GPU tests that passed, in the controlling process too when tests are distributed."""
        if report.when == "call" and report.passed and "gpu" in report.keywords:
            self.passed += 1

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fail a session that looks green only because it ran no GPU test."""
        is_worker = hasattr(self.config, "workerinput")
        if not (is_worker or self.passed or self.config.getoption("collectonly")) and exitstatus in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say why a session without GPU tests is red."""
        if not self.passed and not self.config.getoption("collectonly"):
            terminalreporter.write_line("--require-gpu: no GPU test passed (select them with -m gpu)", red=True)
