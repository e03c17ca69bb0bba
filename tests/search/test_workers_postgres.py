"""Four workers on a real PostgreSQL server: two are killed, and the server is restarted under all of them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from nasq.errors import NasqError
from nasq.search import Study
from nasq.search.storage import open_storage

from .crew import Toy, processes, rows
from .test_workers import busy

BUDGET = 32


class Server:
    """A PostgreSQL server of its own in a new directory; it does not run as root, so root lends it another user."""

    def __init__(self, binaries: Path, directory: Path) -> None:
        self._binaries, self._directory = binaries, directory
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(directory, self._user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._call("initdb", "-D", str(directory / "data"), "-U", "nasq", "--auth=trust", "--no-sync")
        self.url = f"postgresql://nasq@127.0.0.1:{self._port}/postgres"

    def _call(self, name: str, *arguments: str) -> None:
        command = [str(self._binaries / name), *arguments]
        done = subprocess.run(
            command, user=self._user, cwd=self._directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, done.stdout

    def control(self, action: str, *more: str) -> None:
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._directory}"
        log = self._directory / "log"
        self._call("pg_ctl", "-D", str(self._directory / "data"), "-w", "-o", options, "-l", str(log), *more, action)


def _binaries() -> Path | None:
    found = shutil.which("pg_ctl")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists()), None)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg", reason="the PostgreSQL driver is not installed: pip install 'nasq[postgres]'")
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed (pg_ctl and initdb are not found)")
    # Not pytest's directory: another user cannot go into that one.
    with tempfile.TemporaryDirectory(prefix="nasq-pg") as name:
        Path(name).chmod(0o755)
        made = Server(binaries, Path(name))
        made.control("start")
        try:
            yield made
        finally:
            made.control("stop", "-m", "immediate")


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.long
def test_four_workers_two_killed_one_restart(server: Server, tmp_path: Path) -> None:
    toy = Toy()
    wanted = rows(Study(tmp_path / "alone", toy.algorithm(), toy.evaluator).run(BUDGET))
    shared = toy.shared(server.url)
    events: list[str] = []
    # Evaluations are long enough for a worker that was seen at one to be killed at it, on a busy machine too.
    with processes(server.url, 4, pause=0.4, interval=1.0) as workers:

        def disturb(event: Mapping[str, Any]) -> None:
            events.append(event["event"])
            if event["event"] != "search.evaluated":
                return
            if event["done"] in (5, 14):
                busy(shared, workers).kill()
            if event["done"] == 22:
                server.control("restart", "-m", "immediate")

        with toy.dispatcher(shared, interval=1.0, on_event=disturb) as dispatcher:
            study = Study(tmp_path / "search", toy.algorithm(), toy.evaluator, disturb, dispatcher=dispatcher)
            found = rows(study.run(BUDGET))
    assert sum(worker.exitcode == -9 for worker in workers) == 2
    assert sum(worker.exitcode == 0 for worker in workers) == 2
    assert events.count("search.lost") >= 2

    assert found == wanted
    assert len((tmp_path / "search" / "subnets.csv").read_text().splitlines()) == BUDGET + 1
    trials = optuna.load_study(study_name="toy", storage=open_storage(server.url)).trials
    complete = [trial.user_attrs["id"] for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert sorted(complete) == sorted(row[0] for row in wanted)
    assert {trial.state.name for trial in trials} == {"COMPLETE", "FAIL"}


@pytest.mark.slow
def test_a_wrong_password_or_name_is_one_line(server: Server) -> None:
    with pytest.raises(NasqError, match='database "nowhere" does not exist') as caught:
        open_storage(server.url.removesuffix("postgres") + "nowhere")
    assert "\n" not in str(caught.value)
