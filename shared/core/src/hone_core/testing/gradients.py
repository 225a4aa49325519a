"""Gradient check in float64."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import gradcheck as torch_gradcheck
from torch.autograd.gradcheck import GradcheckError

__all__ = ["gradcheck"]


def gradcheck(fn: Callable[..., Any], *inputs: Any, eps: float = 1e-6, atol: float = 1e-6, rtol: float = 1e-4) -> None:
    """Assert that ``fn``'s analytic gradients match central differences.

    Args:
        fn: Function of the inputs; returns a tensor or a tuple of tensors.
        inputs: Floating tensors are copied to float64 and differentiated; the rest is passed as it is.
        eps: Step of the difference.
        atol: Absolute tolerance.
        rtol: Relative tolerance.

    Raises:
        AssertionError: A gradient is wrong.
        ValueError: No input is a floating tensor.
    """
    __tracebackhide__ = True

    def is_real(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point()

    if not any(map(is_real, inputs)):
        raise ValueError("gradcheck needs at least one floating tensor among the inputs")
    ready = tuple(v.detach().double().clone().requires_grad_(True) if is_real(v) else v for v in inputs)
    try:
        torch_gradcheck(fn, ready, eps=eps, atol=atol, rtol=rtol)
    except GradcheckError as error:
        raise AssertionError(str(error)) from None
