"""Group progressive guidance: a step trains a high, random and a low subnet, each taught by the one before.

Source: EQ-Net (Xu et al., ICCV 2023), equations 7 and 8. There the three differ in bit-width; here in every choice of
numbers, so that the same sampler drives widths, depths and kernels of a joint space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nasq.training.paths import Path, Uniform

if TYPE_CHECKING:
    import torch

    from nasq.space import SearchSpace, Subnet

__all__ = ["HIGH", "LOW", "Guidance"]

HIGH = "high"
LOW = "low"


class Guidance(Uniform):
    """High, random ones, low (H, R, L).

    H takes the last and L the first option of every choice of numbers (bits, widths, depths), R any. All three draw the
    other choices (granularity, symmetry, operators) afresh, so that every form is trained at both ends. With
    :class:`~nasq.training.losses.PathLoss` each is taught by the one before it, and H by the labels alone.

    In a space with rules of its own H and L are its largest and smallest subnet.

    Args:
        space: Where to draw.
        generator: The stream to draw from; its state is part of the sampler's.
        paths: Random subnets between the two, 1 or more.
        low_weight: What the loss of L is multiplied by; above 1 where the low end has most to learn.

    Raises:
        InputError: ``paths`` is below 1.
    """

    def __init__(self, space: SearchSpace, generator: torch.Generator, paths: int = 1, low_weight: float = 1.0) -> None:
        super().__init__(space, generator, paths)
        self.low_weight = low_weight

    def step(self) -> list[Path]:
        """``paths + 2`` subnets."""
        middle = super().step()
        return [Path(self._end(True), HIGH), *middle, Path(self._end(False), LOW, self.low_weight)]

    def _end(self, high: bool) -> Subnet:
        space = self.space
        if space.rules is not None:
            return space.largest() if high else space.smallest()
        ordered = np.array([choice.ordered and choice.is_size for choice in space.choices], dtype=np.bool_)
        row = space.sample_batch(1, self.generator)
        ends = space.sizes - 1 if high else np.zeros_like(space.sizes)
        return space.to_subnet(space.canonical(np.where(ordered, ends, row).astype(np.int16))[0])
