"""Quantized activations that the backward pass makes again, so that training need not keep them.

A layer's quantized input is a copy of its input on a grid: kept for the backward pass beside it, it is most of what
quantized training holds on top of plain training. Leaving it out costs little: the step size's gradient needs the same
values right after the layer's own, and finds them there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["Again", "active", "again_of", "forgetting", "recomputed"]

WORTH = 1 << 18
"""Elements from which a tensor is made again: looking after small ones takes longer than they are worth."""
_NAME = "_nasq_again"


class Again:
    """How a tensor can be made again.

    Args:
        make: Makes it, the same bits every time.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make
        self.value: Tensor | None = None
        self.version = -1

    def mark(self, tensor: Tensor) -> None:
        """Says that this is the tensor, as it is now."""
        self.version = tensor._version
        setattr(tensor, _NAME, self)

    def get(self) -> Tensor:
        """The tensor; it stays until :meth:`take`."""
        if self.value is None:
            with torch.no_grad():
                self.value = self.make()
        return self.value

    def take(self) -> Tensor | None:
        """The tensor if it is there at the moment; afterwards it is not."""
        value, self.value = self.value, None
        return value


def again_of(tensor: Tensor) -> Again | None:
    """How a tensor can be made again; ``None`` where it cannot, or was changed in place since."""
    found: Again | None = getattr(tensor, _NAME, None)
    return found if found is not None and found.version == tensor._version else None


@contextlib.contextmanager
def forgetting(x: Tensor) -> Iterator[None]:
    """Inside, an operation on ``x`` keeps how to make it instead of its values, where that is known.

    Function transforms (``torch.func``) do not work inside then.
    """
    again = again_of(x)
    if again is None:
        yield
        return
    found, looks = again, _looks(x)  # autograd keeps the function below, which must not keep x

    def pack(tensor: Tensor) -> Again | tuple[Tensor, int]:
        return found if _looks(tensor) == looks else (tensor, tensor._version)

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


def _looks(x: Tensor) -> tuple[object, ...]:
    """What tells a tensor from all others that are there at the same time."""
    return x.data_ptr(), x.dtype, x.shape, x.stride()


def _unpack(kept: Again | tuple[Tensor, int]) -> Tensor:
    if isinstance(kept, Again):
        return kept.get()
    tensor, version = kept
    if tensor._version != version:  # autograd itself does not look where tensors are packed
        raise RuntimeError(
            f"a tensor that the gradient needs, {list(tensor.shape)}, was modified by an in-place operation after it "
            f"was used (version {tensor._version}, expected {version}). Make the operation out of place."
        )
    return tensor


_ACTIVE: ContextVar[bool] = ContextVar("recomputed", default=False)


def active() -> bool:
    """Whether quantizers say how their results can be made again."""
    return _ACTIVE.get()


@contextlib.contextmanager
def recomputed(enabled: bool = True) -> Iterator[None]:
    """Inside, layers keep no large quantized activations in fp32 on a CPU; the gradients are the same bits.

    Args:
        enabled: Whether to do so, or to keep them.
    """
    token = _ACTIVE.set(enabled)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
