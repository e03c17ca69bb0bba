"""A study that several processes share: an Optuna study in a storage.

One process, the coordinator, asks the algorithm and puts subnets in; workers take them out and bring values back. The study
is an ordinary Optuna study all the while: optuna-dashboard opens it, with a column for every cost and constraint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nasq.errors import ArtifactError, InputError, require
from nasq.search.objectives import Constraint, Goal
from nasq.search.results import Record
from nasq.search.storage import alone, quiet
from nasq.space import Subnet

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

    from nasq.space import SearchSpace

__all__ = ["Job", "SharedStudy", "columns_of", "record_of", "require_same"]

SCHEMA = 1
_FACTS, _RESULT, _ERROR, _LOST, _SUBNET, _GENERATION = "nasq", "result", "error", "lost", "subnet", "generation"


@dataclass(frozen=True)
class Job:
    """A subnet that a worker took.

    Attributes:
        trial: Number that the storage knows it by.
        subnet: Canonical.
        generation: Of the search that asked for it.
    """

    trial: int
    subnet: Subnet
    generation: int


def columns_of(constraints: Sequence[Constraint], space: SearchSpace, subnet: Subnet) -> dict[str, float]:
    """What a subnet has of everything that is bounded: the text of each constraint to the value it bounds."""
    rows = space.to_rows([subnet])
    return {str(constraint): float(constraint.measure(rows)[0]) for constraint in constraints}


class SharedStudy:
    """A study in a storage; see :func:`open_storage`.

    Made by :meth:`create` (the coordinator) or :meth:`join` (a worker).

    Attributes:
        storage: Where it is.
        name: Of the Optuna study.
        facts: What it is a study of: ``space`` (the fingerprint), ``objectives``, ``columns``, and what the caller added.
    """

    def __init__(self, storage: BaseStorage, name: str, identity: int, facts: Mapping[str, Any]) -> None:
        self.storage, self.name, self.facts = storage, name, facts
        self._id = identity
        self._goals = [Goal(*goal) for goal in facts["objectives"]]

    @classmethod
    def create(
        cls, storage: BaseStorage, name: str, space: SearchSpace, goals: Sequence[Goal], columns: Sequence[str],
        facts: Mapping[str, Any] | None = None,
    ) -> SharedStudy:  # fmt: skip
        """Makes the study, or opens it where it exists.

        Args:
            storage: See :func:`open_storage`.
            name: Unique in the storage.
            space: What is searched.
            goals: The objectives.
            columns: Names of all values of a subnet.
            facts: Whatever else must be equal when the study goes on, JSON-able.

        Raises:
            InputError: The storage holds a study of this name that is another one; names both.
        """
        wanted = {
            "schema": SCHEMA, "space": space.fingerprint, "objectives": [[g.name, g.unit, g.direction] for g in goals],
            "columns": list(columns), **(facts or {}),
        }  # fmt: skip
        optuna = require("optuna")
        directions = [optuna.study.StudyDirection[goal.direction.upper()] for goal in goals]
        try:
            with quiet():
                identity = storage.create_new_study(directions, name)
            storage.set_study_user_attr(identity, _FACTS, wanted)
        except optuna.exceptions.DuplicatedStudyError:
            identity = storage.get_study_id_from_name(name)
            found = storage.get_study_user_attrs(identity).get(_FACTS)
            if found is None and not storage.get_all_trials(identity, deepcopy=False):
                storage.set_study_user_attr(identity, _FACTS, wanted)  # a kill came between its two lines
            else:
                require_same(found, wanted, f"the study {name!r} in the storage")
        return cls(storage, name, identity, wanted)

    @classmethod
    def join(cls, storage: BaseStorage, name: str | None = None) -> SharedStudy:
        """Opens a study that exists; without a name, the only one there is.

        Raises:
            InputError: There is none of that name, or several to choose from; lists them.
        """
        studies = [one for one in storage.get_all_studies() if _FACTS in one.user_attrs]
        names = sorted(one.study_name for one in studies)
        chosen = [one for one in studies if name is None or one.study_name == name]
        if len(chosen) != 1:
            what = f"no study {name!r}" if name and studies else "several studies" if studies else "no study"
            listed = f"; it has: {', '.join(names)}" if names else ""
            raise InputError(
                f"the storage holds {what}{listed}. Begin one with 'nasq search RUN "
                "--storage URL', or choose one with --study NAME."
            )
        facts = chosen[0].user_attrs[_FACTS]
        if facts.get("schema") != SCHEMA:
            raise ArtifactError(
                f"the study {chosen[0].study_name!r} is of schema {facts.get('schema')!r}; this version of nasq reads "
                f"{SCHEMA}. Update nasq on both machines."
            )
        return cls(storage, chosen[0].study_name, chosen[0]._study_id, facts)

    # What the coordinator does.

    def trials(self) -> list[FrozenTrial]:
        """Everything that was ever put in, oldest first; do not change them."""
        return self.storage.get_all_trials(self._id, deepcopy=False)

    def add(self, space: SearchSpace, record: Record, constraints: Sequence[Constraint] = ()) -> None:
        """Puts in a subnet that is evaluated already."""
        values = [record.values[goal.name] for goal in self._goals]
        others = {name: value for name, value in record.values.items() if name not in self._names}
        result = {"values": dict(record.values), "seconds": record.seconds}
        self._create(
            "COMPLETE", space, record.subnet, record.generation, constraints, others | {_RESULT: result}, values
        )

    def enqueue(
        self,
        space: SearchSpace,
        subnet: Subnet,
        generation: int,
        constraints: Sequence[Constraint] = (),
        known: Mapping[str, float] | None = None,
    ) -> None:
        """Puts in a subnet for the workers, with values that are ``known`` beforehand."""
        others = {name: value for name, value in (known or {}).items() if name not in self._names}
        self._create("WAITING", space, subnet, generation, constraints, others, None)

    @property
    def _names(self) -> set[str]:
        return {goal.name for goal in self._goals}

    def _create(
        self, state: str, space: SearchSpace, subnet: Subnet, generation: int, constraints: Sequence[Constraint],
        attributes: Mapping[str, Any], values: Sequence[float] | None,
    ) -> None:  # fmt: skip
        optuna = require("optuna")
        bounded = columns_of(constraints, space, subnet)
        # What optuna calls feasible is what breaks nothing: no excess.
        pairs = zip(constraints, bounded.values(), strict=True)
        excess = [float(constraint.bound.violation(np.array([value]))[0]) for constraint, value in pairs]
        distributions = {name: optuna.distributions.CategoricalDistribution(space[name].options) for name in subnet}
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState[state], values=values, params=dict(subnet), distributions=distributions,
            user_attrs={"id": subnet.id, _SUBNET: subnet.to_json(), _GENERATION: generation, **bounded, **attributes},
            system_attrs={"constraints": excess} if excess else {},
        )  # fmt: skip
        self.storage.create_new_trial(self._id, trial)

    def give_up(self, trial: FrozenTrial, reason: str) -> bool:
        """Ends a trial whose worker is lost, so that what the worker still brings is refused; whether it was running."""
        return self._end(trial._trial_id, _LOST, reason)

    def _end(self, trial: int, key: str, reason: str) -> bool:
        optuna = require("optuna")
        try:
            self.storage.set_trial_user_attr(trial, key, reason)
            self.storage.set_trial_state_values(trial, optuna.trial.TrialState.FAIL)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        return True

    # What a worker does.

    def claim(self) -> Job | None:
        """Takes the oldest subnet that waits; no other worker gets it. ``None`` where nothing waits."""
        optuna = require("optuna")
        waiting = self.storage.get_all_trials(self._id, deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
        for trial in waiting:
            try:
                with alone(self.storage):
                    taken = self.storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.RUNNING)
            except optuna.exceptions.UpdateFinishedTrialError:
                continue
            if taken:
                attributes = trial.user_attrs
                return Job(trial._trial_id, Subnet.from_json(attributes[_SUBNET]), int(attributes[_GENERATION]))
        return None

    def finish(self, job: Job, values: Mapping[str, float], seconds: float, worker: str = "") -> bool:
        """Brings the values of a subnet back; false where somebody else got the job in the meantime."""
        optuna = require("optuna")
        result = {"values": dict(values), "seconds": seconds, "worker": worker}
        try:
            self.storage.set_trial_user_attr(job.trial, _RESULT, result)
            self.storage.set_trial_state_values(
                job.trial, optuna.trial.TrialState.COMPLETE, [values[goal.name] for goal in self._goals]
            )
        except optuna.exceptions.UpdateFinishedTrialError:
            # Its own success too, where the answer was lost on the way and the call came again.
            return self.storage.get_trial(job.trial).state.name == "COMPLETE"
        return True

    def fail(self, job: Job, reason: str) -> bool:
        """Says that a subnet cannot be evaluated; the coordinator raises it."""
        return self._end(job.trial, _ERROR, reason)

    # What both do.

    def records(self, before: int | None = None) -> list[Record]:
        """Every evaluated subnet, or those of the generations before one; each once, in a fixed order."""
        found: dict[str, Record] = {}
        for trial in self.trials():
            if trial.state.name == "COMPLETE" and (before is None or trial.user_attrs[_GENERATION] < before):
                record = record_of(trial)
                found.setdefault(record.subnet.id, record)
        return sorted(found.values(), key=lambda record: (record.generation, record.subnet.id))

    def write(self, key: str, value: Any) -> None:
        """Sets a value that all processes see."""
        self.storage.set_study_user_attr(self._id, key, value)

    def read(self) -> dict[str, Any]:
        """All values that :meth:`write` set."""
        return self.storage.get_study_user_attrs(self._id)


def record_of(trial: FrozenTrial) -> Record:
    """The record of a trial that is complete."""
    attributes = trial.user_attrs
    result = attributes[_RESULT]
    subnet = Subnet.from_json(attributes[_SUBNET])
    values = {str(name): float(value) for name, value in result["values"].items()}
    return Record(subnet, values, int(attributes[_GENERATION]), float(result["seconds"]))


def require_same(found: Any, wanted: Mapping[str, Any], what: str) -> None:
    """Refuses a study that is another one.

    Raises:
        InputError: Names the first fact that differs, with both values.
    """
    if not isinstance(found, Mapping):
        raise InputError(f"{what} was not made by nasq. Choose another name: --study NAME.")
    for key, value in json.loads(json.dumps(wanted)).items():
        if found.get(key) != value:
            named = {"space": "fingerprint", "id": "run"}.get(key, key)
            raise InputError(
                f"{what} is of another {'search space' if key == 'space' else 'search'}: its {named} is "
                f"{found.get(key)!s:.200}, yours is {value!s:.200}. Choose another name: --study NAME."
            )
