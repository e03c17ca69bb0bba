"""What is installed is what is tracked: no file is forgotten, none slips in."""

from __future__ import annotations

import configparser
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"nasq": "nasq", "search_spaces": "nasq/search_spaces", "proxies": "nasq/proxies"}


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def tracked() -> list[str]:
    """Tracked files, and new ones that are not ignored (they are tracked when the change is committed)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: there is nothing to compare with")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def installed_place(name: str) -> str | None:
    """Where a tracked file has to be in the wheel."""
    folder, _, rest = name.partition("/")
    return f"{FOLDERS[folder]}/{rest}" if folder in FOLDERS else None


def test_packages_are_the_directories_with_an_init() -> None:
    listed = set(setup()["options"]["packages"].split())
    found = set()
    for folder, place in FOLDERS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            inner = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join([*place.split("/"), *inner]))
    assert listed == found
    for folder in FOLDERS:
        lonely = {p.parent for p in (ROOT / folder).rglob("*.py")} - {
            p.parent for p in (ROOT / folder).rglob("__init__.py")
        }
        assert lonely == set(), "a directory with modules and no __init__.py is not installed"


def test_entry_points_name_what_exists() -> None:
    groups = ("nasq.search_spaces", "nasq.proxies")
    for entry in [entry for group in groups for entry in importlib.metadata.entry_points(group=group)]:
        if entry.dist is None or entry.dist.name != "nasq":
            continue
        folder, module = entry.module.split(".")[1:]
        if not (ROOT / folder / f"{module}.py").exists():
            pytest.fail(f"the entry point {entry.name!r} names {entry.value}, which does not exist")
        assert entry.load() is not None


def test_every_member_has_an_entry_point() -> None:
    for folder in ("search_spaces", "proxies"):
        listed = setup()["options.entry_points"][f"nasq.{folder}"]
        for path in (ROOT / folder).glob("[!_]*.py"):
            assert f"nasq.{folder}.{path.stem}:" in listed, f"{path.name} is not found by `nasq {folder}`"


@pytest.mark.slow
def test_the_wheel_holds_the_tracked_files(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path / "source", tmp_path / "wheel"
    names = tracked()
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(out),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("nasq-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("/METADATA"))
        points = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("/entry_points.txt"))
    wanted = {place for name in names if (place := installed_place(name)) is not None}
    assert held == wanted
    assert "Apache-2.0" in metadata and "nasq = nasq.cli.main:main" in points
