from __future__ import annotations

import copy
import hashlib
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasq.errors import InputError
from nasq.space import Subnet

OPTIONS = st.one_of(st.text(max_size=4), st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False))
SUBNETS = st.dictionaries(st.text(max_size=4), OPTIONS, max_size=5)


@given(SUBNETS)
def test_json_round_trip(options):
    subnet = Subnet(options)
    again = Subnet.from_json(subnet.to_json())
    assert again == subnet and hash(again) == hash(subnet) and again.id == subnet.id
    assert {name: type(value) for name, value in again.items()} == {
        name: type(value) for name, value in options.items()
    }


@given(SUBNETS, SUBNETS)
def test_equal_exactly_where_the_json_is(a, b):
    assert (Subnet(a) == Subnet(b)) == (Subnet(a).to_json() == Subnet(b).to_json())


def test_order_does_not_matter_and_types_do():
    assert Subnet({"b": 1, "a": 2}) == Subnet({"a": 2, "b": 1}) == {"b": 1, "a": 2}
    assert list(Subnet({"b": 1, "a": 2})) == ["a", "b"]
    kinds = [Subnet({"a": value}) for value in (1, 1.0, True, "1")]
    assert len(set(kinds)) == len({subnet.id for subnet in kinds}) == 4
    assert all(x != y for i, x in enumerate(kinds) for y in kinds[:i])
    assert Subnet({"a": 1}) != {"a": True} and Subnet() != 3


def test_the_canonical_form_is_fixed():
    subnet = Subnet({"stem.width": 16, "act": "ré", "flag": True, "scale": 0.5, "zero": -0.0})
    text = '{"act":"r\\u00e9","flag":true,"scale":0.5,"stem.width":16,"zero":0.0}'
    assert subnet.to_json() == text
    assert subnet.id == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert Subnet().id == "44136fa355b3"  # of "{}"


def test_it_is_immutable_and_copies_change_only_what_is_named():
    subnet = Subnet({"a": 1, "b.c": 2})
    with pytest.raises(TypeError):
        subnet["a"] = 2
    assert subnet.replace(a=5) == {"a": 5, "b.c": 2}
    assert subnet.updated({"b.c": 3, "d": "x"}) == {"a": 1, "b.c": 3, "d": "x"}
    assert subnet == {"a": 1, "b.c": 2}
    source = {"a": 1}
    held = Subnet(source)
    source["a"] = 9
    assert held["a"] == 1
    assert pickle.loads(pickle.dumps(subnet)) == subnet == copy.deepcopy(subnet)
    assert repr(subnet) == "Subnet({'a': 1, 'b.c': 2})"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[1]", r"is '\[1\]'. Give an object"),
        ('{"a":1,"a":2}', "duplicate key 'a'"),
        ('{"a":NaN}', "NaN is not JSON"),
        ('{"a":1e999}', "the option of 'a' is inf"),
        ('{"a":[1]}', r"the option of 'a' is \[1\]"),
        ('{"a":null}', "NoneType"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        Subnet.from_json(text)


def test_names_are_texts():
    with pytest.raises(InputError, match="name in a subnet is 3"):
        Subnet({3: 1})
