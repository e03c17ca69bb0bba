from __future__ import annotations

import gzip
from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nasq import Choice, Subnet, Supernet, elastic
from nasq.errors import ArtifactError, InputError
from nasq.ranking.table import Table
from nasq.ranking.table_names import OfficialNames, from_official_name, official_name


class Named(nn.Module):
    """Two layers of a width each; the name is both widths."""

    def __init__(self) -> None:
        super().__init__()
        self.a = elastic.Linear(4, Choice("a", (1, 2, 3)))
        self.b = elastic.Linear(4, Choice("b", (1, 2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).sum(1) + self.b(x).sum(1)

    def official_name(self, subnet: object) -> str:
        return f"{subnet['a']}x{subnet['b']}"  # type: ignore[index]

    def from_official_name(self, text: str) -> Subnet:
        a, _, b = text.partition("x")
        if not (a.isdigit() and b.isdigit()):
            raise InputError(f"{text!r} is no name. Give two widths, such as 1x2.")
        return Subnet({"a": int(a), "b": int(b)})


def table() -> Table:
    subnets = [Subnet({"a": a, "b": b}) for a in (1, 2, 3) for b in (1, 2)]
    metrics = {"acc": np.array([0.5, 1 / 3, nan, 1e-12, -7, 2**40]), "params": np.arange(6.0)}
    return Table(metrics, [f"{s['a']}x{s['b']}" for s in subnets], subnets)


def test_official_names_are_an_optional_protocol() -> None:
    network = Named()
    assert isinstance(network, OfficialNames) and not isinstance(nn.Identity(), OfficialNames)
    assert official_name(network, {"a": 1, "b": 2}) == "1x2" and official_name(nn.Identity(), {}) == ""
    assert from_official_name(network, "1x2") == Subnet({"a": 1, "b": 2})
    with pytest.raises(InputError, match="Identity has no official names, and a subnet is called '1x2'"):
        from_official_name(nn.Identity(), "1x2")


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "deep/er/t.csv"])
def test_writing_and_reading_give_equal_tables(tmp_path: Path, name: str) -> None:
    path, wanted = tmp_path / name, table()
    wanted.write(path)
    found = Table.read(path)
    assert found.names == wanted.names and found.subnets == wanted.subnets
    assert list(found.metrics) == ["acc", "params"]
    for key, values in wanted.metrics.items():
        assert np.array_equal(found.metrics[key], values, equal_nan=True)
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")


@given(st.lists(st.floats(allow_nan=True), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_every_float_survives(values: list[float]) -> None:
    written = Table({"m": np.array(values)}, [str(number) for number in range(len(values))]).to_csv()
    assert np.array_equal(Table.parse(written, "x").metrics["m"], np.array(values), equal_nan=True)


def test_names_are_text_and_unknown_values_are_nan() -> None:
    found = Table.parse("subnet_id,name,acc,b\nq,007,1e3,\nr,08, 2 ,nan\n\n", "x")
    assert found.names == ["007", "08"] and not found.subnets and len(found) == 2
    assert found.metrics["acc"].tolist() == [1000, 2] and np.isnan(found.metrics["b"]).all()


def test_score_files_without_official_names() -> None:
    found = Table.parse('subnet_id,name,subnet,score\nq,,"{""a"":1}",3\n', "x")
    assert not found.names and found.subnets == [Subnet({"a": 1})]


def test_columns_and_rows() -> None:
    whole = table()
    assert whole.column()[0] == "acc" and whole.column("params")[1].tolist() == [0, 1, 2, 3, 4, 5]
    part = whole.rows([5, 0])
    assert part.names == ["3x2", "1x1"] and part.subnets[0] == Subnet({"a": 3, "b": 2})
    assert part.metrics["params"].tolist() == [5, 0]
    with pytest.raises(InputError, match=r"unknown metric of the table 'parms'\. Did you mean 'params'"):
        whole.column("parms")
    with pytest.raises(InputError, match="the table has no metric, only the subnets"):
        Table({}, subnets=whole.subnets).column()


def test_members_are_checked_against_the_space() -> None:
    network = Named()
    space = Supernet(network).space
    by_name = Table({}, ["1x2", "3x3"])
    assert by_name.members(network, space) == [Subnet({"a": 1, "b": 2}), Subnet({"a": 3, "b": 3})]
    assert table().members(nn.Identity(), space) == list(table().subnets)
    with pytest.raises(InputError, match=r"row 2 of the table is not in the space: choice 'b' has no option 9"):
        Table({}, ["1x2", "1x9"]).members(network, space)
    with pytest.raises(InputError, match="row 1 of the table is not in the space: 'best' is no name"):
        Table({}, ["best"]).members(network, space)


REFUSED = {
    "acc\n1\n": "x has no column 'name' or 'subnet', only acc",
    "name,acc\n": "x has no rows, or a column without a name",
    "name,,acc\na,1,2\n": "x has no rows, or a column without a name",
    "name,acc,acc\na,1,2\n": "x has the column 'acc' twice",
    "name,acc\na,1\nb\n": "x has 1 cells in line 3 and 2 columns. It is truncated",
    "name,acc\na,good\n": "x has 'good' in line 2, column 'acc', which is no number",
    "subnet,acc\n{,1\n": "x, line 2: a subnet's JSON cannot be read",
    'name,acc\n"a,1\n': "x is no CSV in line 2",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        Table.parse(text, "x")
    assert REFUSED[text] in str(caught.value)


def test_subnets_stand_once_and_every_row_has_one() -> None:
    with pytest.raises(InputError, match=r"x has the name a twice\. Keep one row per subnet"):
        Table.parse("name,acc\na,1\nb,2\na,3\n", "x")
    with pytest.raises(InputError, match="Every row needs a name or a subnet"):
        Table.parse("name,acc\na,1\n,2\n", "x")
    with pytest.raises(InputError, match=r"\(rows: \[1, 2\]\)"):
        Table({"acc": np.ones(2)}, ["a"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.csv is missing"):
        Table.read(tmp_path / "nowhere.csv")
    for data in (b"\xff\xfe\x00", gzip.compress(b"name,acc\na,1\n")[:-9]):
        (tmp_path / "bad.csv").write_bytes(data)
        with pytest.raises(ArtifactError, match="cannot be read as text"):
            Table.read(tmp_path / "bad.csv")


def test_a_number_that_is_whole_is_written_without_a_point() -> None:
    assert Table({"m": np.array([3.0, 0.5, nan])}, ["a", "b", "c"]).to_csv() == "name,m\na,3\nb,0.5\nc,\n"
    assert isnan(Table.parse("name,m\nc,\n", "x").metrics["m"][0])
