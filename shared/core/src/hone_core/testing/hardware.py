"""``requires_gpu``: the mark and the skip in one decorator; ``no_host_sync``: a call must not wait for the GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

__all__ = ["missing_gpu", "no_host_sync", "requires_gpu"]


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the GPU raises ``RuntimeError``."""
    import torch

    with warnings.catch_warnings():
        # torch announces at every change of the mode that it does not know all such operations yet.
        warnings.filterwarnings("ignore", message="Synchronization debug mode", category=UserWarning)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def requires_gpu(min_sm: int | None = None, min_gb: float | None = None) -> pytest.MarkDecorator:
    """Mark a test that needs a GPU, and skip it where there is none that fits.

    Under ``pytest --require-gpu`` such a skip is a failure.

    Args:
        min_sm: Least compute capability as two digits, for example 90 for sm_90.
        min_gb: Least device memory in GiB.
    """
    return pytest.mark.gpu(min_sm=min_sm, min_gb=min_gb)


def missing_gpu(min_sm: int | None = None, min_gb: float | None = None) -> str | None:
    """Say what the machine lacks, or None if it fits."""
    import torch

    if not torch.cuda.is_available():
        return "needs a CUDA device; found none"
    major, minor = torch.cuda.get_device_capability()
    if min_sm is not None and major * 10 + minor < min_sm:
        return f"needs sm_{min_sm}; found sm_{major}{minor} ({torch.cuda.get_device_name()})"
    gb = torch.cuda.get_device_properties(0).total_memory / 2**30
    if min_gb is not None and gb < min_gb:
        return f"needs {min_gb:g} GiB of device memory; found {gb:.1f}"
    return None
