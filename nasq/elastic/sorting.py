"""Sorting channels by importance, so that the first channels, which smaller subnets use, are the best ones.

Sorting changes no function: what makes the channels and what reads them are reordered alike. Progressive shrinking does it
where a phase begins that cuts channels for the first time (Once-for-All, Cai et al. 2020).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from nasq.elastic.conv import Conv2d
from nasq.elastic.linear import Linear
from nasq.elastic.norm import BatchNorm2d
from nasq.elastic.segments import Segments
from nasq.errors import InputError

__all__ = ["sort_channels"]

_LAYERS = (Conv2d, nn.Conv2d, Linear, nn.Linear)
_NORMS = (BatchNorm2d, nn.BatchNorm2d)


@torch.no_grad()
def sort_channels(
    makers: Sequence[nn.Module],
    readers: Sequence[nn.Module],
    fixed: Sequence[int] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> Tensor:
    """Sorts the channels between some layers by the L1 norm of the weights that the first reader multiplies them with.

    Sort before :func:`nasq.quant.quantize`: step sizes of channels are not moved.

    Args:
        makers: Everything whose *output* channels they are: convolutions (depthwise ones too), linear layers, batch
            normalisations, elastic or plain.
        readers: Every convolution without groups or linear layer whose *input* channels they are.
        fixed: Widths that are in use already: the first ``fixed[0]`` channels, the first ``fixed[1]``, ... stay sets, and
            so subnets of these widths stay the same functions.
        optimizer: Its state of the moved weights (momentum) is moved with them.

    Returns:
        ``[C]``: the old place of every channel.

    Raises:
        InputError: There is no reader, a module is none of the above, the numbers of channels differ, or a width is not
            between 0 and their number.
    """
    if not readers:
        raise InputError("sort_channels got no reader, whose weights say which channels matter. Give at least one.")
    moved = [*_moved(makers, 0), *_moved(readers, 1)]
    importance = _weight(readers[0]).abs().transpose(0, 1).flatten(1).sum(1)
    for tensor, dim in moved:
        if tensor.shape[dim] != len(importance):
            raise InputError(
                f"sort_channels got layers of {len(importance)} and {tensor.shape[dim]} channels. Give only those that "
                "make or read the same channels."
            )
    order = _order(importance, fixed)
    for tensor, dim in moved:
        _move(tensor, dim, order, optimizer)
    return order


def _order(importance: Tensor, fixed: Sequence[int]) -> Tensor:
    """Decreasing importance, each part between two fixed widths for itself; equal ones keep their order."""
    count = len(importance)
    if any(not 0 <= width <= count for width in fixed):
        raise InputError(f"sort_channels got the fixed widths {list(fixed)} for {count} channels. Give 0 to {count}.")
    ends = sorted({0, count, *fixed})
    parts = [start + importance[start:end].argsort(descending=True, stable=True) for start, end in pairwise(ends)]
    return torch.cat(parts)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer, _LAYERS)
    return layer.weight


def _moved(modules: Sequence[nn.Module], dim: int) -> Iterator[tuple[Tensor, int]]:
    """The tensors to move, with the dimension of the channels."""
    for module in modules:
        tensors: list[Tensor | None]
        if isinstance(module, _LAYERS):
            if dim == 1 and isinstance(module, Conv2d | nn.Conv2d) and module.groups != 1:
                raise InputError("sort_channels got a reader with groups. Give a depthwise convolution as a maker.")
            _refuse_segments(module, dim)
            tensors = [module.weight, module.bias if dim == 0 else None]
        elif isinstance(module, _NORMS) and dim == 0:
            tensors = [module.weight, module.bias, module.running_mean, module.running_var]
        else:
            raise InputError(
                f"sort_channels cannot move the channels of a {type(module).__name__}. Give convolutions, linear layers "
                "and, as makers, batch normalisations."
            )
        yield from ((tensor, dim) for tensor in tensors if tensor is not None)


def _refuse_segments(layer: nn.Module, dim: int) -> None:
    names = ("out_channels", "out_features") if dim == 0 else ("in_channels", "in_features")
    if any(isinstance(getattr(layer, name, None), Segments) for name in names):
        raise InputError(
            "sort_channels got a layer of concatenated channels. Sort what makes each part, before it is joined."
        )


def _move(tensor: Tensor, dim: int, order: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    tensor.copy_(tensor.index_select(dim, order))
    state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
    for value in state.values():
        if isinstance(value, Tensor) and value.shape == tensor.shape:
            value.copy_(value.index_select(dim, order))
