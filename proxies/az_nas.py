"""az_nas: expressivity, progressivity, trainability and complexity, by the sum of the logarithms of their ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.errors import InputError
from nasq.ranking import Needs, Passes, PassProxy, PoolProxy, Recorder, ranks

from ._initialise import kaiming
from .flops import Flops

__all__ = ["AzNas", "Expressivity", "Progressivity", "Trainability", "blocks_of"]

REFERENCE = "Lee and Ham, AZ-NAS, CVPR 2024 (arXiv 2403.19232)"
SAMPLES = 64


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a network, in order: what the outermost lists and sequences hold, where that has parts itself.

    A network without such blocks has its convolutions.
    """
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, (nn.Sequential, nn.ModuleList)) and any(list(one.children()) for one in child):
                found.extend(one for one in child if list(one.children()))
            else:
                walk(child)

    walk(model)
    return found or [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def _measured(passes: Passes) -> dict[str, float]:
    """Expressivity, progressivity and trainability, from one forward pass over noise."""
    model = passes.copy()
    kaiming(model, passes.generator("az_nas weights"))
    pairs: list[tuple[Tensor, Tensor]] = []

    def watch(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.ndim != 4 or not isinstance(inputs[0], Tensor):
            return None
        pairs.append((inputs[0], output))
        return output.clone()  # what follows may overwrite its input in place

    for block in blocks_of(model):
        block.register_forward_hook(watch)
    x = passes.noise((SAMPLES, *passes.x.shape[1:]), "az_nas input").requires_grad_(True)
    with torch.enable_grad(), Recorder({}):
        passes.run(model, x, "float")
    if not pairs:
        raise InputError("az_nas compares feature maps of blocks [N, C, H, W] and the network made none.")
    entropies = [_entropy(after.detach()) for _, after in pairs]
    rng = passes.generator("az_nas signs")
    steps = [later - earlier for earlier, later in itertools.pairwise(entropies)]
    return {
        "expressivity": sum(entropies),
        "progressivity": min(steps, default=0.0),
        "trainability": sum(_trainability(before, after, rng) for before, after in pairs) / len(pairs),
    }


def _entropy(features: Tensor) -> float:
    """Of the normalised eigenvalues of the channels' covariance."""
    rows = features.transpose(0, 1).flatten(1).double()
    rows = rows - rows.mean(1, keepdim=True)
    values = torch.linalg.eigvalsh(rows @ rows.T / rows.shape[1]).clamp_min(0)
    if not bool(values.isfinite().all()):
        return math.nan
    shares = values / values.sum().clamp_min(1e-300)
    return float(torch.special.entr(shares).sum())


def _trainability(before: Tensor, after: Tensor, rng: torch.Generator) -> float:
    """``2 - s - 1 / (s + 1e-6)``, ``s`` the largest singular value between what goes back in and what comes out."""
    signs = (torch.randint(0, 2, after.shape, generator=rng) * 2 - 1).to(after)
    if not after.requires_grad:
        return -math.inf  # nothing of the network's input is left
    found: tuple[Tensor | None, ...] = torch.autograd.grad(after, before, signs, retain_graph=True, allow_unused=True)
    back = found[0]
    if back is None:
        return -math.inf
    if back.shape == signs.shape and torch.equal(back, signs):
        return -math.inf  # nothing is learned by a block that is the identity
    if back.shape[2:] != signs.shape[2:]:
        factor = back.shape[2] // signs.shape[2]
        even = back.shape[2:] == (factor * signs.shape[2], factor * signs.shape[3])
        # Maps of odd sizes do not unshuffle; their neighbours are averaged.
        back = (
            F.pixel_unshuffle(back, factor) if even else F.adaptive_avg_pool2d(back, (signs.shape[2], signs.shape[3]))
        )
    incoming, outgoing = (one.transpose(0, 1).flatten(1).double() for one in (back, signs))
    s = float(torch.linalg.matrix_norm(incoming @ outgoing.T / outgoing.shape[1], 2))
    return 2 - s - 1 / (s + 1e-6)


class _Part(PassProxy):
    needs = Needs()
    reference = REFERENCE
    key: str

    def measure(self, passes: Passes) -> float:
        """From the pass that the parts share."""
        return float(passes.shared("az_nas", lambda: _measured(passes))[self.key])


class Expressivity(_Part):
    """The sum over blocks of the entropy of their channels' covariance."""

    name, key = "az_expressivity", "expressivity"


class Progressivity(_Part):
    """The least growth of that entropy from block to block."""

    name, key = "az_progressivity", "progressivity"


class Trainability(_Part):
    """How close the blocks' backward maps are to keeping a gradient's size, on average; an identity gives ``-inf``."""

    name, key = "az_trainability", "trainability"


class AzNas(PoolProxy):
    """``sum over the four parts of log(rank / pool size)``; the fourth is ``flops``."""

    name = "az_nas"
    needs = Needs()
    reference = REFERENCE

    def __init__(self) -> None:
        self.parts = (Expressivity(), Progressivity(), Trainability(), Flops())

    def combine(self, values: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """NaN where a part has no value."""
        return np.sum([np.log(ranks(values[part.name]) / len(values[part.name])) for part in self.parts], axis=0)  # type: ignore[no-any-return]
