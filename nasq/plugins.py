"""Search spaces and proxies that are installed: found through entry points, loaded when they are used.

nasq's own members are found in the same way as those of any other package: a group of entry points (``nasq.search_spaces``
or ``nasq.proxies``), one entry point per member. Nothing is imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar

from nasq.errors import InputError, choose_from

__all__ = ["GROUPS", "SpaceInfo", "installed", "load", "search_space", "space_info"]

Group = Literal["search_spaces", "proxies"]
GROUPS: dict[Group, str] = {"search_spaces": "search space", "proxies": "proxy"}
"""The groups, with what a member of each is called in messages."""

Factory = TypeVar("Factory", bound=Callable[..., Any])


@dataclass(frozen=True)
class SpaceInfo:
    """What is known of a search space without building it.

    Attributes:
        source: Where it was published, in a few words.
        data: The data set it is meant for (see :func:`nasq.data.load`).
        input_shape: ``(C, H, W)`` of one input.
    """

    source: str
    data: str
    input_shape: tuple[int, int, int]


def search_space(*, source: str, data: str, input_shape: tuple[int, int, int]) -> Callable[[Factory], Factory]:
    """Decorates a factory of networks with what is known of its space; see :class:`SpaceInfo`."""

    def decorate(factory: Factory) -> Factory:
        factory.nasq_info = SpaceInfo(source, data, input_shape)  # type: ignore[attr-defined]
        return factory

    return decorate


def space_info(factory: Callable[..., Any]) -> SpaceInfo:
    """What :func:`search_space` recorded.

    Raises:
        InputError: The factory is not decorated.
    """
    info = getattr(factory, "nasq_info", None)
    if not isinstance(info, SpaceInfo):
        raise InputError(
            f"{getattr(factory, '__name__', factory)!r} does not say what data it is for. Decorate the factory with "
            "nasq.plugins.search_space(source=..., data=..., input_shape=...)."
        )
    return info


def installed(group: Group) -> dict[str, EntryPoint]:
    """Every installed member of a group by name.

    Raises:
        InputError: Two packages install one name; names both.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=f"nasq.{group}"):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise InputError(
                f"the {GROUPS[group]} {point.name!r} is installed twice, as {other.value} and as {point.value}. "
                "Uninstall one of the packages."
            )
    return dict(sorted(found.items()))


def load(group: Group, name: str) -> Any:
    """Imports a member.

    Raises:
        InputError: No package installs it (the nearest name is suggested), or its module cannot be imported.
    """
    members = installed(group)
    if name not in members:
        command = group.replace("search_", "")
        raise choose_from(GROUPS[group], name, members, f"'nasq {command}' lists them with their sources.")
    try:
        return members[name].load()
    except Exception as error:  # somebody else's module may raise anything while it is imported
        raise InputError(
            f"the {GROUPS[group]} {name!r} ({members[name].value}) cannot be imported: {error}. Its package may be "
            "broken or lack a dependency."
        ) from error
