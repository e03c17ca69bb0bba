"""docs/new_space.md, done literally: its file, its configuration, its commands end with a verified export."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nasq.cli.main import main

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "new_space.md").read_text()


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[number]


def test_the_space_takes_at_most_25_lines() -> None:
    assert len([line for line in block("python").splitlines() if line.strip()]) <= 25


def test_the_pages_commands_train_search_and_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_net.py").write_text(block("python"))
    Path("mine.yaml").write_text(block("yaml"))
    for line in block("bash").splitlines():
        program, *words = shlex.split(line)
        assert program == "nasq"
        monkeypatch.setattr("sys.argv", ["nasq", *words])
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code in (0, None), line
    assert (tmp_path / "runs" / "mine" / "best" / "model.onnx").stat().st_size > 1000
    rows = (tmp_path / "runs" / "mine" / "search" / "subnets.csv").read_text().splitlines()
    assert len(rows) == 1 + 8
