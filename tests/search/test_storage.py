from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from nasq.errors import ArtifactError, InputError, MissingPackageError, NasqError
from nasq.search.results import Record
from nasq.search.shared import SharedStudy
from nasq.search.storage import open_storage, patiently, shown
from nasq.space import Subnet

from .crew import Toy


@pytest.fixture
def where(tmp_path: Path) -> str:
    return str(tmp_path / "study.log")


@pytest.fixture(params=["journal", "sqlite"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "study.log") if request.param == "journal" else f"sqlite:///{tmp_path}/study.db"


def subnets(toy: Toy, count: int) -> list[Subnet]:
    return toy.algorithm(population=count).ask()


def record(toy: Toy, subnet: Subnet, generation: int = 0) -> Record:
    return Record(subnet, dict(toy.evaluator(subnet)), generation, 0.25)


def test_optuna_itself_reads_the_study(anywhere: str) -> None:
    toy = Toy()
    shared = toy.shared(anywhere)
    one, two = subnets(toy, 2)
    done = record(toy, one)
    shared.add(toy.space, done, toy.constraints)
    shared.enqueue(toy.space, two, 1, toy.constraints, toy.evaluator.known(two))

    study = optuna.load_study(study_name="toy", storage=open_storage(anywhere))
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    first, second = study.trials
    assert first.state == optuna.trial.TrialState.COMPLETE
    assert first.values == [done.values["accuracy"], done.values["bitops"]]
    assert first.params == dict(one) and second.params == dict(two)
    assert first.distributions["b0.op"] == optuna.distributions.CategoricalDistribution(("conv", "pool"))
    # The column of the hard constraint and that of the cost; what is feasible there is feasible here.
    assert first.user_attrs["bytes <= 1.5 kB"] == first.user_attrs["bytes"] == done.values["bytes"] <= 1500
    assert first.system_attrs["constraints"] == [0.0]
    assert second.state == optuna.trial.TrialState.WAITING
    assert second.user_attrs["bytes"] == toy.evaluator(two)["bytes"]
    assert [trial.number for trial in study.best_trials] == [0]
    assert shared.records() == [done] and shared.records(before=0) == []


def test_every_job_goes_to_one_worker_and_comes_back_whole(where: str) -> None:
    toy = Toy()
    shared = toy.shared(where)
    asked = subnets(toy, 4)
    for subnet in asked:
        shared.enqueue(toy.space, subnet, 3)
    workers = [SharedStudy.join(open_storage(where), "toy") for _ in range(2)]
    jobs = [workers[index % 2].claim() for index in range(5)]
    assert [job.subnet for job in jobs if job is not None] == asked and jobs[4] is None
    for job in jobs[:4]:
        assert job is not None and job.generation == 3
        assert workers[0].finish(job, toy.evaluator(job.subnet), 0.5, "me")
    assert {(one.subnet, one.generation, one.seconds) for one in shared.records()} == {(s, 3, 0.5) for s in asked}
    assert all(one.values == toy.evaluator(one.subnet) for one in shared.records())


def test_workers_at_the_same_time_never_get_the_same_job(anywhere: str) -> None:
    toy = Toy()
    shared = toy.shared(anywhere)
    for subnet in subnets(toy, 12):
        shared.enqueue(toy.space, subnet, 0)
    studies = [SharedStudy.join(open_storage(anywhere)) for _ in range(3)]
    barrier, taken = threading.Barrier(3), [list[str]() for _ in range(3)]

    def take(study: SharedStudy, mine: list[str]) -> None:
        barrier.wait()
        while (job := study.claim()) is not None:
            mine.append(job.subnet.id)

    running = [threading.Thread(target=take, args=pair) for pair in zip(studies, taken, strict=True)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert sorted(one for mine in taken for one in mine) == sorted(trial.user_attrs["id"] for trial in shared.trials())


def test_what_a_lost_worker_brings_is_refused(where: str) -> None:
    toy = Toy()
    shared = toy.shared(where)
    (subnet,) = subnets(toy, 1)
    shared.enqueue(toy.space, subnet, 0)
    worker = SharedStudy.join(open_storage(where))
    job = worker.claim()
    assert job is not None
    assert shared.give_up(shared.trials()[0], "silent")
    assert not worker.finish(job, toy.evaluator(subnet), 1.0)
    assert shared.records() == [] and not shared.give_up(shared.trials()[0], "again")
    # The same call twice, because its first answer was lost, is no refusal.
    shared.enqueue(toy.space, subnet, 0)
    again = worker.claim()
    assert again is not None
    assert worker.finish(again, toy.evaluator(subnet), 1.0) and worker.finish(again, toy.evaluator(subnet), 1.0)
    assert len(shared.records()) == 1


def test_a_study_of_another_space_or_run_names_both(where: str) -> None:
    toy, other = Toy(), Toy(blocks=5)
    toy.shared(where, id="run one")
    toy.shared(where, id="run one")
    both = f"fingerprint is {toy.space.fingerprint}, yours is {other.space.fingerprint}"
    with pytest.raises(InputError, match=f"'toy' in the storage is of another search space: its {both}.*--study NAME"):
        other.shared(where, id="run one")
    with pytest.raises(InputError, match="another search: its run is run one, yours is run two"):
        toy.shared(where, id="run two")
    optuna.create_study(study_name="mine", storage=open_storage(where), directions=["maximize", "minimize"]).add_trial(
        optuna.trial.create_trial(values=[1.0, 2.0])
    )
    with pytest.raises(InputError, match="'mine' in the storage was not made by nasq"):
        toy.shared(where, "mine")


def test_a_worker_chooses_among_studies(where: str) -> None:
    with pytest.raises(InputError, match=r"holds no study\. Begin one with 'nasq search RUN --storage URL'"):
        SharedStudy.join(open_storage(where))
    toy = Toy()
    toy.shared(where, "a")
    assert SharedStudy.join(open_storage(where)).facts["space"] == toy.space.fingerprint
    toy.shared(where, "b")
    with pytest.raises(InputError, match="several studies; it has: a, b"):
        SharedStudy.join(open_storage(where))
    with pytest.raises(InputError, match="no study 'c'; it has: a, b"):
        SharedStudy.join(open_storage(where), "c")
    assert SharedStudy.join(open_storage(where), "b").name == "b"


def test_a_torn_line_of_the_journal_is_cut_off_before_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    toy = Toy()
    shared = toy.shared(path)
    one, two, three = subnets(toy, 3)
    shared.enqueue(toy.space, one, 0)
    whole = path.read_bytes()
    shared.enqueue(toy.space, two, 0)
    last = path.read_bytes()[len(whole) :]
    for end in (1, len(last) // 2, len(last) - 1):
        path.write_bytes(whole + last[:end])
        # Both where the journal is opened again and where somebody goes on who had it open.
        reader = SharedStudy.join(open_storage(path))
        assert path.read_bytes() == whole and len(reader.trials()) == 1
        path.write_bytes(whole + last[:end])
        reader.enqueue(toy.space, three, 0)
        assert [trial.user_attrs["id"] for trial in SharedStudy.join(open_storage(path)).trials()] == [one.id, three.id]
    lines = whole.splitlines(keepends=True)
    for damaged in ([lines[0], b"{broken}\n", *lines[1:]], [*lines, b"{broken}\n"], [b"broken\n"]):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(ArtifactError, match=r"study\.log is damaged: .*Move it away"):
            open_storage(path)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "nosql://me:secret@host/x",
            "'nosql://me:\\*\\*\\*@host/x' is of an unknown kind of database. Allowed: postgresql",
        ),
        ("http//:x://", "storage URL cannot be read. Allowed: postgresql"),
        ("/tmp", "storage /tmp is a directory. Allowed: postgresql"),
    ],
)
def test_what_is_no_storage_is_refused(where: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_storage(where)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "module", "command"),
    [
        ("postgresql://me:secret@localhost/x", "psycopg", r"pip install 'nasq\[postgres\]'"),
        ("mysql://me:secret@localhost/x", "MySQLdb", "pip install mysqlclient"),
    ],
)
def test_a_storage_without_its_driver_names_the_command(
    where: str, module: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=f"needs the driver '{module}', .*not installed.*{command}") as caught:
        open_storage(where)
    assert "secret" not in str(caught.value)


def test_a_database_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(
        NasqError, match=r"'postgresql://me:\*\*\*@127\.0\.0\.1:9/x.*' cannot be used: .*Is the server up"
    ) as caught:
        open_storage("postgresql://me:secret@127.0.0.1:9/x?connect_timeout=2")
    assert "secret" not in str(caught.value)
    with pytest.raises(NasqError, match="cannot be used: unable to open database file"):
        open_storage(f"sqlite:///{tmp_path}/nowhere/x.db")
    assert shown("postgresql://me:secret@host/x") == "postgresql://me:***@host/x"


class Flaky:
    def __init__(self, failures: int) -> None:
        self.calls, self._failures = 0, failures

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self._failures:
            raise optuna.exceptions.StorageInternalError("the server closed the connection")
        return self.calls


@pytest.fixture
def ticks() -> Iterator[list[float]]:
    yield [0.0]


def test_a_database_that_comes_back_is_waited_for(ticks: list[float]) -> None:
    reasons: list[str] = []

    def sleep(seconds: float) -> None:
        ticks[0] += seconds

    flaky = Flaky(5)
    assert patiently(flaky, 60, reasons.append, lambda: ticks[0], sleep) == 6
    assert reasons == ["the server closed the connection."]
    with pytest.raises(
        NasqError, match=r"has not answered for 60 s: the server closed the connection\. Nothing is lost"
    ):
        patiently(Flaky(1000), 60, None, lambda: ticks[0], sleep)
    with pytest.raises(ZeroDivisionError):  # anything else is not the storage's
        patiently(lambda: 1 // 0, 60)
