"""Search spaces as canonical JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from nasq.errors import ArtifactError
from nasq.files import strict_json
from nasq.space.choice import Choice
from nasq.space.conditions import Condition
from nasq.space.rules import SpaceRules, describe

if TYPE_CHECKING:
    from nasq.space.space import SearchSpace

__all__ = ["SCHEMA", "dump", "parse"]

SCHEMA = 1


def dump(space: SearchSpace) -> str:
    """Canonical JSON: equal spaces give equal text."""
    choices = [
        {"name": choice.name, "options": list(choice.options), "default": choice.default, "ordered": choice.ordered}
        for choice in space.choices
    ]
    conditions = {
        name: [
            [[parent, [o for o in space[parent].options if o in options]] for parent, options in use] for use in uses
        ]
        for name, uses in space.conditions.items()
    }
    value = {"schema": SCHEMA, "name": space.name, "choices": choices, "conditions": conditions}
    if space.rules is not None:
        value["rules"] = describe(space.rules)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse(text: str, rules: SpaceRules | None) -> tuple[list[Choice], dict[str, list[Condition]], str]:
    """Choices, conditions and name from what :func:`dump` wrote.

    Raises:
        ArtifactError: The text is corrupt, of a newer schema, or of a space with other rules.
    """
    try:
        value = strict_json(text)
        schema = value["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"a search space's JSON cannot be read ({error!r}): it is corrupt or truncated.") from error
    if type(schema) is not int or schema != SCHEMA:
        raise ArtifactError(
            f"a search space's JSON has the schema {schema!r}; this nasq reads schema {SCHEMA}. Install the nasq that "
            "wrote it, or a newer one."
        )
    _check_rules(value.get("rules"), rules)
    try:
        return [_choice(item) for item in value["choices"]], _conditions(value["conditions"]), str(value["name"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"a search space's JSON is not valid: {error!r}") from error


def _check_rules(written: Any, rules: SpaceRules | None) -> None:
    given = None if rules is None else describe(rules)
    if written == given:
        return
    names = [value.get("name") if isinstance(value, dict) else value for value in (written, given)]
    raise ArtifactError(
        f"a search space's JSON was written with the rules {names[0]!r}, and {names[1]!r} were given. Rules are code: "
        "pass those of its network, SearchSpace.from_json(text, rules=network.space_rules())."
    )


def _choice(item: dict[str, Any]) -> Choice:
    return Choice(item["name"], item["options"], default=item["default"], ordered=item["ordered"])


def _conditions(value: dict[str, Any]) -> dict[str, list[Condition]]:
    return {
        name: [tuple((parent, frozenset(options)) for parent, options in use) for use in uses]
        for name, uses in value.items()
    }
