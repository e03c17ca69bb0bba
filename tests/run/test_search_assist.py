"""Searches of a run that a cheap score assists, or that look at part of the images first; killed, they go on."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nasq.data import Split
from nasq.errors import ArtifactError, InputError, NasqError
from nasq.run.architecture import ArchitectureScore, single_proxy
from nasq.run.assemble import Workshop
from nasq.run.config import AssistConfig, load_config
from nasq.run.directory import RunDirectory
from nasq.run.flow import open_workshop
from nasq.run.kept import KeptValues
from nasq.run.search import Evaluation, constraints_of, require_objectives, search
from nasq.search import sample_feasible
from nasq.space import Subnet
from tests.run.test_run_kill import _wait as wait
from tests.run.test_search_commands import begin_anew
from tests.run.tiny import Call, Run, start, subnets

# One of each kind in every run of the tests; the others are driven without a run in tests/search/test_algorithms.py.
ASSISTED = [
    "regularized_evolution",
    *(pytest.param(one, marks=pytest.mark.long) for one in ("random", "reinforce", "bohb")),
]
PARTIAL = ["bohb", *(pytest.param(one, marks=pytest.mark.long) for one in ("successive_halving", "hyperband"))]


class Died(Exception):
    """What a kill is to the code that it hits."""


class Made(Evaluation):
    """Made-up accuracies that grow with a subnet's parameters and waver with the images; counts what it is asked for."""

    def __init__(self, workshop: Workshop) -> None:
        super().__init__(workshop)
        self.images: list[int] = []

    def accuracy(self, subnet: Subnet, split: Split | None = None) -> float:
        count = len(split or self.workshop.data.validation)
        self.images.append(count)
        space = self.workshop.supernet.space
        params = float(self.workshop.costs.evaluate(space.to_rows([subnet]))["params"][0])
        return 1 - 1 / np.log(params) + (int(subnet.id[:4], 16) % 7) / count


@pytest.fixture(scope="module")
def workshop(finished: Run) -> Workshop:
    """Of the tiny run; not to be changed."""
    return open_workshop(RunDirectory.open(finished.directory))


def configured(workshop: Workshop, **settings: Any) -> Workshop:
    config = workshop.config
    wanted = {"evaluations": 6, "population": 4, "uniform_starts": False, **settings}
    changed = config.model_copy(update={"search": config.search.model_copy(update=wanted)})
    return Workshop(changed, workshop.data, workshop.supernet, workshop.costs)


def searched(
    where: Path, workshop: Workshop, die: Callable[[Mapping[str, Any]], bool] | None = None
) -> tuple[list[dict[str, str]], list[int]]:
    """The rows that a search leaves, and how many images each evaluation saw; it may be told to die."""
    where.mkdir(exist_ok=True)

    def listen(event: Mapping[str, Any]) -> None:
        if die is not None and die(event):
            raise Died

    evaluation = Made(workshop)
    try:
        search(RunDirectory(where, listen), workshop, evaluation)
    except Died:
        assert die is not None
    return subnets(where), evaluation.images


def after(event: str, number: int) -> Callable[[Mapping[str, Any]], bool]:
    """Dies at the ``number``-th such event."""
    seen: list[str] = []

    def die(one: Mapping[str, Any]) -> bool:
        seen.append(str(one["event"]))
        return one["event"] == event and seen.count(event) == number

    return die


def mean_params(rows: list[dict[str, str]]) -> float:
    return float(np.mean([float(row["params"]) for row in rows]))


@pytest.mark.parametrize("algorithm", ASSISTED)
def test_an_assisted_search_prefers_its_score_and_goes_on_where_it_died(
    algorithm: str, workshop: Workshop, tmp_path: Path
) -> None:
    assisted = configured(workshop, algorithm=algorithm, assist=AssistConfig(score="params", starts=4, offspring=2))
    whole, _ = searched(tmp_path / "whole", assisted)
    space, rng = assisted.supernet.space, np.random.default_rng(0)
    drawn = sample_feasible(space, constraints_of(assisted), 100, rng).rows
    assert len(whole) == 6 and mean_params(whole) > float(assisted.costs.evaluate(drawn)["params"].mean())
    died, first = searched(tmp_path / "died", assisted, after("search.evaluated", 4))
    assert len(died) == 4
    again, second = searched(tmp_path / "died", assisted)
    assert again == whole
    full = len(workshop.data.validation)
    assert first.count(full) + second.count(full) == 6
    with pytest.raises(InputError, match=r"begun with assist = \['params', 4, 2\] and is continued with None"):
        search(RunDirectory(tmp_path / "died"), configured(workshop, algorithm=algorithm))


@pytest.mark.parametrize("algorithm", PARTIAL)
def test_what_was_seen_of_part_of_the_images_outlives_a_kill(
    algorithm: str, workshop: Workshop, tmp_path: Path
) -> None:
    wanted = configured(workshop, algorithm=algorithm, evaluations=3)
    whole, images = searched(tmp_path / "whole", wanted)
    full = len(workshop.data.validation)
    parts = {round(full / 9), round(full / 3)}
    assert len(whole) == 3 and set(images) == {full, *parts} and images.count(full) == 3
    _, first = searched(tmp_path / "died", wanted, after("search.partial", 4))
    assert len(first) == 4 and full not in first
    assert (tmp_path / "died" / "search" / "partial.jsonl").read_text().count("\n") == 4
    _, second = searched(tmp_path / "died", wanted, after("search.evaluated", 1))
    again, third = searched(tmp_path / "died", wanted)
    assert again == whole and sorted(first + second + third) == sorted(images)


def test_a_proxys_scores_are_computed_once_for_each_architecture(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = AssistConfig(score="naswot", images=8, starts=3)
    assisted = configured(workshop, algorithm="random", evaluations=2, population=2, assist=settings)
    computed: list[str] = []
    plain = ArchitectureScore.__call__

    def counted(self: ArchitectureScore, subnet: Subnet) -> float:
        if len(computed) == 4:
            computed.append("")
            raise Died
        computed.append(self.architecture(subnet).id)
        return plain(self, subnet)

    monkeypatch.setattr(ArchitectureScore, "__call__", counted)
    with pytest.raises(Died):
        search(RunDirectory(tmp_path / "run"), assisted, Made(assisted))
    rows, _ = searched(tmp_path / "run", assisted)
    scored = [one for one in computed if one]
    assert len(rows) == 2 and 4 < len(scored) <= 6 and len(set(scored)) == len(scored)
    kept = [json.loads(line) for line in (tmp_path / "run/search/assist.jsonl").read_text().splitlines()]
    assert [one["key"] for one in kept] == scored and {one["of"] for one in kept} == {"naswot on 8 images"}
    # The evaluated ones are those of the best scores among what was drawn.
    by = {one["key"]: one["values"]["score"] for one in kept}
    score = ArchitectureScore(assisted, single_proxy("naswot", "x"), 8)
    taken = {score.architecture(Subnet(json.loads(row["subnet"]))).id for row in rows}
    assert taken == set(sorted(by, key=lambda one: -by[one])[: len(taken)])


def test_assistance_that_cannot_work_is_refused(workshop: Workshop) -> None:
    def refuse(score: str, match: str) -> None:
        with pytest.raises(InputError, match=match):
            require_objectives(configured(workshop, assist=AssistConfig(score=score)))

    refuse("gradsing", r"unknown search.assist.score 'gradsing'. Did you mean 'gradsign'\?")
    refuse("az_nas", "search.assist.score is 'az_nas', which compares candidates with each other")
    require_objectives(configured(workshop, assist=AssistConfig(score="bitops")))
    with pytest.raises(
        InputError, match=r"unknown config key 'search.assist.start'. Did you mean 'search.assist.starts'\?"
    ):
        load_config(preset="digits", changes=["search.assist={score: params, start: 3}"])


def test_settings_of_the_algorithm_reach_it_or_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    def refuse(match: str, algorithm: str = "hyperband", **settings: Any) -> None:
        with pytest.raises(InputError, match=match):
            require_objectives(configured(workshop, algorithm=algorithm, settings=settings))

    refuse("search.settings do not suit 'hyperband': Hyperband got eta 1", eta=1)
    refuse("'random' takes no settings of its own, and 'eta' is given", "random", eta=3)
    refuse("search.settings do not suit 'nsga2': .*'<=' not supported", "nsga2", crossover_rate="often")
    refuse("search.settings holds 'seed', which is no setting of one algorithm", seed=3)
    halving = configured(workshop, algorithm="successive_halving", settings={"eta": 2, "lowest": 0.5}, evaluations=1)
    _, images = searched(tmp_path / "run", halving)
    assert set(images) == {len(workshop.data.validation), len(workshop.data.validation) // 2}


def test_a_score_that_is_not_finite_says_what_to_change(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ArchitectureScore, "__call__", lambda self, subnet: float("nan"))
    assisted = configured(workshop, algorithm="random", assist=AssistConfig(score="naswot", images=8))
    with pytest.raises(NasqError, match=r"'naswot' scores subnet \w+ nan, .* Take another score: search.assist.score"):
        search(RunDirectory(tmp_path / "run"), assisted, Made(assisted))


def test_kept_values_survive_a_line_that_was_cut_and_refuse_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    assert KeptValues(path, "a").get("x", lambda: {"v": 1}) == {"v": 1.0}
    KeptValues(path, "b").get("x", lambda: {"v": 2})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"of": "a", "key": "y", "val')
    again = KeptValues(path, "a")
    assert path.read_bytes() == whole and "x" in again and "y" not in again
    assert again.get("x", dict) == {"v": 1.0}
    with pytest.raises(ValueError, match="JSON"):
        again.get("z", lambda: {"v": float("nan")})
    path.write_bytes(b'{"of": "a"}\n' + whole)
    with pytest.raises(ArtifactError, match=r"damaged in line 1\. Remove that line"):
        KeptValues(path, "a")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("algorithm", PARTIAL)
def test_a_search_with_rungs_that_is_killed_ends_as_if_it_had_not_been(
    algorithm: str, finished: Run, copied: Path, tmp_path: Path, call: Call
) -> None:
    config = begin_anew(copied) / "config.yaml"
    text = config.read_text().replace("algorithm: nsga2", f"algorithm: {algorithm}")
    config.write_text(text.replace("score: null", "score: params").replace("evaluations: 8", "evaluations: 3"))
    whole = shutil.copytree(copied, tmp_path / "whole")
    assert call("search", whole, "--quiet").code == 0
    for wanted in ({"event": "search.partial"}, {"event": "search.evaluated", "done": 1}):
        process = start("search", copied, "--quiet")
        wait(process, copied, wanted)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert call("search", copied, "--quiet").code == 0
    assert subnets(copied) == subnets(whole)
    lines = [(one / "search/partial.jsonl").read_text().splitlines() for one in (copied, whole)]
    assert sorted(lines[0]) == sorted(lines[1])
