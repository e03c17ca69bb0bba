"""When and how a supernet is split, and whether that can be carried out.

Source: the schedule of gradient-matching few-shot NAS (Hu et al., ICLR 2022, arXiv 2203.15207, section 3.3), and of
few-shot NAS by exhaustive split (Zhao et al., ICML 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nasq.errors import InputError, choose_from
from nasq.training.config import TrainConfig

if TYPE_CHECKING:
    from nasq.space import SearchSpace

__all__ = ["SplitPlan", "check_plan", "splittable"]


@dataclass(frozen=True)
class SplitPlan:
    """When and how a supernet is split.

    Attributes:
        epochs: After which epochs every leaf is split once more, ascending; ``()`` gives a forest of one leaf.
        groups: Leaves that one split makes; ``None`` for one per option (few-shot NAS by exhaustive split).
        repetitions: Batches and contexts in which options are compared.
        batch_size: Images in such a batch.
        choices: Names of the choices that may be split; ``None`` for all that are always active.
        restart: Whether the leaves of the last split begin again from fresh weights and train all epochs, as published;
            otherwise they go on from what they inherited.

    Raises:
        InputError: A number is out of range.
    """

    epochs: tuple[int, ...] = ()
    groups: int | None = 2
    repetitions: int = 100
    batch_size: int = 64
    choices: tuple[str, ...] | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "epochs", tuple(self.epochs))
        if any(epoch < 1 for epoch in self.epochs) or sorted(set(self.epochs)) != list(self.epochs):
            raise InputError(f"the epochs of splits are {list(self.epochs)}; allowed: 1 or more, ascending")
        for name in ("repetitions", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.groups is not None and self.groups < 2:
            raise InputError(f"groups is {self.groups}; allowed: 2 or more, or None for one leaf per option")


def _ruled(space: SearchSpace) -> set[str]:
    """The choices that a rule binds to others."""
    return set() if space.rules is None else {choice.name for choice in space.rules.choices}


def splittable(space: SearchSpace) -> list[str]:
    """The choices that every subnet has and that no rule binds to others."""
    ruled = _ruled(space)
    return [c.name for c in space.choices if c.name not in ruled and not space.conditions.get(c.name)]


def check_plan(plan: SplitPlan, config: TrainConfig, space: SearchSpace) -> None:
    """Refuses a plan that could not be carried out, before anything is trained.

    Raises:
        InputError: It splits after the last epoch, names a choice that is unknown, has one option or is under a rule, or
            has more splits than there are choices.
    """
    if not plan.epochs:
        return
    if plan.epochs[-1] >= config.epochs:
        raise InputError(
            f"the last split is after epoch {plan.epochs[-1]} of {config.epochs}: its leaves would not train. Split "
            "earlier, or train longer."
        )
    names = splittable(space) if plan.choices is None else list(plan.choices)
    for name in names:
        if name not in space.positions:
            raise choose_from("choice to split", name, space.names)
        if name in _ruled(space):
            raise InputError(
                f"the choice {name!r} is under the rules {space.rules and space.rules.name!r}, which bind it to others: its "
                "options cannot be compared one by one. Leave it out of the choices to split."
            )
    able = [name for name in names if len(space[name].options) > 1]
    if plan.choices is not None and len(able) < len(names):
        idle = space[next(name for name in names if name not in able)]
        raise InputError(
            f"the choice {idle.name!r} has one option, {idle.options[0]!r}: there is nothing to split. Leave it out of "
            "the choices to split."
        )
    if len(able) < len(plan.epochs):
        raise InputError(
            f"{len(plan.epochs)} splits are planned, and {len(able)} choices with two options or more may be split "
            f"({', '.join(able) or 'none'}). Plan fewer splits, or allow more choices."
        )
