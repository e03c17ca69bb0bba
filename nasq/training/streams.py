"""One random stream per purpose, all of them derived from one seed."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["stream"]


def stream(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for ``purpose``: the same for the same seed, independent of every other purpose.

    Because each purpose draws from its own stream, switching one thing off (say augmentation) leaves what the others
    draw as it was.

    Args:
        seed: The run's seed.
        purpose: What the stream is for: ``"paths"``, ``"data"``, ``"augmentation"``, ...
    """
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
