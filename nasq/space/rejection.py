"""Sampling and changing subnets of spaces with rules: draw, keep what is valid, and give up after a bound."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError

__all__ = ["redraw", "sample_members"]

Rows = NDArray[np.int16]
Settle = Callable[[Rows], tuple[Rows, NDArray[np.bool_]]]

DRAWS = 100_000  # the sampler stops after this many draws, and 1000 more for every subnet it was asked for
TRIES = 100  # redraws of one mutation or crossover
BATCH = 65_536


def sample_members(settle: Settle, draw: Callable[[int], Rows], count: int, name: str) -> Rows:
    """``count`` canonical rows among those that ``draw(n)`` gives.

    Args:
        settle: Gives the canonical form of rows, and which of them belong to the space.
        draw: Draws rows.
        count: How many are wanted.
        name: The rules' name, for the message.

    Raises:
        InputError: Too few of a bounded number of draws belong to the space; says how many did.
    """
    found: list[Rows] = [draw(0)]
    drawn, kept, limit = 0, 0, DRAWS + 1000 * count
    while kept < count:
        if drawn >= limit:
            raise InputError(
                f"the rules {name!r} accepted {kept} of {drawn} random subnets (a rate of {kept / drawn:.2g}), and {count} "
                "were wanted. Keep more options of the choices they are about, or use rules that reject fewer."
            )
        # The rate seen so far says how many to draw; the first draw takes it to be one in two.
        rate = max(kept, 1) / max(drawn, 2)
        size = int(min(max(64, 1.1 * (count - kept) / rate), limit - drawn, BATCH))
        settled, member = settle(draw(size))
        drawn, kept = drawn + size, kept + int(member.sum())
        found.append(settled[member])
    return np.concatenate(found)[:count]


def redraw(settle: Settle, change: Callable[[NDArray[np.intp]], Rows], origin: Rows, differ: bool) -> Rows:
    """Random changes of the rows ``origin``, each drawn again until it is a member, at most 100 times; else the row stays.

    Args:
        settle: Gives the canonical form of rows, and which of them belong to the space.
        change: Draws changed forms of the rows at some positions.
        origin: The rows.
        differ: Whether a change that leads back to the row itself is drawn again as well.
    """
    rows = origin.copy()
    left = np.arange(len(rows))
    for _ in range(TRIES):
        if not len(left):
            break
        settled, done = settle(change(left))
        if differ:
            done &= (settled != origin[left]).any(axis=1)
        rows[left[done]] = settled[done]
        left = left[~done]
    return rows
