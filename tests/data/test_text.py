"""Docstrings as bytes: which ones, in which part, and how they become inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nasq.data import load
from nasq.data.text import Text, as_source, docstrings
from nasq.errors import InputError

SHARES = {"validation": 0.3, "test": 0.3}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A small standard library: forty modules, one package, one broken file, and what is left out."""
    root = tmp_path_factory.mktemp("lib")
    for number in range(40):
        function = f'    def f():\n        """Function {number}, na\u00efve."""\n        return "text"\n'
        (root / f"m{number:02}.py").write_text(f'"""Module {number}."""\nif True:\n{function}', encoding="utf-8")
    for place in ("package", "test", "site-packages", "package/tests"):
        (root / place).mkdir()
        (root / place / "a.py").write_text(
            f'class C:\n    """In {place}."""\n    async def g(self):\n        """Deep in {place}."""\n'
        )
    (root / "broken.py").write_text('"""Lost."""\nprint "old"\n')
    return root


def whole(text: Text) -> bytes:
    return b"\n\n".join(bytes(part.tolist()) for part in (text.train, text.validation, text.test))


def test_every_docstring_is_in_one_part_and_nothing_else_is(library: Path) -> None:
    text = docstrings(library=library, **SHARES)
    found = sorted(whole(text).split(b"\n\n"))
    wanted = [f"Module {number}.".encode() for number in range(40)]
    wanted += [f"Function {number}, nave.".encode() for number in range(40)]  # not ASCII: left out
    assert found == sorted([*wanted, b"In package.", b"Deep in package."])


def test_a_docstring_of_a_file_follows_the_one_before_it(library: Path) -> None:
    text = docstrings(library=library, **SHARES)
    for number in range(40):
        assert f"Module {number}.\n\nFunction {number}, nave.".encode() in whole(text)


def test_parts_stay_when_a_file_is_added(library: Path, tmp_path: Path) -> None:
    before = docstrings(library=library, **SHARES)
    assert docstrings(library=library, **SHARES).fingerprint == before.fingerprint
    for path in library.glob("m*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "m99.py").write_text('"""New."""')
    after = docstrings(library=tmp_path, **SHARES)
    assert after.fingerprint != before.fingerprint
    for part in ("train", "validation", "test"):
        new = set(bytes(getattr(after, part).tolist()).split(b"\n\n")) - {b"New."}
        assert new <= set(bytes(getattr(before, part).tolist()).split(b"\n\n"))


def test_the_installed_library_has_text() -> None:
    text = docstrings(("argparse", "email", "asyncio", "typing"), validation=0.2, test=0.2)
    assert len(text.train) > 50_000 and int(text.train.max()) < 128
    assert b"Command-line parsing library" in whole(text)


def text_of(length: int) -> Text:
    tokens = (torch.arange(length) % 251).to(torch.uint8)
    return Text(tokens, tokens[: length // 2], tokens[: length // 4], "0" * 16)


def test_batches_are_pieces_of_the_text() -> None:
    batch = text_of(400).batch("train", 5, 7, torch.Generator().manual_seed(0))
    assert batch.shape == (5, 8) and batch.dtype == torch.int64
    assert all(((piece[1:] - piece[:-1]) % 251 == 1).all() for piece in batch)
    again = text_of(400).batch("train", 5, 7, torch.Generator().manual_seed(0))
    assert torch.equal(batch, again)


def test_pieces_predict_every_byte_but_the_first_once() -> None:
    text = text_of(71)
    pieces = torch.cat(list(text.pieces("train", 10, 3)))
    assert torch.equal(pieces[:, 1:].flatten(), text.train[1:71].long())
    assert torch.equal(pieces[:, :-1].flatten(), text.train[:70].long())


def test_a_source_asks_for_the_next_byte() -> None:
    source = as_source(text_of(400), context=6, train=10, held_out=5)
    assert [len(part.labels) for part in (source.train, source.validation, source.test)] == [10, 5, 5]
    images, labels = source.train.images, source.train.labels
    assert images.shape == (10, 1, 6, 256) and images.dtype == torch.uint8
    assert torch.equal(images.long().sum(3), torch.full((10, 1, 6), 255))
    tokens = images[:, 0].argmax(2)
    assert ((labels - tokens[:, -1]) % 251 == 1).all() and (tokens[:, 1:] - tokens[:, :-1] + 251).remainder(251).eq(
        1
    ).all()
    assert tokens[0, 0] == 0 and len(source.classes) == 256


@pytest.mark.slow
def test_docstrings_are_a_data_set() -> None:
    data = load("docstrings")
    assert data.input_shape == (1, 64, 256) and len(data.train) == 8192
    share = float((data.train.labels == ord(" ")).float().mean())
    assert 0.1 < share < 0.4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: docstrings(validation=0.5, test=0.5), "allowed: above 0, together below 1"),
        (lambda: docstrings(("argparsee",)), "has no module 'argparsee'"),
        (lambda: docstrings(("keyword",)), r"no docstring of .* belongs to .*modules: \['keyword'\]"),
        (lambda: text_of(40).batch("trian", 1, 2, torch.Generator()), "the part of a text is 'trian'; allowed: train"),
        (lambda: text_of(40).pieces("test", 10, 2), "pieces of 10 bytes were asked of a test part of 10"),
        (lambda: load("docstrings", image_size=8), "image_size is given for 'docstrings'"),
    ],
)
def test_what_cannot_be_is_named(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
