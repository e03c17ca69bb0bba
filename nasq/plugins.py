"""Search spaces and proxies that are installed: found through entry points, loaded when they are used.

nasq's own members are found in the same way as those of any other package: a group of entry points (``nasq.search_spaces``
or ``nasq.proxies``), one entry point per member. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar

from nasq.errors import InputError, choose_from

__all__ = ["GROUPS", "SpaceInfo", "installed", "load", "search_space", "space_info"]

Group = Literal["search_spaces", "proxies"]
GROUPS: dict[Group, str] = {"search_spaces": "search space", "proxies": "proxy"}
"""The groups, with what a member of each is called in messages."""

Factory = TypeVar("Factory", bound=Callable[..., Any])


Shape = tuple[int, int, int]


@dataclass(frozen=True)
class SpaceInfo:
    """What is known of a search space without building it.

    Attributes:
        source: Where it was published, in a few words.
        data: The data set it is meant for (see :func:`nasq.data.load`).
        input_shape: ``(C, H, W)`` of one input.
        argument: What stands behind a colon in the space's name, as in ``timm:MODEL``; empty: nothing may.
        tiny: Keyword arguments of the factory for a member of test size: the same kinds of choices and layers, but small
            enough to be built, quantized and exported in a second.
        tiny_input_shape: ``(C, H, W)`` of one input of the test-size member.
        published: Facts of the publication in a few words, such as the size of the space and the best accuracy.
        float_only: Why the space has no integer form; empty: it has one.
    """

    source: str
    data: str
    input_shape: Shape
    argument: str = ""
    tiny: Mapping[str, Any] = field(default_factory=dict)
    tiny_input_shape: Shape = (0, 0, 0)
    published: str = ""
    float_only: str = ""

    def __post_init__(self) -> None:
        if not any(self.tiny_input_shape):
            object.__setattr__(self, "tiny_input_shape", self.input_shape)


def search_space(
    *,
    source: str,
    data: str,
    input_shape: Shape,
    argument: str = "",
    tiny: Mapping[str, Any] | None = None,
    tiny_input_shape: Shape | None = None,
    published: str = "",
    float_only: str = "",
) -> Callable[[Factory], Factory]:
    """Decorates a factory of networks with what is known of its space; see :class:`SpaceInfo`.

    Where it has an ``argument``, the text behind the colon becomes the factory's first argument.
    """
    info = SpaceInfo(
        source, data, input_shape, argument, dict(tiny or {}), tiny_input_shape or input_shape, published, float_only
    )

    def decorate(factory: Factory) -> Factory:
        factory.nasq_info = info  # type: ignore[attr-defined]
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
    """Imports a member; a search space's name may go on behind a colon (``timm:resnet18``).

    Raises:
        InputError: No package installs it (the nearest name is suggested), its module cannot be imported, or its name
            goes on where it may not.
    """
    base, colon, argument = name.partition(":")
    if colon and group == "search_spaces":
        return _with_argument(load(group, base), name, argument)
    members = installed(group)
    if name not in members:
        command = group.replace("search_", "")
        hint = f"'nasq {command}' lists them with their sources."
        if group == "search_spaces" and (name.endswith(".py") or "/" in name):
            hint = f"A network of your own is torch_module:{name}:FACTORY."
        raise choose_from(GROUPS[group], name, members, hint)
    try:
        return members[name].load()
    except Exception as error:  # somebody else's module may raise anything while it is imported
        raise InputError(
            f"the {GROUPS[group]} {name!r} ({members[name].value}) cannot be imported: {error}. Its package may be "
            "broken or lack a dependency."
        ) from error


def _with_argument(factory: Callable[..., Any], name: str, argument: str) -> Callable[..., Any]:
    """The factory with the text behind the colon as its first argument."""
    base, info = name.partition(":")[0], getattr(factory, "nasq_info", None)
    wanted = info.argument if isinstance(info, SpaceInfo) else ""
    if not wanted:
        raise InputError(f"the search space {base!r} takes nothing behind a colon, got {name!r}. Write {base!r}.")
    if not argument:
        raise InputError(f"the search space {name!r} lacks what stands behind the colon. Write {base}:{wanted}.")
    # A factory that has to look at the text first, because what it stands for says the data, does so in ``nasq_bind``.
    bind: Callable[[str], Callable[..., Any]] | None = getattr(factory, "nasq_bind", None)
    return bind(argument) if bind else functools.update_wrapper(functools.partial(factory, argument), factory)
