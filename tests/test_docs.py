"""The documentation is run: every Python block, every command line, every key of a configuration."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from nasq.cli.main import app
from nasq.run.config import RunConfig, load_config
from nasq.training import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """Line number and text of the fenced blocks of a language."""
    text = page.read_text()
    return [
        (text[: match.start()].count("\n") + 2, match[2]) for match in BLOCK.finditer(text) if match[1] in languages
    ]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}
    for line, source in blocks(page, "python"):
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)
    assert len(namespace) > 1


def test_the_pages_with_code_are_those_meant() -> None:
    wanted = {"README.md", "docs/quickstart.md", "docs/new_space.md", "docs/own_loop.md", "docs/quantization.md",
              "docs/integer_arithmetic.md", "docs/config.md", "docs/bundle.md", "docs/tables.md",
              "docs/eq_net.md", "docs/targets.md", "docs/splits.md", "docs/training.md", "docs/convert.md", "docs/proxies.md",
              "docs/search.md", "docs/algorithms.md"}  # fmt: skip
    assert {name(page) for page in WITH_PYTHON} == wanted


def command_lines(page: Path) -> Iterator[str]:
    """What begins with ``nasq`` in shell blocks, and in code spans (``nasq show BUNDLE``)."""
    for _, text in blocks(page, "bash", "sh", "console"):
        yield from (line for line in text.splitlines() if line.startswith("nasq "))
    prose = BLOCK.sub("", page.read_text())
    yield from (" ".join(span.split()) for span in re.findall(r"`(nasq [^`]+)`", prose))


COMMANDS = sorted({(name(page), line) for page in PAGES for line in command_lines(page)})


def parse(line: str) -> None:
    """Parses a command line as the program would, without running it."""
    program, *words = shlex.split(line, comments=True)
    assert program == "nasq"
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    if words:  # `nasq pick` alone names the command
        command.make_context("nasq", words)


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_command_lines_exist(page: str, line: str) -> None:
    parse(line)


def test_the_check_of_command_lines_finds_errors() -> None:
    assert len(COMMANDS) > 20
    for wrong in (
        "nasq finetun",
        "nasq run --evaluations 3",
        "nasq pick --json",
        "nasq show a b",
        "nasq targets verify x",
    ):
        with pytest.raises(Exception, match=r"no command|No such option|Missing|unexpected extra argument"):
            parse(wrong)


def test_yaml_blocks_are_configurations(tmp_path: Path) -> None:
    found = [block for page in PAGES for _, block in blocks(page, "yaml")]
    for block in found:
        (tmp_path / "block.yaml").write_text(block)
        assert load_config(tmp_path / "block.yaml").space
    assert found


def leaves(part: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every key of a configuration with its default, by its name with dots."""
    found: dict[str, Any] = {}
    for key, field in part.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= leaves(field.annotation, f"{prefix}{key}.")
        else:
            found[prefix + key] = field.get_default(call_default_factory=True)
    return found


def tables() -> list[dict[str, Any]]:
    """The tables of docs/config.md: key to default, read as YAML."""
    made: list[dict[str, Any]] = []
    for line in (ROOT / "docs" / "config.md").read_text().splitlines():
        if line.startswith("| key |"):
            made.append({})
        elif match := re.match(r"\| `([\w.]+)` \| `(.+?)` \| .+ \|$", line):
            assert match[1] not in made[-1], f"{match[1]} is there twice"
            made[-1][match[1]] = yaml.safe_load(match[2])
        else:
            assert not line.startswith("| `"), f"a row that cannot be read: {line}"
    return made


@pytest.mark.parametrize(
    ("table", "wanted"),
    [(0, leaves(RunConfig)), (1, {field.name: field.default for field in fields(TrainConfig)})],
    ids=["run", "training"],
)
def test_config_md_lists_every_key_with_its_default(table: int, wanted: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(dict(wanted)))
    assert len(tables()) == 2 and list(tables()[table]) == list(plain)
    assert tables()[table] == plain


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{name(page)}: {target}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name


def test_the_changelog_says_what_is_not_there_yet() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    absent = text.partition("### Not yet")[2]
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    for command in ("split", "finetune", "score", "audit", "ranker", "table", "worker"):
        assert (f"`{command}`" in absent) != (command in commands), command
    assert text.index("## Unreleased") < text.index("### Added") < text.index("### Not yet")
