"""Text that is on every machine: the docstrings of Python's own standard library, byte by byte.

The text depends on the Python version alone: source files are read, never imported, in the order of their names.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nasq.data.folder import Part, Source
from nasq.errors import InputError

__all__ = ["VOCABULARY", "Text", "as_source", "docstrings"]

VOCABULARY = 256
"""A token is a byte."""

_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo"}
)
"""Not part of every installation, or not text."""
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, eq=False)
class Text:
    """A text as bytes, in three parts that follow each other.

    Attributes:
        train, validation, test: uint8 ``[n]``.
        fingerprint: 16 hex digits that change with any byte and any border.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    fingerprint: str

    def batch(self, part: str, count: int, length: int, generator: torch.Generator) -> Tensor:
        """``count`` random pieces of a part, int64 ``[count, length + 1]``: inputs, and the byte after each of them.

        Args:
            part: ``"train"``, ``"validation"`` or ``"test"``.
            count: Pieces.
            length: Tokens that a network sees.
            generator: Draws where they begin.

        Raises:
            InputError: The part is unknown, or shorter than a piece.
        """
        tokens = self._part(part, length)
        start = torch.randint(len(tokens) - length, (count, 1), generator=generator)
        return tokens[start + torch.arange(length + 1)].long()

    def pieces(self, part: str, length: int, count: int) -> Iterator[Tensor]:
        """The part once, in order, in batches of ``count`` pieces, int64 ``[n, length + 1]``; the rest is left out.

        A piece begins with the last byte of the one before it, so that every byte but the first is predicted once.

        Args:
            part: ``"train"``, ``"validation"`` or ``"test"``.
            length: Tokens that a network sees.
            count: Pieces in a batch; the last batch may be smaller.

        Raises:
            InputError: The part is unknown, or shorter than a piece.
        """
        tokens = self._part(part, length)
        windows = tokens.unfold(0, length + 1, length).long()
        return (windows[at : at + count] for at in range(0, len(windows), count))

    def _part(self, part: str, length: int) -> Tensor:
        if part not in ("train", "validation", "test"):
            raise InputError(f"the part of a text is {part!r}; allowed: train, validation, test")
        tokens: Tensor = getattr(self, part)
        if length < 1 or len(tokens) <= length:
            raise InputError(
                f"pieces of {length} bytes were asked of a {part} part of {len(tokens)}. Ask for shorter ones."
            )
        return tokens


def docstrings(
    modules: Sequence[str] = (), *, validation: float = 0.05, test: float = 0.05, library: Path | None = None
) -> Text:
    """The docstrings of the installed standard library (about 1.6 MB with Python 3.11), in ASCII.

    Files are shared out as wholes: each belongs to train, validation or test by a hash of its path, so the parts do not
    change when a file is added, and no docstring is in two of them.

    Args:
        modules: Top-level modules or packages to take, as ``("argparse", "email")``; empty: all, which takes seconds.
        validation, test: Shares of the files.
        library: Directory of the library's source; ``None``: the running Python's.

    Raises:
        InputError: Shares that leave no training part, an unknown module, no docstring found, or a part that is empty.
    """
    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise InputError(
            f"validation and test are {validation} and {test} of the text; allowed: above 0, together below 1"
        )
    root = Path(sysconfig.get_paths()["stdlib"]) if library is None else library
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for path in _files(root, modules):
        parts[_owner(path.relative_to(root).as_posix(), validation, test)].extend(_found(path))
    empty = [name for name, found in parts.items() if not found]
    if empty:
        raise InputError(
            f"no docstring of {root} belongs to {', '.join(empty)} (modules: {list(modules) or 'all'}). Take more modules, "
            "or larger shares; a Python without its sources has none."
        )
    tensors = {
        name: torch.frombuffer(bytearray(b"\n\n".join(found)), dtype=torch.uint8) for name, found in parts.items()
    }
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {len(tensor)}".encode() + tensor.numpy().tobytes())
    return Text(**tensors, fingerprint=digest.hexdigest()[:16])


def as_source(text: Text, context: int = 64, train: int = 8192, held_out: int = 2048) -> Source:
    """A text as a data set of images: which byte comes next?

    An image ``[1, context, 256]`` holds a one-hot row of pixels per byte (255 and 0); its label is the byte behind the last
    row. The pieces lie evenly over each part.

    Args:
        text: What to read.
        context: Bytes in a piece.
        train: Pieces of the training part: 16 kB each with 64 bytes.
        held_out: Pieces of the validation and of the test part, at most.

    Raises:
        InputError: A part is shorter than a piece.
    """
    parts = {}
    for name, count in (("train", train), ("validation", held_out), ("test", held_out)):
        tokens = text._part(name, context)
        starts = torch.linspace(0, len(tokens) - context - 1, min(count, len(tokens) - context)).long().unsqueeze(1)
        pieces = tokens[starts + torch.arange(context + 1)].long()
        images = torch.zeros(len(pieces), 1, context, VOCABULARY, dtype=torch.uint8)
        parts[name] = Part(images.scatter_(3, pieces[:, None, :-1, None], 255), pieces[:, -1].contiguous())
    return Source(tuple(f"0x{byte:02x}" for byte in range(VOCABULARY)), **parts)


def _files(root: Path, modules: Sequence[str]) -> list[Path]:
    """The source files, in the order of their paths' characters on every system."""
    for name in modules:
        if not (root / f"{name}.py").is_file() and not (root / name).is_dir():
            raise InputError(f"the standard library has no module {name!r} with source in {root}. Name others.")
    found = []
    for path in root.rglob("*.py"):
        places = path.relative_to(root).parts
        if not _LEFT_OUT & set(places) and (not modules or places[0].removesuffix(".py") in modules):
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _owner(path: str, validation: float, test: float) -> str:
    """The part a file belongs to, by a number in ``[0, 1)`` that only its path decides."""
    share = int.from_bytes(hashlib.sha256(path.encode()).digest()[:6], "big") / 2**48
    if share < test:
        return "test"
    return "validation" if share < test + validation else "train"


def _found(path: Path) -> Iterator[bytes]:
    """The docstrings of a file, in its order; a file that is no Python of this version has none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text.encode("ascii", "ignore")
        # Definitions are statements: expressions, which are most of a tree, need no visit.
        for block in ("finalbody", "orelse", "handlers", "body"):
            inner = getattr(node, block, ())
            waiting.extend(reversed(inner) if isinstance(inner, list) else ())
