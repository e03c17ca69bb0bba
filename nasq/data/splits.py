"""Stratified splits: every class keeps its share in both parts."""

from __future__ import annotations

import torch
from torch import Tensor

from nasq.errors import InputError

__all__ = ["split_size", "stratified_split"]


def split_size(size: float, total: int, name: str = "validation") -> int:
    """How many of ``total`` images a size asks for.

    Args:
        size: A share between 0 and 1 (rounded to the nearest number of images), or a number of images (int).
        total: How many images there are.
        name: What is asked for, for the error text.

    Raises:
        InputError: It asks for no image or leaves none.
    """
    is_count = isinstance(size, int) and not isinstance(size, bool)
    count = int(size) if is_count else round(size * total) if 0 < size < 1 and not isinstance(size, bool) else 0
    if not 0 < count < total:
        raise InputError(
            f"{name} is {size!r}; allowed: a share between 0 and 1, or a number of images from 1 to {total - 1}, "
            f"of the {total} that are there to split"
        )
    return count


def stratified_split(labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Splits indices in two parts in which every class has the same share, up to one image.

    The part's images are given to the classes by largest remainder, so that they sum to ``count`` exactly; at least
    one image of every class stays in the rest. Within a class the draw is uniform.

    Args:
        labels: int64 ``[N]``.
        count: Size of the part, below ``N``.
        generator: The stream to draw from.

    Returns:
        ``(part, rest)``: int64, ascending, disjoint, together all of ``0 .. N-1``.

    Raises:
        InputError: Too many images are asked for to leave one of every class.
    """
    labels = labels.cpu()
    sizes = labels.bincount()
    present = sizes.nonzero().flatten()
    shares = _apportion(sizes[present].tolist(), count)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, share in zip(present.tolist(), shares, strict=True):
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator, device=generator.device).cpu()
        chosen[members[order[:share]]] = True
    return chosen.nonzero().flatten(), (~chosen).nonzero().flatten()


def _apportion(sizes: list[int], count: int) -> list[int]:
    """Largest-remainder apportionment of ``count`` over classes of ``sizes``, at most ``size - 1`` each."""
    total = sum(sizes)
    if count > total - len(sizes):
        raise InputError(
            f"a part of {count} images does not leave one image of each of {len(sizes)} classes among {total}; "
            "ask for a smaller part or add images"
        )
    shares = [min(count * size // total, size - 1) for size in sizes]
    # Integers throughout: a remainder computed in floats would make ties depend on rounding.
    order = sorted(range(len(sizes)), key=lambda i: (-(count * sizes[i] % total), i))
    while (missing := count - sum(shares)) > 0:
        for i in [i for i in order if shares[i] < sizes[i] - 1][:missing]:
            shares[i] += 1
    return shares
