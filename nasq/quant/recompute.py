"""Quantized activations that the backward pass computes again, so that training need not keep them.

A layer's quantized input is a copy of its input on a grid: kept for the backward pass beside it, it is most of what
quantized training holds on top of plain training. Leaving it out costs little: the step size's gradient needs the same
values right after the layer's own, and finds them there.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["Again", "recomputed", "session"]


class Again:
    """A tensor that is not kept, and how it is made.

    Args:
        make: Makes it, the same bits every time.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make
        self.value: Tensor | None = None

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


class _Session:
    """Which tensors of one forward pass need not be kept."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[weakref.ref[Tensor], int, Again]] = {}

    def note(self, tensor: Tensor, again: Again) -> None:
        """Says how a tensor can be made again."""
        self.known[tensor.data_ptr()] = (weakref.ref(tensor), tensor._version, again)

    def find(self, tensor: Tensor) -> Again | None:
        """How a tensor can be made again, if it can. Memory is used again: the address alone does not say which it is."""
        known = self.known.get(tensor.data_ptr())
        if known is None:
            return None
        source, version, again = known[0](), known[1], known[2]
        if source is None or tensor._version != version:
            return None
        same = source.shape == tensor.shape and source.stride() == tensor.stride() and source.dtype == tensor.dtype
        return again if same else None

    def pack(self, tensor: Tensor) -> Again | tuple[Tensor, int]:
        """What autograd keeps instead of a tensor."""
        return self.find(tensor) or (tensor, tensor._version)


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


_ACTIVE: ContextVar[_Session | None] = ContextVar("recomputed", default=None)


def session() -> _Session | None:
    """The forward pass that is being recorded, if one is."""
    return _ACTIVE.get()


@contextlib.contextmanager
def recomputed(enabled: bool = True) -> Iterator[None]:
    """Inside, a forward pass keeps no quantized activations in fp32 on a CPU; the gradients are the same bits.

    Function transforms (``torch.func``) do not work inside.

    Args:
        enabled: Whether to do anything at all.
    """
    if not enabled:
        yield
        return
    active = _Session()
    token = _ACTIVE.set(active)
    try:
        with torch.autograd.graph.saved_tensors_hooks(active.pack, _unpack):
            yield
    finally:
        _ACTIVE.reset(token)
