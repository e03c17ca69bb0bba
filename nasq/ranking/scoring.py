"""Scoring a model with one or several proxies, which then share their passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nasq.errors import InputError
from nasq.ranking.copies import untouched
from nasq.ranking.passes import begin
from nasq.ranking.proxy import Batch, PassProxy, PoolProxy, Proxy

__all__ = ["combine", "expand", "score", "score_pool"]


def expand(proxies: Sequence[Proxy]) -> list[Proxy]:
    """The proxies that score a single network: those of pool proxies stand for them; each once, by name."""
    found: dict[str, Proxy] = {}
    for proxy in proxies:
        for one in expand(proxy.parts) if isinstance(proxy, PoolProxy) else [proxy]:
            found.setdefault(one.name, one)
    return list(found.values())


def _checked(proxies: Sequence[Proxy], batch: Batch) -> None:
    for proxy in proxies:
        if isinstance(proxy, PoolProxy):
            raise InputError(
                f"{proxy.name!r} compares candidates with each other, so a single network has no score. Use score_pool()."
            )
        proxy.needs.check(proxy.name, batch)


def _number(proxy: Proxy, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        shown = f"{type(value).__name__} {list(value.shape)}" if hasattr(value, "shape") else repr(value)[:80]
        raise InputError(f"the proxy {proxy.name!r} gave {shown}; a score is one number. Return a float.") from error


def score(
    proxies: Sequence[Proxy],
    model: nn.Module,
    batch: Batch,
    *,
    generator: torch.Generator | None = None,
    output: int | str | None = None,
    chunk: int | None = None,
) -> dict[str, float]:
    """The scores of one model, by the proxies' names; proxies asked for together share initialisation, data and passes.

    A score is the same whichever other proxies are asked for. NaN and infinities are returned as they are.

    Args:
        proxies: What to score with. A proxy that compares candidates needs :func:`score_pool`.
        model: As its constructor initialised it; proven to be untouched.
        batch: Normalised inputs ``[N, ...]`` and labels ``[N]`` (``None``: no labels).
        generator: For whatever is drawn; advanced by one draw. ``None``: one seeded with 0.
        output: Which element holds the logits where the model returns several.
        chunk: At most so many images at once, where nothing couples them; the scores do not depend on it.

    Raises:
        InputError: The batch lacks what a proxy needs, the model holds choices, or a proxy changed it.
    """
    _checked(proxies, batch)
    wanted = {name for proxy in proxies if isinstance(proxy, PassProxy) for name in proxy.uses}
    passes = begin(model, batch, generator, output=output, chunk=chunk, wanted=wanted)
    found: dict[str, float] = {}
    with untouched(model):
        for proxy in proxies:
            if isinstance(proxy, PassProxy):
                found[proxy.name] = _number(proxy, proxy.measure(passes))
            else:
                rng = torch.Generator().manual_seed(passes.seed)
                found[proxy.name] = _number(proxy, proxy.score(model, batch, rng))
    return found


def combine(proxies: Sequence[Proxy], values: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Adds the columns of pool proxies to those of single ones, each ``[pool]``."""
    made = dict(values)
    for proxy in proxies:
        if isinstance(proxy, PoolProxy):
            made.update(combine(proxy.parts, made))
            made[proxy.name] = proxy.combine(made)
    return made


def score_pool(
    proxies: Sequence[Proxy],
    models: Iterable[nn.Module],
    batch: Batch,
    *,
    seed: int = 0,
    output: int | str | None = None,
) -> dict[str, NDArray[np.float64]]:
    """The scores of a pool of candidates, each ``[pool]``, by name: of the proxies and of the parts they combine.

    Args:
        proxies: Single and comparing ones.
        models: The candidates; taken one after another.
        batch: As in :func:`score`.
        seed: Every candidate gets a generator seeded with it.
        output: As in :func:`score`.
    """
    single = expand(proxies)
    rows = [
        score(single, model, batch, generator=torch.Generator().manual_seed(seed), output=output) for model in models
    ]
    columns = {proxy.name: np.array([row[proxy.name] for row in rows], dtype=np.float64) for proxy in single}
    return combine(proxies, columns)
