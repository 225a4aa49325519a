"""Errors that a caller can act on: each message says what was needed, what was found and what to do."""

__all__ = ["CheckpointError", "MissingExtraError", "MissingProgramError", "UnsupportedHardwareError"]


class MissingExtraError(ImportError):
    """An optional dependency is not installed.

    Args:
        extra: Name of the extra that brings it, as in ``pip install 'hone-blade[train]'``.
        package: Distribution that declares the extra, for example ``hone-blade``.
        needed_for: What the caller wanted to do, as a phrase that starts a sentence ("Training").
    """

    def __init__(self, extra: str, package: str, needed_for: str) -> None:
        self.extra, self.package, self.needed_for = extra, package, needed_for
        super().__init__(
            f"{needed_for} needs the extra {extra!r} of {package}, which is not installed. "
            f"Install it: pip install '{package}[{extra}]' "
            f"(in the workspace: uv sync --package {package} --extra {extra})."
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.extra, self.package, self.needed_for)


class MissingProgramError(ImportError):
    """A module that another program loads was imported where that program is not installed.

    Args:
        program: Distribution that loads it, for example ``lmms-eval``.
        package: Distribution that the module is of.
    """

    def __init__(self, program: str, package: str) -> None:
        self.program, self.package = program, package
        super().__init__(
            f"this module of {package} is for {program}, which is not installed and is no extra. "
            f"Install it beside: pip install {program} {package}."
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.program, self.package)


class UnsupportedHardwareError(RuntimeError):
    """The device cannot run what was asked for.

    Args:
        needed: What the operation needs, for example "the triton backend needs a CUDA device".
        found: What the machine has, for example "no CUDA device".
        use: What works instead, for example "backend='reference'".
    """

    def __init__(self, needed: str, found: str = "", use: str = "") -> None:
        self.needed, self.found, self.use = needed, found, use
        message = needed.rstrip(".")
        if found:
            message += f"; found {found.rstrip('.')}"
        super().__init__(f"{message}." + (f" Use {use.rstrip('.')}." if use else ""))

    def __reduce__(self) -> tuple:
        return type(self), (self.needed, self.found, self.use)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or not of the layout that its loader reads."""
