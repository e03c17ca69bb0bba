"""Reads a folder of images, one sub-folder per class, into memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nasq.errors import InputError

__all__ = ["Part", "Source", "read_folder"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
VALIDATION_FOLDERS = ("val", "valid", "validation")
NAMED_IN_AN_ERROR = 10


@dataclass(frozen=True, eq=False)
class Part:
    """Images uint8 ``[N, C, H, W]`` and labels int64 ``[N]`` as a source holds them, before any split."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Source:
    """What a source holds: its classes and its parts; those it does not have are ``None``."""

    classes: tuple[str, ...]
    train: Part
    validation: Part | None = None
    test: Part | None = None


def read_folder(root: Path, size: tuple[int, int]) -> Source:
    """Reads ``root/{train,val,test}/CLASS/*`` or ``root/CLASS/*``; files and classes in the order of their names.

    The first layout is taken when ``root/train`` has sub-folders; its ``val`` (or ``valid``, ``validation``) and
    ``test`` may be absent. Images become RGB, upright by their EXIF tag, scaled so that the shorter side fits
    ``size``, cropped at the centre. Files that do not end like an image, and hidden ones, are passed over.

    Args:
        root: The folder.
        size: ``(height, width)`` in pixels.

    Raises:
        InputError: No such folder, a class without images or absent from ``train``, files that cannot be read
            (they are named), or more images than this machine's memory holds.
    """
    if not root.is_dir():
        raise InputError(f"the image folder {root} is not a directory; give the one that holds the classes")
    if not _folders(root / "train"):
        classes, files = _listed(root)
        return Source(classes, _read(files, size))
    classes, files = _listed(root / "train")
    validation = next((root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()), None)
    test = root / "test"
    return Source(
        classes,
        _read(files, size),
        None if validation is None else _read(_listed(validation, classes)[1], size),
        _read(_listed(test, classes)[1], size) if test.is_dir() else None,
    )


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))


def _listed(root: Path, classes: Sequence[str] | None = None) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """The classes below ``root`` and every image with its label; ``classes`` are those of the training part."""
    folders = _folders(root)
    names = tuple(folder.name for folder in folders) if classes is None else tuple(classes)
    if not folders or (classes is None and len(folders) < 2):
        raise InputError(f"{root} holds {len(folders)} class folders; one folder per class, two or more, is needed")
    files = []
    for folder in folders:
        if folder.name not in names:
            raise InputError(
                f"{folder} is a class that the training part does not have; its classes are {', '.join(names)}"
            )
        images = sorted(
            item
            for item in folder.rglob("*")
            if item.suffix.lower() in SUFFIXES and not item.name.startswith(".") and item.is_file()
        )
        if not images:
            raise InputError(f"{folder} holds no image; allowed endings: {' '.join(SUFFIXES)}")
        files += [(item, names.index(folder.name)) for item in images]
    return names, files


def _read(files: Sequence[tuple[Path, int]], size: tuple[int, int]) -> Part:
    _check_memory(len(files), size)
    images = torch.empty((len(files), 3, *size), dtype=torch.uint8)

    def read(at: int) -> str | None:
        try:
            images[at] = _decode(files[at][0], size)
        except Exception as error:  # whatever a decoder throws at a broken file: it is named, and raised below
            return f"{files[at][0]} ({error})"
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        unreadable = [text for text in pool.map(read, range(len(files))) if text is not None]
    if unreadable:
        more = len(unreadable) - NAMED_IN_AN_ERROR
        listed = "; ".join(unreadable[:NAMED_IN_AN_ERROR]) + (f"; and {more} more" if more > 0 else "")
        raise InputError(f"{len(unreadable)} images cannot be read: {listed}. Repair or remove them")
    return Part(images, torch.tensor([label for _, label in files], dtype=torch.int64))


def _decode(path: Path, size: tuple[int, int]) -> Tensor:
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened)
        image = ImageOps.fit(upright.convert("RGB"), (size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(size[0], size[1], 3).permute(2, 0, 1)


def _check_memory(count: int, size: tuple[int, int]) -> None:
    needed = count * 3 * size[0] * size[1]
    try:
        present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not every system tells
        return
    if needed > present // 2:
        raise InputError(
            f"{count} images of {size[0]}x{size[1]} pixels take {needed / 2**30:.1f} GiB, more than half of this "
            f"machine's {present / 2**30:.1f} GiB; choose a smaller image_size or fewer images"
        )
