"""The cost volume beside one whose warped features lie in memory, forward and backward: values first, then times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from hone_core.runs import Run
from hone_core.timing import check_values, measure_interleaved
from torch import Tensor

from hone_kernels.rows import timed

from .api import sweep_planes
from .reference import sweep_planes_reference

__all__ = ["SHAPES", "bench", "parse"]

SHAPES = ("6x2x128x32x56x128", "12x2x128x32x56x128", "6x2x128x60x104x128", "6x5x128x64x64x128")
"""Views, neighbours, channels, height, width and candidates: DepthSplat at 256x448, 6 and 12 views, and at 480x832;
MVSplat at 256x256."""


def parse(text: str) -> tuple[int, int, int, int, int, int]:
    """Sizes of VIEWSxOTHERSxCHANNELSxHEIGHTxWIDTHxCANDIDATES.

    Raises:
        ValueError: It is none.
    """
    parts = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
    if len(parts) != 6 or min(parts) < 1 or parts[1] >= parts[0]:
        raise ValueError(
            "a shape is VIEWSxOTHERSxCHANNELSxHEIGHTxWIDTHxCANDIDATES, of fewer others than views, such as "
            f"6x2x128x32x56x128; got {text!r}"
        )
    return parts[0], parts[1], parts[2], parts[3], parts[4], parts[5]


def bench(run: Run, shapes: Sequence[str], *, rounds: int = 20, seed: int = 0) -> None:
    """Measure, and write rows into the run; ``memory`` is what a call holds beyond its inputs, at most.

    Args:
        run: The run, entered.
        shapes: See ``parse``.
        rounds: Timed calls of each.
        seed: Of data and order.

    Raises:
        RuntimeError: A value is wrong; no time is reported then.
    """
    for text in shapes:
        features, *rest = _inputs(*parse(text), seed, torch.device("cuda"))
        ways = _ways(rest)
        grad = torch.linspace(-1, 1, features.shape[0] * rest[3].shape[1] * features[0, 0].numel(), device="cuda")
        grad = grad.view(len(features), -1, *features.shape[2:])
        errors = _check(ways, features, grad)
        forward = {way: partial(call, features) for way, call in ways.items()}
        both = {way: partial(_gradient, call, features, grad) for way, call in ways.items()}
        for split, calls, output in (("forward", forward, grad), ("forward and backward", both, features)):
            before = torch.cuda.memory_allocated()
            with torch.no_grad():
                times = measure_interleaved(calls, warmup=2, rounds=rounds, seed=seed)
            for way, timing in times.items():
                timed(run, way, timing, split=split, error=errors.get((way, split)), shape=text, dtype="float32")
                assert timing.peak_bytes is not None
                _memory(run, way, timing.peak_bytes - before, split, text, timing.n)
            _memory(run, "output alone", output.nbytes, split, text, 1)
        del features, rest, ways, grad, forward, both
        torch.cuda.empty_cache()


def _memory(run: Run, way: str, count: int, split: str, text: str, n: int) -> None:
    labels: dict[str, str | int | float] = {"shape": text, "dtype": "float32"}
    run.row("memory", count / 2**20, unit="MiB", better="lower", n=n, variant=way, split=split, labels=labels)


def _inputs(
    views: int, others: int, channels: int, height: int, width: int, candidates: int, seed: int, device: torch.device
) -> list[Tensor]:
    """Views that see each other from a little beside, some pixels outside."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    place = torch.arange(views)[:, None]
    number = (place + 1 + torch.arange(others)) % views
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([columns, rows, torch.ones_like(rows)]).flatten(1).float()
    turn = torch.eye(3) + 0.02 * draw(views, others, 3, 3) * torch.tensor([1.0, 1.0, 0.05])[:, None]
    shift = draw(views, others, 3, 1) * torch.tensor([3.0, 3.0, 0.3])[:, None]
    inverse = torch.linspace(0.01, 1, candidates).view(1, -1, 1, 1).expand(views, -1, 1, 1)
    parts = [draw(views, channels, height, width), number, turn @ pixels, shift, inverse]
    return [part.contiguous().to(device) for part in parts]


def _ways(rest: list[Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Cost volumes of features."""
    others, ray, shift, inverse = rest

    def kernel(features: Tensor) -> Tensor:
        return sweep_planes(features, others, ray, shift, inverse, half=0.0, backend="triton")

    def torch_all(features: Tensor) -> Tensor:
        return sweep_planes_reference(features, others, ray, shift, inverse, 0.0, held=None)

    def torch_pieces(features: Tensor) -> Tensor:
        return sweep_planes_reference(features, others, ray, shift, inverse, 0.0)

    return {"triton": kernel, "torch, all at once": torch_all, "torch, in pieces": torch_pieces}


def _gradient(call: Callable[[Tensor], Tensor], features: Tensor, grad: Tensor) -> Tensor:
    features = features.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(call(features), features, grad)[0]


def _check(ways: dict[str, Callable[[Tensor], Tensor]], features: Tensor, grad: Tensor) -> dict[tuple[str, str], float]:
    """Errors over torch's of cost volumes and gradients; places in float32 move a tap's weight by about 1e-5."""
    plain = ways["torch, in pieces"]
    want, want_grad = plain(features), _gradient(plain, features, grad)
    errors = {}
    for way, call in ways.items():
        if call is not plain:
            errors[way, "forward"] = check_values(f"cost volume by {way}", call(features), want, tolerance=1e-3)
            found = _gradient(call, features, grad)
            errors[way, "forward and backward"] = check_values(f"gradient by {way}", found, want_grad, tolerance=1e-3)
    return errors
