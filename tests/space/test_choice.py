from __future__ import annotations

import copy
import pickle
from math import nan

import numpy as np
import pytest

from nasq.errors import InputError
from nasq.space import Choice


def test_default_is_the_last_of_ordered_numbers_and_else_the_first():
    assert Choice("kernel", (3, 5, 7)).default == 7
    assert Choice("kernel", (3, 5, 7), ordered=False).default == 3
    assert Choice("op", ("conv", "pool")).default == "conv"
    assert Choice("flag", (False, True)).default is False
    assert Choice("kernel", (3, 5, 7), default=5).default == 5


@pytest.mark.parametrize("options", [range(2, 9), [2, 3, 4, 5, 6, 7, 8], np.arange(2, 9), (b for b in range(2, 9))])
def test_options_come_from_any_iterable_and_become_plain_python(options):
    choice = Choice("bits", options)
    assert choice.options == tuple(range(2, 9))
    assert {type(option) for option in choice.options} == {int}


def test_a_set_is_sorted_because_its_order_changes_from_run_to_run():
    assert Choice("op", {"pool", "conv", "skip"}).options == ("conv", "pool", "skip")
    assert Choice("kernel", {7, 3, 5}).options == (3, 5, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Choice("", (1,)), r"a choice's name is ''. Give a printable text"),
        (lambda: Choice(" a", (1,)), "without spaces"),
        (lambda: Choice(3, (1,)), "name is 3"),
        (lambda: Choice("a\nb", (1,)), "printable"),
        (lambda: Choice("op", ()), "choice 'op' has no options"),
        (lambda: Choice("op", "conv"), "options of choice 'op' are 'conv'. Give a tuple"),
        (lambda: Choice("op", 3), "options of choice 'op' are 3"),
        (lambda: Choice("op", (3, 3)), "choice 'op' has the options 3 twice"),
        (lambda: Choice("op", (1, True)), "options 1 and True, which are equal in Python"),
        (lambda: Choice("op", (1, 1.0)), "options 1 and 1.0, which are equal"),
        (lambda: Choice("op", (0.0, -0.0)), r"0\.0 twice"),
        (lambda: Choice("op", (nan,)), "not a finite number"),
        (lambda: Choice("op", (None,)), "of type NoneType. Allowed: str, int, float, bool"),
        (lambda: Choice("op", ((1, 2),)), "of type tuple"),
        (lambda: Choice("op", (1, 2), default=3), r"default 3 of choice 'op' is not one of its options \[1, 2\]"),
        (lambda: Choice("op", (1, 2), default=True), "default True"),
    ],
)
def test_bad_choices_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_types_count_when_an_option_is_looked_up():
    choice = Choice("n", (0, 1, 2))
    assert choice.index(1) == choice.index(np.int64(1)) == 1
    assert 1 in choice and True not in choice and 1.0 not in choice and "1" not in choice and None not in choice
    for wrong in (True, 1.0, "1", 7):
        with pytest.raises(InputError, match=r"choice 'n' has no option .* Allowed: 0, 1, 2"):
            choice.index(wrong)
    assert Choice("b", (False, True)).index(True) == 1


def test_equality_and_hash_see_types_and_every_field():
    same = Choice("a", (1, 2))
    assert same == Choice("a", [1, 2]) and hash(same) == hash(Choice("a", [1, 2]))
    others = [
        Choice("b", (1, 2)), Choice("a", (1, 2, 3)), Choice("a", (1.0, 2)), Choice("a", (True, 2)),
        Choice("a", (1, 2), default=1), Choice("a", (1, 2), default=2, ordered=False),
    ]  # fmt: skip
    assert all(same != other for other in others)
    assert same != "a"


def test_a_choice_is_immutable_and_survives_pickle_and_deepcopy():
    choice = Choice("a", (1, 2), default=1)
    with pytest.raises(AttributeError, match="immutable"):
        choice.default = 2
    with pytest.raises(AttributeError, match="immutable"):
        del choice.name
    assert choice.default == 1
    assert pickle.loads(pickle.dumps(choice)) == choice == copy.deepcopy(choice) == copy.copy(choice)
    assert repr(choice) == "Choice('a', (1, 2), default=1, ordered=True)"
    assert eval(repr(choice)) == choice
