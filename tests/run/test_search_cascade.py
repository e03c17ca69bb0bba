"""A run whose search has a cascade: cheap looks first, final numbers as without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nasq.errors import InputError
from nasq.run.assemble import assemble
from nasq.run.cascade import cascade_of, require_cascade
from nasq.run.config import load_config
from nasq.run.directory import RunDirectory
from nasq.run.flow import open_workshop
from nasq.run.search import Evaluation, _measures, evaluator_of, search_results
from nasq.run.summary import collect
from nasq.search.cascade import LEVELS, Cascade, spent
from tests.run.test_search_commands import begin_anew
from tests.run.tiny import Call, refused

CASCADE = """
  cascade: {levels: [proxy, predictor, part], proxy: params, images: 0.2, step: 40, recalibration_images: 64,
    confidence: 0.5, dominators: 1, least: 4}
"""


def changed(run: Path, extra: str) -> Path:
    """The run with another search, not begun yet."""
    text = (run / "config.yaml").read_text()
    begin, end = text.index("  cascade:"), text.index("\nexport:")
    text = text[:begin] + extra.strip("\n") + text[end:]
    (run / "config.yaml").write_text(text.replace("evaluations: 8", "evaluations: 14"))
    return run


def test_a_run_searches_with_every_level(copied: Path, call: Call) -> None:
    run = changed(begin_anew(copied), CASCADE)
    done = call("search", run, "--json")
    assert done.code == 0, done.err
    opened = RunDirectory.open(run)
    records = search_results(opened)[1]
    table = {row.level: row for row in spent(records)}
    assert table["proxy"].subnets == len(records) == 14
    assert table["full"].ended == sum(record.full for record in records) >= 4
    # What is final is what the plain evaluation says; what is not is only an estimate, and no part of the report's front.
    workshop = open_workshop(opened)
    evaluation = Evaluation(workshop)
    final = [record for record in records if record.full]
    assert all(evaluation.accuracy(one.subnet) == one.values["accuracy"] for one in final[:3])
    data = collect(opened)
    assert data.search is not None
    assert not {point.id for point in data.search.points if point.front} - {record.subnet.id for record in final}
    cards = {card.label: card for card in data.facts}
    assert [label for label in cards if label.startswith("Cascade")] == [f"Cascade: {level}" for level in LEVELS]
    assert cards["Cascade: proxy"].note.startswith("14 subnets, ") and "99 % of it after" in cards["Hypervolume"].note

    # The part is a random fifth of the validation images, the same for every subnet, with statistics of its own.
    cascade = evaluator_of(workshop, evaluation)[1]
    assert isinstance(cascade, Cascade) and cascade._part is not None
    steps = list(cascade._part(final[0].subnet))
    assert [seen for _, seen in steps] == [40, 80, 120, 160, 200, 220]
    assert steps == list(cascade._part(final[0].subnet))
    assert abs(steps[-1][0] / 220 - final[0].values["accuracy"]) < 0.2


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "search.objectives=[bytes,accuracy]",
            ["accuracy: it must be the first objective", "search.cascade.levels empty"],
        ),
        ("search.objectives=[accuracy,latency]", ["all others must be costs"]),
        ("search.cascade.proxy=naswott", ["unknown", "'naswott'", "Did you mean 'naswot'?"]),
        ("search.cascade.proxy=az_nas", ["'az_nas', which compares candidates"]),
        ("search.cascade.levels=[proxies]", ["'search.cascade.levels.0' is 'proxies'"]),
        (
            "search.cascade.level=[part]",
            ["unknown config key 'search.cascade.level'", "Did you mean 'search.cascade.levels'?"],
        ),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    setting: str, words: list[str], tmp_path: Path, call: Call
) -> None:
    run = tmp_path / "run"
    more = ["--set", "search.cascade.levels=[proxy]"] if "levels" not in setting else []
    refused(call("run", "--preset", "digits", "--out", run, "--quiet", *more, "--set", setting), *words)
    assert not run.exists()


def test_scores_are_of_the_architecture_alone() -> None:
    config = load_config(None, None, ["search.cascade={levels: [proxy], proxy: params}", "data.validation=1200"])
    workshop = assemble(config)
    require_cascade(workshop)
    with pytest.raises(InputError, match="accuracy"):
        require_cascade(
            assemble(config.model_copy(update={"search": config.search.model_copy(update={"objectives": ("bytes",)})}))
        )
    evaluation = Evaluation(workshop)
    objectives, _ = evaluator_of(workshop, evaluation)
    cascade = cascade_of(workshop, evaluation, objectives, list(_measures(workshop).values()))
    assert cascade._proxy is not None
    space = workshop.supernet.space
    largest, smallest = space.largest(), space.smallest()
    few_bits = space.canonical({**largest, **{name: smallest[name] for name in smallest if name.endswith("_bits")}})
    assert cascade._proxy(largest) == cascade._proxy(few_bits) > cascade._proxy(smallest)
