"""What a result was measured on: code version, Python, libraries, CPU and GPU."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["TRIED", "code_version", "environment", "installed", "untried"]

TRIED: dict[str, tuple[str, str]] = {
    "accelerate": ("1.15.0", "1.15.0"),
    "diffusers": ("0.42.1", "0.42.1"),
    "numpy": ("2.3.5", "2.4.6"),
    "peft": ("0.21.0", "0.21.2"),
    "torch": ("2.11.0", "2.14.1"),
    "torchvision": ("0.26.0", "0.29.2"),
    "transformers": ("5.17.0", "5.24.0"),
    "triton": ("3.6.0", "3.8.0"),
    "tyro": ("1.0.17", "1.0.17"),
}
"""The versions that the tests run with: the pinned set, on which everything is measured, and the newest one."""

# What results depend on most; every installed hone-* distribution is added.
_PACKAGES = ("accelerate", "diffusers", "gsplat", "jaxtyping", "numpy", "peft", "safetensors", "transformers", "triton")


def environment() -> dict[str, Any]:
    """Describe this machine and this code in JSON types.

    Returns:
        ``commit`` (None outside a checkout) and ``dirty`` (uncommitted changes to tracked files), ``python``,
        ``platform``, ``cpu``, ``cpu_count``, ``torch``, ``triton``, ``cuda`` (of the torch build), ``driver``,
        ``gpu`` (name), ``gpu_count``, ``gpu_memory_gb``, ``packages`` (name to version) and ``untried`` (see
        :func:`untried`). Absent parts are None.
    """
    import torch

    commit, dirty = code_version()
    has_gpu = torch.cuda.is_available()
    packages = {name: version for name in _PACKAGES if (version := _version(name))}
    packages |= {
        name: dist.version
        for dist in importlib.metadata.distributions()
        if (name := dist.metadata["Name"]) and name.startswith("hone-")
    }
    return {
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": _driver() if has_gpu else None,
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "gpu_count": torch.cuda.device_count() if has_gpu else 0,
        "gpu_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if has_gpu else None,
        "packages": dict(sorted(packages.items())),
        "untried": untried(),
    }


def installed(package: str, library: str) -> dict[str, Any]:
    """What every ``info`` begins with: versions of the package, the code and what it stands on, and the device.

    Args:
        package: Distribution, for example "hone-blade".
        library: Distribution whose models it attaches to, for example "diffusers".
    """
    facts = environment()
    return {
        "version": facts["packages"].get(package),
        "commit": facts["commit"],
        "python": facts["python"],
        "torch": facts["torch"],
        library: facts["packages"].get(library),
        "untried versions": facts["untried"] or "none",
        "device": facts["gpu"] or f"{facts['cpu']}, {facts['cpu_count']} cores",
    }


def untried() -> list[str]:
    """Installed versions of a minor release that is not in ``TRIED``, each with those that are."""
    return [
        f"{name} {version} (tried: {', '.join(dict.fromkeys(tried))})"
        for name, tried in TRIED.items()
        if (version := _version(name)) and _minor(version) not in map(_minor, tried)
    ]


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def code_version() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this code runs from, and whether tracked files differ from it.

    The environment variable ``HONE_COMMIT``, if it is set, is taken as the commit, and the dirty flag is then None
    (unknown): for an installed wheel, which has no checkout, and for a copy of the tree whose ``.git`` is missing or
    older than its files.
    """
    if told := os.environ.get("HONE_COMMIT"):
        return told, None
    here = Path(__file__).resolve().parent
    commit = _git(here, "rev-parse", "HEAD")
    # A wheel in a virtual environment inside somebody's own repository must not report that repository's commit.
    if commit and _git(here, "ls-files", "--error-unmatch", Path(__file__).name):
        return commit, bool(_git(here, "status", "--porcelain", "--untracked-files=no"))
    return None, None


def _git(folder: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None
