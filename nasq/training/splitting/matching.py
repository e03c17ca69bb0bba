"""How much two options of a choice disagree about the weights they share.

Source: gradient-matching few-shot NAS (Hu et al., ICLR 2022, arXiv 2203.15207), score of section 3. For each repetition one
batch and one context (a random subnet) are drawn; each option of each choice is put into that same context, and the
gradients of the weights that both options use are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasq.elastic.base import Container, elastic_modules
from nasq.errors import InputError, TrainingError
from nasq.training.splitting.prefix import Prefix
from nasq.training.untouched import untouched

if TYPE_CHECKING:
    from nasq.space import Option, SearchSpace, Subnet
    from nasq.supernet import Supernet

__all__ = ["Matching", "gradient_distances"]

_EPS = 1e-6
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Matching:
    """Mean gradient distances of the options of some choices.

    Attributes:
        distances: Choice name to float64 ``[options, options]``: ``1 - cosine``, from 0 to 2; rows in the order of the
            options that the space still has.
        passes: Forward and backward passes used.
    """

    distances: Mapping[str, NDArray[np.float64]]
    passes: int


class _Shared:
    """The weights on which two options of one choice are compared."""

    def __init__(self, supernet: Supernet, choice: str) -> None:
        left_out: set[int] = set()
        sliced: set[int] = set()
        for _, module in elastic_modules(supernet.module):
            if all(own.name != choice for own in module.own_choices):
                continue
            if isinstance(module, Container) and module.layout == "parallel":
                # Alternatives share nothing with each other; what they hold would only drive all distances up.
                left_out.update(id(parameter) for parameter in module.parameters())
            elif not isinstance(module, Container):
                sliced.update(id(parameter) for parameter in module.parameters(recurse=False))
        kept = [
            parameter
            for parameter in supernet.parameters()
            if parameter.requires_grad and id(parameter) not in left_out
        ]
        self.whole = [parameter for parameter in kept if id(parameter) not in sliced]
        self.sliced = [parameter for parameter in kept if id(parameter) in sliced]

    def take(self, gradients: Mapping[int, Tensor]) -> list[list[Tensor | None]]:
        """The gradients of the weights used whole, and of those whose active slice depends on the choice."""
        return [[gradients.get(id(parameter)) for parameter in part] for part in (self.whole, self.sliced)]


def _whole_products(found: Sequence[Sequence[Tensor | None]], parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Dot products ``[i, j]`` of every two options, and squared norms of ``i`` on the weights that ``j`` uses too."""
    dense = torch.stack(
        [
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for g, p in zip(one, parameters, strict=True)
                ]
            )
            for one in found
        ]
    )
    has = torch.tensor([[g is not None for g in one] for one in found], dtype=torch.float64)
    norms = torch.zeros_like(has)
    for row, one in zip(norms, found, strict=True):
        present = [g for g in one if g is not None]
        if present:
            row[[g is not None for g in one]] = torch.stack(torch._foreach_norm(present)).double().cpu()
    return (dense @ dense.T).double().cpu(), norms.square() @ has.T


def _sliced_products(found: Sequence[Sequence[Tensor | None]]) -> tuple[Tensor, Tensor]:
    """The same on the slices that both of two options use."""
    count = len(found)
    dots, squares = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)
    for i, one in enumerate(found):
        for j, other in enumerate(found):
            for x, y in zip(one, other, strict=True):
                if x is None or y is None:
                    continue
                # Outside its own slice an option's gradient is exactly zero: that is not part of what they share.
                both = (x != 0) & (y != 0)
                x, y = x[both], y[both]
                dots[i, j] += float(x @ y)
                squares[i, j] += float(x @ x)
    return dots, squares


def _gradients(
    supernet: Supernet, subnet: Mapping[str, Option], batch: Batch, loss: Callable[[Tensor, Tensor], Tensor]
) -> dict[int, Tensor]:
    supernet.zero_grad(set_to_none=True)
    with supernet.activate(subnet):
        value = loss(supernet(batch[0]), batch[1])
        value.backward(retain_graph=True)  # type: ignore[no-untyped-call]  # other variants share its beginning
    if not bool(torch.isfinite(value.detach())):
        raise TrainingError(
            f"the loss is {float(value.detach())} while options are compared in the subnet {dict(subnet)}"
        )
    return {id(parameter): parameter.grad for parameter in supernet.parameters() if parameter.grad is not None}


def _variants(space: SearchSpace, context: Subnet, choice: str) -> list[Subnet]:
    """The context with each option of a choice; choices that become active have their default."""
    names, base = space.positions, space.to_rows([context])[0]
    column = names[choice]
    rows = np.repeat(base[None], len(space.choices[column].options), axis=0)
    rows[:, column] = np.arange(len(rows))
    return space.to_subnets(space.canonical(rows))


def gradient_distances(
    supernet: Supernet,
    batches: Callable[[int], Batch],
    contexts: Callable[[int], Subnet],
    choices: Sequence[str] | None = None,
    *,
    space: SearchSpace | None = None,
    repetitions: int = 100,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> Matching:
    """Mean distances ``1 - cosine`` between the gradients of every two options of ``choices``.

    All choices of a repetition share one batch and one context, so the pass of the context itself is made once: 25
    passes instead of 30 for six edges with five operators. What runs before the first layer that a choice decides is computed
    once as well (:class:`nasq.training.splitting.prefix.Prefix`): half of all layers where each has a choice. A choice that
    is not active in a context skips it. Two options of which one has no gradient at all (it cuts the network) have
    distance 1.

    Weights, gradients, BatchNorm statistics and random states are left as they were. BatchNorm normalises by the batch,
    as in training.

    Args:
        supernet: Whose weights are asked.
        batches: Repetition (from 0) to ``(inputs [n, ...], labels [n])``.
        contexts: Repetition to a subnet of ``space``.
        choices: Names; ``None`` for all with at least two options.
        space: What is still allowed, for a supernet that was split already; by default all of it.
        repetitions: How many batches and contexts, 1 or more.
        loss: ``(outputs, labels)`` to a 0-d tensor.

    Raises:
        InputError: A choice is unknown, has one option, or was active in no context.
        TrainingError: A loss is not finite.
    """
    space = space or supernet.space
    names = [choice.name for choice in space.choices if len(choice.options) > 1] if choices is None else list(choices)
    _check(space, names, repetitions)
    shared = {name: _Shared(supernet, name) for name in names}
    sums = {name: np.zeros((len(space[name].options),) * 2) for name in names}
    seen = dict.fromkeys(names, 0)
    prefix, passes = Prefix(supernet), 0
    with untouched(supernet):
        supernet.train()
        for repetition in range(repetitions):
            batch, context = batches(repetition), contexts(repetition)
            with prefix.record():
                known = _gradients(supernet, context, batch, loss)
            passes += 1
            for name in names:
                if name not in context:
                    continue
                found = []
                for variant in _variants(space, context, name):
                    gradients = known
                    if variant != context:
                        with prefix.reuse({key for key, _ in context.items() ^ variant.items()}):
                            gradients = _gradients(supernet, variant, batch, loss)
                        passes += 1
                    found.append(shared[name].take(gradients))
                sums[name] += _matrix(shared[name], found)
                seen[name] += 1
    idle = [name for name in names if not seen[name]]
    if idle:
        raise InputError(
            f"the choice {idle[0]!r} was active in none of {repetitions} contexts, so its options cannot be compared. Raise "
            "the repetitions, or leave it out of the choices to split."
        )
    return Matching({name: sums[name] / seen[name] for name in names}, passes)


def _matrix(shared: _Shared, found: Sequence[list[list[Tensor | None]]]) -> NDArray[np.float64]:
    """``1 - cosine`` of every two options; 1 where one of them has no gradient."""
    dots, squares = _sliced_products([one[1] for one in found])
    if shared.whole:
        more = _whole_products([one[0] for one in found], shared.whole)
        dots, squares = dots + more[0], squares + more[1]
    scale = (squares * squares.T).sqrt()
    distance = torch.where(scale > 0, 1 - dots / (scale + _EPS), torch.ones_like(dots))
    distance = (distance + distance.T) / 2  # a matrix product rounds its two halves differently
    distance.fill_diagonal_(0.0)
    result: NDArray[np.float64] = distance.numpy()
    return result


def _check(space: SearchSpace, names: Sequence[str], repetitions: int) -> None:
    if repetitions < 1:
        raise InputError(f"repetitions is {repetitions}; allowed: 1 or more")
    ruled = set() if space.rules is None else {choice.name for choice in space.rules.choices}
    for name in names:
        if name in ruled:
            raise InputError(
                f"the choice {name!r} is under the rules {space.rules and space.rules.name!r}: beside the others' options, "
                "not every one of its own is valid, so they cannot be compared. Choose another choice."
            )
        if len(space[name].options) < 2:
            raise InputError(
                f"the choice {name!r} has one option left, {space[name].options[0]!r}: there is nothing to split. Choose "
                "another one."
            )
