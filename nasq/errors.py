"""The errors nasq raises for its users.

Every message names the thing, the value it was given, what is allowed and what to do next. The command line turns any
:class:`NasqError` into one clear line and an exit code; anything else is a bug in nasq and keeps its traceback.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

__all__ = [
    "ArtifactError",
    "InfeasibleError",
    "InputError",
    "MissingPackageError",
    "NasqError",
    "ParityError",
    "TargetError",
    "TrainingError",
    "choose_from",
    "require",
]


class NasqError(Exception):
    """Base class of every error that nasq raises on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 1


class InputError(NasqError, ValueError):
    """The user's input cannot be used: an unknown name, a value outside its range, sizes that disagree."""

    exit_code = 2


class InfeasibleError(InputError):
    """The constraints leave nothing to search; the message says how much of the space survives each of them."""


class TargetError(InputError):
    """A target cannot run what was asked for; the message names the layer, the choice and what to change."""


class ArtifactError(InputError):
    """A file on disk is corrupt, truncated, of a newer schema, or hostile."""


class MissingPackageError(InputError):
    """An optional package is not installed; the message holds the install command."""


class ParityError(NasqError):
    """The exported file does not compute what nasq evaluated."""


class TrainingError(NasqError):
    """Training cannot go on: a NaN loss, a NaN step size. The last good state is kept on disk."""


def choose_from(kind: str, name: str, allowed: Iterable[str], hint: str = "") -> InputError:
    """The error for an unknown ``name`` of a ``kind``: suggests the nearest one and lists what is allowed.

    Args:
        kind: What the name is meant to be, as a noun: ``"proxy"``.
        name: What the user gave.
        allowed: Every name that would have been accepted.
        hint: A sentence that says what to do next, such as a command that lists the names.
    """
    names = sorted(set(allowed))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(names) if names else "none is installed"
    tail = f" {hint}" if hint else ""
    return InputError(f"unknown {kind} {name!r}.{guess} Allowed: {listed}.{tail}")


def require(package: str, extra: str | None = None) -> ModuleType:
    """Imports an optional ``package`` late; without it, raises with the command that installs it.

    Args:
        package: The module's import name.
        extra: The extra of nasq that holds it, or ``None`` where the package's own name is what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        wanted = f"'nasq[{extra}]'" if extra else package
        raise MissingPackageError(
            f"the package {package!r} is needed here and is not installed. Install it: pip install {wanted}"
        ) from error
