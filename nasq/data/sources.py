"""Where the images come from: scikit-learn's digits, torchvision's sets, a folder of your own."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nasq.data.dataset import DataSet, Split
from nasq.data.folder import Part, Source, read_folder
from nasq.data.splits import split_size, stratified_split
from nasq.data.text import as_source, docstrings
from nasq.errors import InputError, MissingPackageError, choose_from

__all__ = ["NAMES", "load"]

#: A set that has no test part of its own gets one that never depends on the caller's seed.
TEST_SEED = 20_230_601
TEST_SHARE = 0.2

IMAGE_SIZE_MAX = 4096


@dataclass(frozen=True)
class _Entry:
    read: Callable[[_Request], Source]
    validation: float  # default share of what is not test


@dataclass(frozen=True)
class _Request:
    name: str
    root: Path | None
    download: bool
    image_size: tuple[int, int] | None


def load(
    name: str,
    root: Path | str | None = None,
    download: bool = False,
    seed: int = 0,
    validation: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    test_seed: int | None = None,
) -> DataSet:
    """Loads a data set as three disjoint splits.

    The source's own test part stays the test split. Validation is carved from the training part, stratified, drawn
    from ``seed``; ``digits`` and folders without a test part give 20 % of all images to test, by a seed that is
    fixed, so that test is the same for everybody.

    ========================  =======================================================================  ==========
    name                      images                                                                   validation
    ========================  =======================================================================  ==========
    ``digits``                scikit-learn's 1,797 digits, 1x8x8, needs no file; 0..16 is scaled to     25 % of
                              0..255 as ``(255 * x + 8) // 16``, one-to-one                             non-test
    ``cifar10, cifar100``     torchvision, 3x32x32                                                     10 %
    ``fashion_mnist``         torchvision, 1x28x28                                                     10 %
    ``docstrings``            the docstrings of Python's standard library as one-hot images 1x64x256,       its own
                              labelled with the next byte (:func:`nasq.data.text.as_source`)
    ``image_folder``          ``root/{train,val,test}/CLASS/*`` or ``root/CLASS/*``; val and test       10 %
                              may be absent; RGB, scaled so that the shorter side fits and cropped
                              at the centre
    ========================  =======================================================================  ==========

    Args:
        name: One of the names above.
        root: The directory that holds the files; not used by ``digits``.
        download: Whether torchvision may fetch the files into ``root``.
        seed: Decides which images are validation; from 0 on.
        validation: Size of the validation split: a share (float) of the images that are not test, or their number
            (int). ``None`` takes the default above, or the folder's own validation part.
        image_size: Pixels, ``side`` or ``(height, width)``; needed by ``image_folder``. The other sets are resized
            (bilinear, antialiased) where it is given.
        test_seed: Draws another test part, for repeated hold-out estimates; only for sets without one of their own.
            ``None`` takes the fixed one.

    Raises:
        InputError: An unknown name, a missing or unreadable file, a size outside its range.
        MissingPackageError: scikit-learn, torchvision or Pillow is not installed.
    """
    if name not in _ENTRIES:
        raise choose_from("data set", name, _ENTRIES)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed!r}; allowed: an integer from 0 to 2^63 - 1")
    size = _checked_size(image_size)
    request = _Request(name, None if root is None else Path(root), download, size)
    source = _ENTRIES[name].read(request)
    if size is not None:
        source = _resized(source, size)
    return _assemble(name, source, seed, validation, test_seed)


def _checked_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or not all(isinstance(side, int) and 0 < side <= IMAGE_SIZE_MAX for side in pair):
        raise InputError(
            f"image_size is {image_size!r}; allowed: a side or (height, width), each from 1 to {IMAGE_SIZE_MAX} pixels"
        )
    return pair[0], pair[1]


def _assemble(name: str, source: Source, seed: int, validation: float | None, test_seed: int | None = None) -> DataSet:
    """Makes the three splits. Indices count through the source: its training part, then validation, then test."""
    pool, own_validation, own_test = source.train, source.validation, source.test
    if own_validation is not None and validation is not None:
        raise InputError(
            f"validation is {validation!r}, but {name!r} at this root has a validation part of its own; "
            "leave the size out, or remove that folder"
        )
    if own_test is not None and test_seed is not None:
        raise InputError(f"test_seed is {test_seed}, but {name!r} has a test part of its own; leave the seed out")
    here = torch.arange(len(pool.labels))
    if own_test is None:
        count = split_size(TEST_SHARE, len(here), "the share of test")
        test_at, here = stratified_split(
            pool.labels, count, torch.Generator().manual_seed(TEST_SEED if test_seed is None else test_seed)
        )
        test = _take(pool, test_at)
    else:
        before = len(pool.labels) + (0 if own_validation is None else len(own_validation.labels))
        test = _whole(own_test, before)
    if own_validation is None:
        size = split_size(_ENTRIES[name].validation if validation is None else validation, len(here))
        part, rest = stratified_split(pool.labels[here], size, torch.Generator().manual_seed(seed))
        validation_split, train = _take(pool, here[part]), _take(pool, here[rest])
    else:
        validation_split, train = _whole(own_validation, len(pool.labels)), _take(pool, here)
    return DataSet.from_splits(name, source.classes, train, validation_split, test)


def _take(part: Part, at: Tensor) -> Split:
    return Split(part.images[at], part.labels[at], at)


def _whole(part: Part, before: int) -> Split:
    return Split(part.images, part.labels, torch.arange(before, before + len(part.labels)))


def _resized(source: Source, size: tuple[int, int]) -> Source:
    def resize(part: Part) -> Part:
        if tuple(part.images.shape[2:]) == size:
            return part
        pieces = [
            torch.nn.functional.interpolate(chunk.float(), size, mode="bilinear", antialias=True)
            .round_()
            .clamp_(0, 255)
            .to(torch.uint8)
            for chunk in torch.chunk(part.images, max(1, len(part.labels) // 1024))
        ]
        return Part(torch.cat(pieces), part.labels)

    return Source(
        source.classes,
        resize(source.train),
        None if source.validation is None else resize(source.validation),
        None if source.test is None else resize(source.test),
    )


def _module(name: str, package: str) -> ModuleType:
    # errors.require installs by import name; these packages are installed by another one.
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f"the package {package!r} is needed here and is not installed. Install it: pip install {package}"
        ) from error


def _digit_table() -> NDArray[np.float64]:
    """``[1797, 65]``: 64 levels from 0 to 16, and the label."""
    # The file itself, where scikit-learn keeps it: importing the package takes a second, which every command would pay.
    found = importlib.util.find_spec("sklearn")
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return np.loadtxt(path, delimiter=",")
    digits = _module("sklearn.datasets", "scikit-learn").load_digits()
    return np.column_stack([digits.data, digits.target])


def _read_digits(request: _Request) -> Source:
    table = torch.from_numpy(_digit_table()).to(torch.int64)
    images = ((table[:, :64].reshape(-1, 1, 8, 8) * 255 + 8) // 16).to(torch.uint8)
    return Source(tuple(str(digit) for digit in range(10)), Part(images, table[:, 64].contiguous()))


def _need_root(request: _Request) -> Path:
    if request.root is None:
        raise InputError(
            f"the data set {request.name!r} is read from disk: say where it is with --data-root DIR (root=...), "
            "and add --download (download=True) to fetch it there first"
        )
    return request.root


#: Class in torchvision.datasets, and the directory below root in which it looks for its files.
_TORCHVISION = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw"),
}


def _read_torchvision(request: _Request) -> Source:
    root = _need_root(request)
    kind, below = _TORCHVISION[request.name]
    if not request.download and not (root / below).is_dir():
        raise InputError(
            f"the data set {request.name!r} is not below {root}: {root / below} is missing. "
            "Give the directory that holds it with --data-root, or add --download to fetch it there"
        )
    reader = getattr(_module("torchvision", "torchvision").datasets, kind)
    try:
        # torchvision reports its downloads on stdout, which belongs to the caller's own output. It checks the MD5
        # of the CIFAR pickles before it opens them.
        with contextlib.redirect_stdout(sys.stderr):
            parts = [reader(root=str(root), train=train, download=request.download) for train in (True, False)]
    except (RuntimeError, OSError, EOFError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"torchvision cannot read {request.name!r} from {root}: {reason}. "
            f"Remove {root / below} if it is incomplete, and add --download to fetch it again"
        ) from error
    train, test = (_from_torchvision(part) for part in parts)
    return Source(tuple(str(name) for name in parts[0].classes), train, test=test)


def _from_torchvision(part: object) -> Part:
    images = torch.as_tensor(part.data)  # type: ignore[attr-defined]
    labels = torch.as_tensor(part.targets, dtype=torch.int64)  # type: ignore[attr-defined]
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return Part(images.contiguous(), labels)


def _read_image_folder(request: _Request) -> Source:
    root = _need_root(request)
    if request.image_size is None:
        raise InputError(
            "image_size is needed by 'image_folder', whose images may have any size: give a side or (height, width) "
            "in pixels (--image-size)"
        )
    _module("PIL.Image", "pillow")
    return read_folder(root, request.image_size)


def _read_docstrings(request: _Request) -> Source:
    if request.image_size is not None:
        raise InputError("image_size is given for 'docstrings', which is a text. Leave it out")
    return as_source(docstrings())


_ENTRIES: dict[str, _Entry] = {
    "digits": _Entry(_read_digits, 0.25),
    "cifar10": _Entry(_read_torchvision, 0.1),
    "cifar100": _Entry(_read_torchvision, 0.1),
    "fashion_mnist": _Entry(_read_torchvision, 0.1),
    "docstrings": _Entry(_read_docstrings, 0.1),
    "image_folder": _Entry(_read_image_folder, 0.1),
}

#: Every name that :func:`load` takes.
NAMES: tuple[str, ...] = tuple(_ENTRIES)
