"""``torch_module``: a network of your own, named on the command line.

``torch_module:PATH.py:FACTORY`` reads a file, ``torch_module:PACKAGE.MODULE:FACTORY`` imports an installed module. The
factory is a function or a class that gives a ``torch.nn.Module``, with or without choices of its own; without any, the
space is the bits alone. Source: you. Size: of your network. Default data: what ``nasq.plugins.search_space`` says on the
factory, else none; then name the data set in the configuration.

``num_classes``, ``in_channels`` and ``image_size`` of the data go to a factory that has parameters of these names; all
``space_arguments`` go to it in any case.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from nasq.errors import InputError, choose_from
from nasq.plugins import search_space

__all__ = ["find_factory", "torch_module"]

Factory = Callable[..., nn.Module]

_OFFERED = ("num_classes", "in_channels", "image_size")
_FORM = "Write torch_module:PATH.py:FACTORY or torch_module:PACKAGE.MODULE:FACTORY."


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}. {_FORM}")
    name = f"nasq_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and torch look a class's module up by its name.
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        _put_back(name, before)
        raise
    return module


def _put_back(name: str, before: ModuleType | None) -> None:
    if before is None:
        del sys.modules[name]
    else:
        sys.modules[name] = before


def _imported(where: str) -> ModuleType:
    try:
        return _of_file(Path(where).expanduser()) if where.endswith(".py") else importlib.import_module(where)
    except InputError:
        raise
    except Exception as error:  # a user's module may raise anything while it is imported
        line = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"{where!r} cannot be imported: {type(error).__name__}: {line}. Repair it, or give another. {_FORM}"
        ) from error


def _accepted(factory: Factory) -> Callable[[str], bool]:
    """Which arguments a factory has a parameter for."""
    parameters = inspect.signature(factory).parameters
    everything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    return lambda name: everything or name in parameters


def find_factory(text: str) -> Factory:
    """The factory that ``PATH.py:NAME`` or ``PACKAGE.MODULE:NAME`` names.

    What the data offer (``num_classes``, ``in_channels``, ``image_size``) and it has no parameter for is left out.

    Raises:
        InputError: The text has another form, the file or module cannot be imported, or has no such factory; calling
            it raises :class:`~nasq.errors.InputError` where it gives something else than a module.
    """
    where, colon, name = text.rpartition(":")
    if not (colon and where and name):
        raise InputError(f"{text!r} names no factory. {_FORM}")
    module = _imported(where)
    factory = getattr(module, name, None)
    if not callable(factory):
        own = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
        raise choose_from("factory", name, own, f"It has to be a function or class of {where!r}.")
    accepts = _accepted(factory)

    @functools.wraps(factory, updated=("__dict__",))
    def build(**arguments: Any) -> nn.Module:
        kept = {key: value for key, value in arguments.items() if key not in _OFFERED or accepts(key)}
        made = factory(**kept)
        if not isinstance(made, nn.Module):
            raise InputError(f"{text!r} gives a {type(made).__name__}, not a torch.nn.Module. Return the network.")
        return made

    return build


@search_space(
    source="a factory of your own", data="digits", input_shape=(1, 8, 8), argument="PATH.py:FACTORY or MODULE:FACTORY"
)
def torch_module(factory: str = "", **arguments: Any) -> nn.Module:
    """The network that the factory makes; see the module's docstring.

    Args:
        factory: ``PATH.py:NAME`` or ``PACKAGE.MODULE:NAME``.
        arguments: For the factory.
    """
    return find_factory(factory)(**arguments)


torch_module.nasq_bind = find_factory  # type: ignore[attr-defined]
