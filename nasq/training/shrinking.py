"""Progressive shrinking: the largest network first, then smaller and smaller ones beside it.

Training all subnets at once from the start harms the large ones. Progressive shrinking (Once-for-All, Cai et al. 2020,
section 3.3) makes one dimension elastic after the other, kernel, depth, expansion, each phase beginning from the weights of
the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from nasq.errors import InputError, choose_from
from nasq.training.paths import LARGEST, Path, Uniform

if TYPE_CHECKING:
    from nasq.space import Choice, Option, SearchSpace, Subnet

__all__ = ["Phase", "ProgressiveShrinking"]


@dataclass(frozen=True)
class Phase:
    """A part of the training in which more options are allowed than before.

    Attributes:
        name: Unique among the phases.
        allowed: Options that are allowed from this phase on, by the name of a choice or the last word of many choices'
            names: ``{"kernel": (5, 7)}`` stands for ``stage1.0.kernel``, ``stage1.1.kernel``, ... Empty: no more than
            before; as the first phase, the largest subnet alone.
        epochs: How long it lasts; the last phase lasts until the end.
    """

    name: str
    allowed: Mapping[str, Sequence[Option]] = field(default_factory=dict)
    epochs: int = 1


class ProgressiveShrinking(Uniform):
    """Subnets of a space that grows from phase to phase.

    A choice that some phase names has its largest option until then; one that no phase names has all of its options from
    the start. The subnets of a step are drawn uniformly from what the phase allows.

    Args:
        space: The whole space.
        generator: The stream to draw from; its state is part of the sampler's.
        phases: At least one. Their epochs are counted by :meth:`on_epoch`, or your own loop calls :meth:`on_phase`.
        paths: Subnets per step.
        largest: Whether every step begins with the largest subnet, whose outputs teach the others. (The paper's teacher
            is a copy of the largest network as it was before shrinking; here it goes on learning.)
        on_begin: Called with each phase when it begins, before its first step: the place to sort channels
            (:func:`nasq.elastic.sort_channels`). Not called when a training is resumed within the phase.

    Raises:
        InputError: There is no phase, two have one name, one lasts less than an epoch, it names a choice or an option
            that the space lacks, or forbids what an earlier one allowed.
    """

    def __init__(
        self,
        space: SearchSpace,
        generator: torch.Generator,
        phases: Sequence[Phase],
        paths: int = 1,
        largest: bool = True,
        on_begin: Callable[[Phase], None] | None = None,
    ) -> None:
        super().__init__(space, generator, paths)
        self.phases = tuple(phases)
        self.on_begin = on_begin
        _check_names(self.phases)
        self.spaces = _spaces(space, self.phases)
        self.first = [Path(space.largest(), LARGEST)] if largest else []
        self.index = -1

    @property
    def phase(self) -> Phase:
        """The phase that goes on; before the first step, the first one."""
        return self.phases[max(self.index, 0)]

    def step(self) -> list[Path]:
        """The largest subnet, if wanted, and random ones of the phase."""
        if self.index < 0:
            self._begin(0)
        inner = Uniform(self.spaces[self.index], self.generator, self.paths)
        return [*self.first, *inner.step()]

    def contains(self, subnet: Mapping[str, Option] | Subnet) -> bool:
        """Whether the phase that goes on allows ``subnet``."""
        return bool(self.spaces[max(self.index, 0)].contains(subnet))

    def on_epoch(self, epoch: int) -> None:
        """Begins the phases that start by ``epoch``, one after the other; those that have begun are not begun again."""
        starts = [0, *accumulate(phase.epochs for phase in self.phases)][:-1]
        due = sum(start <= epoch for start in starts) - 1
        while self.index < due:
            self._begin(self.index + 1)

    def on_phase(self, name: str) -> None:
        """Begins a phase at once.

        Raises:
            InputError: There is none of this name.
        """
        names = [phase.name for phase in self.phases]
        if name not in names:
            raise choose_from("phase", name, names)
        self._begin(names.index(name))

    def _begin(self, index: int) -> None:
        self.index = index
        if self.on_begin is not None:
            self.on_begin(self.phases[index])

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator and the phase."""
        return {**super().state_dict(), "index": self.index, "phases": [phase.name for phase in self.phases]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            InputError: The state is that of other phases.
        """
        names = [phase.name for phase in self.phases]
        if list(state["phases"]) != names:
            raise InputError(
                f"the state is that of the phases {', '.join(state['phases'])}, and these are {', '.join(names)}. Give the "
                "phases that the training began with."
            )
        super().load_state_dict(state)
        self.index = int(state["index"])


def _check_names(phases: Sequence[Phase]) -> None:
    names = [phase.name for phase in phases]
    if not phases or len(set(names)) < len(names):
        raise InputError(f"the phases are named {names}. Give at least one phase, each with a name of its own.")
    for phase in phases:
        if phase.epochs < 1:
            raise InputError(f"the phase {phase.name!r} lasts {phase.epochs} epochs. Give at least 1.")


def _spaces(space: SearchSpace, phases: Sequence[Phase]) -> list[SearchSpace]:
    """What each phase allows."""
    named = {choice.name for phase in phases for key in phase.allowed for choice in _meant(space, phase, key)}
    allowed: dict[str, tuple[Option, ...]] = {name: (_largest(space[name]),) for name in named}
    spaces = []
    for phase in phases:
        for key, options in phase.allowed.items():
            for choice in _meant(space, phase, key):
                allowed[choice.name] = _grown(phase, choice, allowed[choice.name], options)
        spaces.append(space.restrict(allowed))
    return spaces


def _meant(space: SearchSpace, phase: Phase, key: str) -> list[Choice]:
    """The choices that a key of ``phase.allowed`` stands for."""
    found = [choice for choice in space.choices if key in (choice.name, choice.name.rpartition(".")[2])]
    if not found:
        words = sorted({name.rpartition(".")[2] for name in space.names})
        raise choose_from(f"dimension of the phase {phase.name!r}:", key, words)
    return found


def _largest(choice: Choice) -> Option:
    return choice.options[-1] if choice.ordered else choice.default


def _grown(phase: Phase, choice: Choice, before: tuple[Option, ...], options: Sequence[Option]) -> tuple[Option, ...]:
    """The options of a choice from this phase on; an option that the space lacks is refused by ``index``."""
    grown = {choice.index(option) for option in options}
    missing = [option for option in before if choice.index(option) not in grown]
    if missing:
        raise InputError(
            f"the phase {phase.name!r} allows {list(options)} for {choice.name!r} and forbids {missing}, allowed before "
            "(the largest option always is). Give all options that are allowed from this phase on."
        )
    return tuple(choice.options[index] for index in sorted(grown))
