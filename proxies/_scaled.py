"""Forward passes that never overflow: every tensor carries a power that has been taken out of it.

Positively homogeneous networks (non-negative weights, ReLU, pooling, sums) may grow by any factor from layer to layer. Where
a layer's output leaves a safe range it is divided by its largest value, and the logarithm of that number travels with the
tensor. Operations that are homogeneous pass it on; sums and concatenations bring their parts to one scale first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nasq.errors import InputError

__all__ = ["Scaling", "log_scale"]

SAFE = 1e30
"""Values beyond this, or below its reciprocal, are brought back."""


def log_scale(x: Tensor) -> float:
    """The natural logarithm of what ``x`` has to be multiplied by."""
    return float(getattr(x, "_nasq_log_scale", 0.0))


def _mark(x: Tensor, scale: float) -> Tensor:
    if scale:
        x._nasq_log_scale = scale  # type: ignore[attr-defined]
    return x


_ADDS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, torch.cat, torch.stack}
_PRODUCTS = {F.conv2d, F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__}
_SAME = {
    F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d, torch.flatten, Tensor.flatten, Tensor.view, Tensor.reshape, torch.mean, Tensor.mean, torch.sum,
    Tensor.sum, Tensor.permute, Tensor.transpose, F.pad, torch.zeros_like, Tensor.contiguous, Tensor.__getitem__,
    torch.max_pool2d, Tensor.chunk, torch.chunk, torch.split, Tensor.split, Tensor.squeeze,
    Tensor.unsqueeze, F.dropout, F.leaky_relu, Tensor.clone,
}  # fmt: skip
_QUIET = {"__get__", "size", "dim", "is_contiguous", "numel", "__len__", "detach", "isfinite"}


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)


class Scaling(TorchFunctionMode):
    """Carries scales along inside its ``with`` statement."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        scales = [log_scale(one) for one in _tensors((*args, *kwargs.values()))]
        if func in _PRODUCTS:
            return self._product(func, args, kwargs)
        if not any(scales):
            return func(*args, **kwargs)
        if func in _ADDS:
            return self._add(func, args, kwargs)
        made = func(*args, **kwargs)
        if func in _SAME:
            for one in _tensors(made):
                _mark(one, max(scales))
        elif getattr(func, "__name__", "") not in _QUIET:
            raise InputError(
                f"synflow's values grew beyond {SAFE:g} and {getattr(func, '__name__', func)!r} cannot carry their scale. "
                "Take a proxy that does not multiply through the network."
            )
        return made

    def _product(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Linear in its input; a bias is brought to the input's scale."""
        x, weight = args[:2]
        scale = log_scale(x) + log_scale(weight)
        rest = list(args[2:])
        if rest and isinstance(rest[0], Tensor):
            rest[0] = rest[0] * math.exp(-scale)
        elif isinstance(kwargs.get("bias"), Tensor):
            kwargs = {**kwargs, "bias": kwargs["bias"] * math.exp(-scale)}
        made: Tensor = func(x, weight, *rest, **kwargs)
        largest = float(made.detach().abs().max())
        if largest == 0 or 1 / SAFE < largest < SAFE:
            return _mark(made, scale)
        return _mark(made / largest, scale + math.log(largest))

    def _add(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        parts = list(_tensors(args))
        # Zeros (a branch that nothing reaches) fit any scale, the largest of all and one far below theirs alike.
        full = [one for one in parts if float(one.detach().abs().max()) > 0] or parts
        scale = max(map(log_scale, full))
        aligned = [one * math.exp(min(0.0, log_scale(one) - scale)) for one in parts]
        if isinstance(args[0], (tuple, list)):
            return _mark(func(aligned, *args[1:], **kwargs), scale)
        if len(aligned) != 2:
            raise InputError("synflow's values grew out of range where a number is added. Take another proxy.")
        return _mark(aligned[0] + aligned[1], scale)
