"""Reading targets from their data files, strictly."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from nasq.errors import InputError, choose_from
from nasq.targets.target import CONTAINER_BITS, FEATURES, MOST_BITS, OPERATORS, RUNTIMES, Target

__all__ = ["load", "names"]

_TEXTS: Mapping[str, tuple[str, ...] | None] = {
    "name": None,
    "description": None,
    "evidence": None,
    "runtime": RUNTIMES,
    "add": ("both", "one"),
    "container": ("uint8", "int8"),
}
_GRAINS = (*(FEATURES["weight_granularity"] or ()), "group")  # groups of any size
_LISTS: Mapping[str, tuple[str, ...] | None] = {**FEATURES, "operators": OPERATORS, "weight_granularity": _GRAINS}
_EXECUTION = "execution"  # among what is refused: why nasq does not run the target at all
_SWITCHES = ("exact", "packed", "executes")
_OPTIONAL = ("session", "slow", "refused", "evidence", *_SWITCHES)


def names() -> tuple[str, ...]:
    """The names of the targets that nasq ships, sorted."""
    files = resources.files("nasq.targets").iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def load(name: str) -> Target:
    """A target by its name, or from a file of your own.

    Args:
        name: One of :func:`names`, or a path that ends in ``.toml``.

    Raises:
        InputError: An unknown name, a missing file, or one that does not follow the schema; names the file and key.
    """
    if name.endswith(".toml"):
        return _read(name, _own_file(Path(name)))
    if name not in names():
        raise choose_from("target", name, names(), "A file of your own is given by its path, ending in .toml.")
    return _shipped(name)


@cache
def _shipped(name: str) -> Target:
    target = _read(f"{name}.toml", (resources.files("nasq.targets") / f"{name}.toml").read_bytes())
    assert target.name == name
    return target


def _own_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the target file {path} cannot be read: {error.strerror or error}. Give the path of a file, or one "
            f"of the names {', '.join(names())}."
        ) from error


def _read(source: str, data: bytes) -> Target:
    try:
        table = tomllib.loads(data.decode())
    except ValueError as error:
        raise InputError(f"the target file {source} is not TOML: {error}.") from error
    known = [entry.name for entry in fields(Target)]
    for key in table:
        if key not in known:
            raise choose_from(f"key in the target file {source}:", key, known)
    missing = [key for key in known if key not in table and key not in _OPTIONAL]
    if missing:
        raise InputError(f"the target file {source} lacks {', '.join(map(repr, missing))}. Every target needs them.")
    target = Target(**{key: _value(f"{key!r} in the target file {source}", key, value) for key, value in table.items()})
    if target.executes == (_EXECUTION in target.refused):
        raise InputError(
            f"the target file {source} says executes={str(target.executes).lower()} and "
            f"{'refuses' if target.executes else 'does not give its reason in'} refused.{_EXECUTION}. Make them agree."
        )
    for key in target.refused:
        if key == _EXECUTION:
            continue
        feature, _, option = key.partition(":")
        if option in map(str, getattr(target, feature)):
            raise InputError(f"the target file {source} both allows and refuses {key!r}. Remove one of the two.")
    return target


def _value(what: str, key: str, value: object) -> Any:
    if key in _TEXTS:
        return _text(what, value, _TEXTS[key])
    if key in _LISTS:
        return _list(what, value, _LISTS[key])
    if key in _SWITCHES:
        if not isinstance(value, bool):
            raise InputError(f"{what} is {value!r}. Allowed: true, false.")
        return value
    if not isinstance(value, dict):
        raise InputError(f"{what} is {value!r}. Give a table: [{key}].")
    if key == "session":
        return {name: _setting(f"{name!r} of {what}", entry) for name, entry in value.items()}
    if key == "refused":
        for name in value:
            _check_refused(what, name)
    return {name: _text(f"{name!r} of {what}", entry, None).rstrip(".") for name, entry in value.items()}


def _check_refused(what: str, name: str) -> None:
    if name == _EXECUTION:
        return
    feature, _, option = name.partition(":")
    if feature not in FEATURES:
        raise choose_from(f"feature of {what}:", feature, FEATURES)
    known = _LISTS[feature] or tuple(map(str, range(1, MOST_BITS + 1)))
    if option and option not in known:
        raise choose_from(f"option of {feature!r} of {what}:", option, known)


def _text(what: str, value: object, known: tuple[str, ...] | None) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{what} is {value!r}. Give a text.")
    if known is not None and value not in known:
        raise InputError(f"{what} is {value!r}. Allowed: {', '.join(known)}.")
    return value.strip()


def _list(what: str, value: object, known: tuple[str, ...] | None) -> tuple[int | str, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{what} is {value!r}. Give a list of at least one.")
    allowed: Callable[[object], bool] = _is_bits if known is None else (lambda entry: entry in known)
    for entry in value:
        if not allowed(entry):
            listed = f"whole numbers from 1 to {CONTAINER_BITS}" if known is None else ", ".join(known)
            raise InputError(f"{what} holds {entry!r}. Allowed: {listed}.")
    if len(set(value)) < len(value):
        raise InputError(f"{what} is {value!r}. Name each entry once.")
    return tuple(sorted(value)) if known is None else tuple(value)


def _is_bits(entry: object) -> bool:
    return type(entry) is int and 1 <= entry <= CONTAINER_BITS


def _setting(what: str, entry: object) -> str | int | float | bool | tuple[str, ...]:
    if isinstance(entry, str | int | float | bool):
        return entry
    if isinstance(entry, list) and all(isinstance(part, str) for part in entry):
        return tuple(entry)
    raise InputError(f"{what} is {entry!r}. Give a text, a number, true or false, or a list of texts.")
