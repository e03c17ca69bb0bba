"""Strict fairness: every option of every choice is trained equally often in every step.

Source: FairNAS (Chu et al., ICCV 2021, arXiv 1907.01845), Lemma 2 and Algorithm 1. The baseline of that name in the
released code of PA&DA draws its permutations once per epoch, so that it trains the same few subnets for a whole epoch; here
every step draws afresh.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from nasq.errors import InputError
from nasq.space.random import as_numpy
from nasq.training.paths import RANDOM, Path, Uniform
from nasq.training.region import Region

if TYPE_CHECKING:
    from nasq.space import SearchSpace

__all__ = ["StrictFairness"]

# Steps of more paths than this would keep the weights still for too long.
_MOST = 64


class StrictFairness(Uniform):
    """One path per option in each step: the options of every choice are permuted and dealt out.

    With choices of different numbers of options a step has as many paths as their least common multiple asks for, so that
    each option of one choice is dealt equally often. A choice that is inactive in a path is not trained by it: fairness
    is strict for choices that are always active. The gradients of a step are summed before the weights move once.

    Args:
        space: Where to draw: a space, or the region of a leaf.
        generator: The stream to draw from; its state is part of the sampler's.

    Raises:
        InputError: A step would need too many paths, or the space has rules that permutations may break.
    """

    def __init__(self, space: SearchSpace | Region, generator: torch.Generator) -> None:
        whole = space.space if isinstance(space, Region) else space
        if whole.rules is not None:
            raise InputError(
                f"the space {whole.name!r} has rules of its own ({whole.rules.name}), which subnets made of permutations may "
                "break. Use uniform sampling."
            )
        allowed = space.allowed if isinstance(space, Region) else {}
        self.options = [
            np.array([choice.index(option) for option in allowed.get(choice.name, choice.options)])
            for choice in whole.choices
        ]
        paths = math.lcm(*(len(options) for options in self.options))
        if paths > _MOST:
            counts = sorted({len(options) for options in self.options})
            raise InputError(
                f"strict fairness over choices with {counts} options needs {paths} paths per step; allowed are {_MOST}. Use "
                "uniform sampling, or restrict the space."
            )
        super().__init__(whole, generator, paths)

    def step(self) -> list[Path]:
        """``paths`` subnets in which every option of a choice occurs equally often."""
        rng = as_numpy(self.generator)
        columns = [rng.permutation(np.tile(options, self.paths // len(options))) for options in self.options]
        rows = self.space.canonical(np.stack(columns, axis=1).astype(np.int16))
        return [Path(subnet, RANDOM) for subnet in self.space.to_subnets(rows)]
