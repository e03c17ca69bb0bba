"""What every module that may hold choices knows: its active options, its parts, and how to become a plain module.

An elastic module stores shared weights for its largest form. Which options are active is kept in ``active``, a mapping
that all elastic modules of one supernet share (see :func:`share_active`); a choice that is absent from it has its
default. Elastic modules never decide what is active: only the supernet does.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from nasq.errors import InputError, NasqError
from nasq.space import Choice, Expression, Option, choices_of, value_of

__all__ = [
    "Condition",
    "Container",
    "ElasticModule",
    "Misfit",
    "Size",
    "elastic_modules",
    "evaluating",
    "extract",
    "refused_shape",
    "share_active",
    "share_mixture",
]

_T = TypeVar("_T")

Size = int | Expression
Condition = tuple[tuple[str, frozenset[Option]], ...]


class Misfit(InputError):
    """A layer was given an input of another size than it takes."""


_SHAPES = re.compile(r"\b(sizes?|shapes?|channels|dimensions?|unbatched|spatial)\b", re.IGNORECASE)


def refused_shape(name: str, inputs: Sequence[Any], error: Exception) -> Misfit | None:
    """What torch's refusal of a network's inputs means, if it is about shapes: torch has no exception for that.

    Args:
        name: Of the network.
        inputs: What it was given.
        error: What it raised.
    """
    if isinstance(error, NasqError | torch.OutOfMemoryError) or not _SHAPES.search(str(error)):
        return None
    shapes = ", ".join(str(list(x.shape)) for x in inputs if isinstance(x, Tensor))
    return Misfit(
        f"the network {name!r} cannot run on an input of shape {shapes}: {str(error).splitlines()[0]} Give inputs of the "
        "shape that it was built for. If they have it, two of its layers disagree: nasq.cost.CostModel(supernet, example) "
        "names both."
    )


class ElasticModule(nn.Module):
    """A module whose computation may depend on choices.

    Subclasses store sizes as given (an int, a :class:`~nasq.Choice` or an expression of choices), list them with
    :meth:`holds`, and implement :meth:`extract`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: dict[str, Option] = {}
        self.mixture: dict[str, Tensor] = {}
        self.own_choices: tuple[Choice, ...] = ()

    def holds(self, *sizes: Size) -> None:
        """Declares the sizes this module reads; their choices become the module's own.

        Raises:
            InputError: Two different choices have one name.
        """
        own = {choice.name: choice for choice in self.own_choices}
        for choice in (choice for size in sizes for choice in choices_of(size)):
            known = own.setdefault(choice.name, choice)
            if known != choice:
                raise InputError(
                    f"a {type(self).__name__} holds two different choices named {choice.name!r}, with the options "
                    f"{list(known.options)} and {list(choice.options)}. Choices of one name are tied: make them equal, or "
                    "rename one."
                )
        self.own_choices = tuple(own.values())

    def value(self, size: Size) -> int:
        """The size under the active options."""
        return size if isinstance(size, int) else value_of(size, self.active)

    def option(self, choice: Choice) -> Option:
        """The active option of ``choice``."""
        return self.active.get(choice.name, choice.default)

    def misfit(self, x: Tensor, dim: int, what: str, size: int) -> None:
        """Raises where an input that an operation just refused has another size than the layer takes.

        Raises:
            Misfit: Says both sizes.
        """
        given = x.shape[dim] if -x.ndim <= dim < x.ndim else 0
        if given != size:
            raise Misfit(
                f"a {type(self).__name__} takes {size} {what}, and its input of shape {list(x.shape)} has {given}. Give "
                "inputs of the size that the network was built for, or give both layers the same choice or expression."
            )

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The plain torch module of the active options, with its own copy of the weights.

        Args:
            recurse: Extracts a submodule; for modules that hold others.
        """
        raise NotImplementedError(f"{type(self).__name__} has to implement extract()")

    def cost_parameters(self, lookup: Callable[[Size], Any]) -> Any:
        """Number of parameters of the extracted module; ``lookup`` gives a size as an int or an int64 array."""
        return 0


class Container(ElasticModule):
    """An elastic module that only decides which of its parts run on its input.

    Attributes:
        layout: ``"parallel"``: the parts are alternatives that see the same input (see :meth:`inputs_of`) and one of them
            runs;
            ``"chain"``: the parts run one after the other and some at the end may be left out.
    """

    layout: Literal["parallel", "chain"]

    def parts(self) -> list[tuple[str, nn.Module]]:
        """Every part, by its path inside the container."""
        raise NotImplementedError

    def condition(self, index: int) -> Condition:
        """What must be active for part ``index`` to run (an empty tuple: nothing)."""
        raise NotImplementedError

    def with_parts(self, parts: list[nn.Module]) -> Container:
        """A container of the same kind and choices around other parts, in the order of :meth:`parts`."""
        raise NotImplementedError

    def inputs_of(self, index: int, inputs: Sequence[_T]) -> Sequence[_T]:
        """Which of the container's inputs a part sees; for ``"parallel"`` ones."""
        return inputs

    def mixed(self, weights: Tensor, outputs: Sequence[Callable[[], Any]]) -> Any:
        """The weighted sum of the parts' outputs under a mixture of the container's choice.

        A part's weight is the sum of those of the options in which it runs; a part of weight 0 that no gradient flows to
        is not computed.

        Args:
            weights: One per option of the choice, ``[options]``.
            outputs: Computes the output of each part.
        """
        (choice,) = self.own_choices
        total: Any = None
        for index, output in enumerate(outputs):
            names = dict(self.condition(index)).get(choice.name, frozenset())
            places = [place for place, option in enumerate(choice.options) if option in names]
            weight = weights[places].sum()
            if not weights.requires_grad and not weight:
                continue
            value = weight * output()
            total = value if total is None else total + value
        if total is None:
            raise InputError(f"the mixture of {choice.name!r} has only zeros. Give one weight that is not.")
        return total


def elastic_modules(root: nn.Module) -> Iterator[tuple[str, ElasticModule]]:
    """Every elastic module below ``root`` with its path, once each."""
    for path, module in root.named_modules():
        if isinstance(module, ElasticModule):
            yield path, module


def share_mixture(root: nn.Module) -> dict[str, Tensor]:
    """Makes all elastic modules below ``root`` read one mapping of mixtures (see :meth:`Supernet.mix`), and returns it."""
    mixture: dict[str, Tensor] = {}
    for _, module in elastic_modules(root):
        module.mixture = mixture
    return mixture


def share_active(root: nn.Module) -> dict[str, Option]:
    """Makes all elastic modules below ``root`` read one mapping of active options, and returns it."""
    active: dict[str, Option] = {}
    for _, module in elastic_modules(root):
        module.active = active
    return active


@contextlib.contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Puts ``root`` into evaluation mode; afterwards every module is in the mode it was in."""
    training = [module for module in root.modules() if module.training]
    root.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _collect(module: nn.Module, memo: dict[int, Any]) -> None:
    for child in module.children():
        if id(child) in memo:
            continue
        if isinstance(child, ElasticModule):
            memo[id(child)] = child.extract(lambda part: extract(part, memo))
        else:
            _collect(child, memo)


def extract(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of ``module`` in which every elastic module is replaced by the plain module of its active options.

    The code of ``module`` itself stays as it is: only what it holds is replaced. A module that is used at several
    places stays one module.
    """
    memo = {} if memo is None else memo
    if id(module) in memo:
        found = memo[id(module)]
        assert isinstance(found, nn.Module)
        return found
    if isinstance(module, ElasticModule):
        memo[id(module)] = module.extract(lambda part: extract(part, memo))
        return memo[id(module)]  # type: ignore[no-any-return]
    _collect(module, memo)
    return copy.deepcopy(module, memo)


def no_choice_left(module: nn.Module) -> None:
    """Raises where an elastic module is still found below ``module``: a custom ``extract`` forgot it."""
    for path, _ in elastic_modules(module):
        raise InputError(
            f"the extracted network still holds an elastic module at {path!r}. Its parent's extract() has to pass it "
            "through recurse()."
        )
