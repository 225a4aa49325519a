"""Test helpers: comparison with one tolerance table, GPU marks, NaN poison, gradient checks.

The names resolve lazily, because the pytest plugin beside them is imported at the start of every test session.
"""

from hone_core.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "compare": ["TOLERANCES", "Tolerance", "assert_close"],
        "disk": ["full_disk"],
        "gradients": ["gradcheck"],
        "hardware": ["no_host_sync", "requires_gpu"],
        "interpreter": ["run_interpreted"],
        "poison": ["nan_poison"],
    },
)
