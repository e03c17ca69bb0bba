"""One entrance for randomness: torch's generators and NumPy's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nasq.errors import InputError

if TYPE_CHECKING:
    import torch

    Rng = np.random.Generator | torch.Generator

__all__ = ["as_numpy"]


def as_numpy(rng: Rng) -> np.random.Generator:
    """A NumPy generator: ``rng`` itself, or one seeded by a single 63-bit draw from a torch generator.

    So every call on a search space advances a torch generator by exactly one draw, and its state, saved in a
    checkpoint, decides all that follows.

    Raises:
        InputError: ``rng`` is neither; a seed is no generator.
    """
    if isinstance(rng, np.random.Generator):
        return rng
    if type(rng).__module__.partition(".")[0] == "torch":
        return np.random.default_rng(_draw(rng))
    raise InputError(
        f"rng is {rng!r} of type {type(rng).__name__}. Give a generator: torch.Generator().manual_seed(0) or "
        "numpy.random.default_rng(0)."
    )


def _draw(rng: Any) -> int:
    import torch  # late: nasq.space works without torch

    if not isinstance(rng, torch.Generator):
        raise InputError(f"rng is a {type(rng).__name__}. Give a torch.Generator.")
    return int(torch.randint(0, 2**63 - 1, (1,), generator=rng, device=rng.device, dtype=torch.int64).item())
