"""Lazy names for a package's ``__init__``.

A console script imports ``hone_x/__init__.py`` before it can print ``--help``, so that file must not load torch.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType

__all__ = ["lazy_names"]


def lazy_names(
    package: str, names: dict[str, str | list[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Make names of submodules available on a package without importing the submodules.

    Args:
        package: ``__name__`` of the package.
        names: Submodule to the name or names that it provides, for example ``{"method": ["select_blocks"]}``. An
            empty list offers the submodule itself.

    Returns:
        ``__getattr__``, ``__dir__`` and ``__all__`` for the package's namespace.

    Example:
        ``__getattr__, __dir__, __all__ = lazy_names(__name__, {"config": "BladeConfig", "method": ["select_blocks"]})``
    """
    where: dict[str, tuple[str, bool]] = {}
    for module, provided in names.items():
        where[module] = (module, True)
        for name in [provided] if isinstance(provided, str) else provided:
            where[name] = (module, False)
    public = sorted(
        name
        for module, provided in names.items()
        for name in ([provided] if isinstance(provided, str) else provided or [module])
    )

    def getattr_lazily(name: str) -> object:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(public)}")
        module_name, is_module = where[name]
        module = importlib.import_module(f"{package}.{module_name}")
        value = module if is_module else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    class Package(ModuleType):
        def __setattr__(self, name: str, value: object) -> None:
            # Importing a submodule binds it on the package; a function of the same name wins, whichever came first.
            if not (isinstance(value, ModuleType) and name in where and not where[name][1]):
                super().__setattr__(name, value)

    sys.modules[package].__class__ = Package

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *where})

    return getattr_lazily, list_names, public
