"""meco: how far the channels of feature maps are from being copies of each other."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from nasq.ranking import Needs, Passes, PassProxy

__all__ = ["Meco", "MecoStable", "smallest_eigenvalue"]


def smallest_eigenvalue(features: Tensor) -> float:
    """Of the correlation between channels ``[C, ...]``; undefined correlations (constant channels) count as 0."""
    rows = features.reshape(len(features), -1).double()
    matrix = torch.corrcoef(rows).reshape(len(rows), len(rows)) if rows.shape[1] > 1 else torch.zeros(1, 1)
    return float(torch.linalg.eigvalsh(matrix.nan_to_num(0.0, 0.0, 0.0))[0])


class Meco(PassProxy):
    """The sum, over all modules, of the smallest eigenvalue of the correlation between the channels of their output.

    One noise image goes through. As in the released code containers and the network itself are modules too, so the score
    depends on how modules are nested, and one that runs twice counts twice; :class:`MecoStable` depends on neither.
    """

    name = "meco"
    needs = Needs()
    reference = "Jiang et al., NeurIPS 2023"

    def counts(self, module: nn.Module) -> bool:
        """Whether a module's output is looked at."""
        return True

    def measure(self, passes: Passes) -> float:
        """On a noise image of the batch's shape."""
        outputs = passes.shared("meco", lambda: _outputs(passes))
        values = (
            passes.shared(f"meco {index}", functools.partial(smallest_eigenvalue, features))
            for index, (module, features) in enumerate(outputs)
            if self.counts(module)
        )
        return float(sum(values))


def _outputs(passes: Passes) -> list[tuple[nn.Module, Tensor]]:
    """What every module makes of a noise image, in the order of their ends, as copies: they may be changed in place."""
    model, found = passes.copy(), list[tuple[nn.Module, Tensor]]()

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim >= 2:
            found.append((module, output[0].detach().clone()))

    for module in model.modules():
        module.register_forward_hook(watch)
    with torch.no_grad():
        passes.run(model, passes.noise((1, *passes.x.shape[1:]), "meco input"), "float")
    return found


class MecoStable(Meco):
    """:class:`Meco` over convolutions alone, which any way of nesting shares. Ours."""

    name = "meco_stable"
    reference = "Jiang et al., NeurIPS 2023; restricted to convolutions"

    def counts(self, module: nn.Module) -> bool:
        """Convolutions."""
        return isinstance(module, nn.Conv2d)
