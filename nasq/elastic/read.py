"""Reading the search space off a module: its choices, and where each of them matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nasq.elastic.base import Condition, Container, ElasticModule
from nasq.errors import InputError
from nasq.space import Choice, SearchSpace, SpaceRules

__all__ = ["read_space", "read_space_of"]


class _Reader:
    """Collects choices and the conditions of their uses, module by module."""

    def __init__(self) -> None:
        self.choices: dict[str, Choice] = {}
        self.owner: dict[str, str] = {}
        self.uses: dict[str, list[Condition]] = {}
        self.ruled: dict[str, nn.Module] = {}

    def add(self, choice: Choice, path: str, condition: Condition) -> None:
        known = self.choices.setdefault(choice.name, choice)
        owner = self.owner.setdefault(choice.name, path)
        if known != choice:
            raise InputError(
                f"the choice {choice.name!r} has the options {list(known.options)} in {owner!r} and "
                f"{list(choice.options)} in {path!r}. Choices of one name are tied: give both the same options, or "
                "give one of them another name."
            )
        uses = self.uses.setdefault(choice.name, [])
        if condition not in uses:
            uses.append(condition)

    def rules(self) -> SpaceRules | None:
        """What the modules with ``space_rules`` return."""
        found: SpaceRules | None = None
        # An extracted network has no choices left to rule.
        for path, module in self.ruled.items() if self.choices else ():
            rules: object = module.space_rules()  # type: ignore[operator]
            if rules is not None and not isinstance(rules, SpaceRules):
                raise InputError(
                    f"space_rules() of {path or type(module).__name__!r} returned {rules!r}. It has to return a "
                    "nasq.space.SpaceRules, or None."
                )
            if found is not None and rules is not None and found.name != rules.name:
                raise InputError(
                    f"{path!r} has the rules {rules.name!r}, and another part of the network has {found.name!r}. A space "
                    "has one set of rules: let one module return rules about the choices of both."
                )
            found = found or rules
        return found

    def walk(self, module: nn.Module, path: str, condition: Condition) -> None:
        # A module used at several places is visited at each of them: it is active where any of them is.
        if callable(getattr(module, "space_rules", None)):
            self.ruled[path] = module
        if isinstance(module, ElasticModule):
            for choice in module.own_choices:
                self.add(choice, path, condition)
        if isinstance(module, Container):
            for index, (name, part) in enumerate(module.parts()):
                self.walk(part, f"{path}.{name}" if path else name, condition + module.condition(index))
            return
        for name, child in module._modules.items():
            if child is not None:
                self.walk(child, f"{path}.{name}" if path else name, condition)


def read_space(module: nn.Module, name: str = "") -> SearchSpace:
    """The search space of ``module``: choices are tied by name, conditions come from the containers they are in.

    What structure does not say comes from a module with a method ``space_rules() -> SpaceRules``.

    Raises:
        InputError: Two modules hold choices of one name with different options (names both), or two have rules.
    """
    reader = _Reader()
    reader.walk(module, "", ())
    conditions = {key: uses for key, uses in reader.uses.items() if () not in uses}
    return SearchSpace(list(reader.choices.values()), conditions, name=name, rules=reader.rules())


def read_space_of(build: Callable[[], nn.Module], name: str = "") -> SearchSpace:
    """The search space of the network that ``build`` makes, without memory for its weights where that is possible.

    Args:
        build: Makes the network. It is called again, on the default device, if it looks at its weights.
        name: For messages and files.

    Raises:
        InputError: As :func:`read_space`.
    """
    try:
        with torch.device("meta"), _Undrawn():
            return read_space(build(), name)
    except (NotImplementedError, RuntimeError):
        return read_space(build(), name)


_DRAWS = frozenset({"uniform_", "normal_", "kaiming_uniform_"})


class _Undrawn(TorchFunctionMode):
    """Draws no numbers for weights that hold none: torch does that in Python and loads its compiler for it, a second."""

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in _DRAWS:
            weight = args[0] if args else kwargs.get("tensor")
            if isinstance(weight, Tensor) and weight.is_meta:
                return weight
        return function(*args, **kwargs)
