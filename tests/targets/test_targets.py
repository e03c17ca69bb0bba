from __future__ import annotations

import pickle
from importlib import resources

import numpy as np
import pytest

from nasq.errors import InputError, TargetError
from nasq.quant.operations import KINDS
from nasq.space import Choice, SearchSpace
from nasq.targets import FEATURES, OPERATORS, Removal, Target, load, names

GENERIC = (resources.files("nasq.targets") / "generic.toml").read_text()


def space(**options):
    return SearchSpace([Choice(name.replace("__", "."), given) for name, given in options.items()])


def test_a_space_is_restricted_to_what_the_target_runs_with_a_reason_for_each_removal():
    given = space(a__weight_bits=(1, 4, 8), a__weight_symmetry=("symmetric", "asymmetric"), b__depth=(1, 2, 99))
    kept, gone = load("onnxruntime-cpu").restrict(given)
    assert [choice.options for choice in kept.choices] == [(4, 8), ("symmetric",), (1, 2, 99)]
    assert [(one.choice, one.option) for one in gone] == [("a.weight_bits", 1), ("a.weight_symmetry", "asymmetric")]
    assert str(gone[0]).startswith("a.weight_bits: onnxruntime-cpu does not take 1-bit weights: one signed bit holds")
    assert "0.8x of fp32 speed" in str(gone[1])
    assert load("generic").restrict(kept) == (kept, ())


def test_choices_with_names_of_their_own_are_restricted_where_their_feature_is_given():
    given = space(bits=(2, 8), depth=(2, 4))
    assert load("tensorrt").restrict(given) == (given, ())
    kept, gone = load("tensorrt").restrict(given, {"bits": "activation_bits"})
    assert [choice.options for choice in kept.choices] == [(8,), (2, 4)]
    assert "a range below 8 bits needs a clip" in str(gone[0])
    with pytest.raises(InputError, match=r"unknown choice 'bit'. Did you mean 'bits'"):
        load("tensorrt").restrict(given, {"bit": "activation_bits"})
    with pytest.raises(InputError, match="unknown feature of a target 'bits'"):
        load("tensorrt").restrict(given, {"bits": "bits"})
    with pytest.raises(TargetError, match=r"choice 'x\.weight_bits' keeps no option: .* 'tensorrt' cannot run 2-bit"):
        load("tensorrt").restrict(space(x__weight_bits=(2, 3)))


def test_a_target_says_why_it_cannot_run_here(monkeypatch):
    assert load("generic").unusable() == "" and load("onnxruntime-cpu").unusable() == ""
    assert load("tensorrt").unusable().startswith("no machine with TensorRT was at hand")
    monkeypatch.setattr("nasq.targets.target.find_spec", lambda name: None)
    assert load("openvino-cpu").unusable() == "not installed: pip install 'nasq[openvino]'"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load("inductor-x86").unusable().startswith("no C++ compiler: apt-get install g++")


@pytest.fixture
def own(tmp_path):
    def write(old: str = "", new: str = "", text: str = GENERIC) -> str:
        assert old in text
        path = tmp_path / "own.toml"
        path.write_text(text.replace(old, new, 1))
        return str(path)

    return write


def test_names_are_those_of_the_data_files():
    assert names() == ("generic", "inductor-x86", "onnxruntime-cpu", "openvino-cpu", "tensorrt", "torch-cuda")


@pytest.mark.parametrize("name", names())
def test_every_shipped_target_is_complete(name):
    target = load(name)
    assert target.name == name and target.description.endswith(".") and target.evidence
    assert load(name) is target and hash(target) == hash(load(name)) and pickle.loads(pickle.dumps(target)) == target
    assert set(target.operators) <= set(OPERATORS)
    eight = name == "tensorrt"
    assert (target.weight_bits, target.activation_bits) == ((8,) if eight else tuple(range(2, 9)),) * 2
    assert target.executes == ("execution" not in target.refused)
    for feature in FEATURES:
        asked = tuple("group32" if option == "group" else option for option in getattr(target, feature))
        assert target.allow(feature, asked) == (asked, [])


def test_operators_are_the_operations_of_a_program():
    assert set(OPERATORS) == set(KINDS) - {"input"}


def test_the_generic_target_takes_every_form():
    target = load("generic")
    assert target.runtime == "reference" and target.session == {}
    assert target.allow("weight_symmetry", ("symmetric", "asymmetric")) == (("symmetric", "asymmetric"), [])


def test_onnxruntime_refuses_asymmetric_weights_with_the_measured_reason():
    target = load("onnxruntime-cpu")
    kept, removed = target.allow("weight_symmetry", ("symmetric", "asymmetric"))
    assert kept == ("symmetric",)
    assert removed == [Removal("weight_symmetry", "asymmetric", removed[0].reason, "onnxruntime-cpu")]
    assert str(removed[0]) == (
        "onnxruntime-cpu does not take asymmetric weights: weights with a zero-point ran at 0.8x of fp32 speed, where "
        "symmetric ones run at 3.1x."
    )
    assert (target.add, target.container, target.runtime) == ("both", "uint8", "onnxruntime")
    assert target.allow("weight_granularity", ("tensor", "channel"))[1] == []
    assert target.allow("activation_symmetry", ("symmetric", "asymmetric"))[1] == []
    with pytest.raises(
        TargetError, match=r"'onnxruntime-cpu' cannot run asymmetric weights: .*0\.8x.* Allowed .*: symmetric"
    ):
        target.allow("weight_symmetry", ["asymmetric"])


def test_its_session_options_exist():
    onnxruntime = pytest.importorskip("onnxruntime")
    session = load("onnxruntime-cpu").session
    assert hasattr(onnxruntime.GraphOptimizationLevel, session["graph_optimization_level"])
    assert hasattr(onnxruntime.ExecutionMode, session["execution_mode"])
    assert set(session["providers"]) <= set(onnxruntime.get_available_providers())
    options = onnxruntime.SessionOptions()
    assert all(hasattr(options, name) for name in session if name != "providers")


def test_bits_are_split_with_a_reason_each():
    kept, removed = load("onnxruntime-cpu").allow("weight_bits", np.arange(1, 11))
    assert kept == tuple(range(2, 9)) and {type(bits) for bits in kept} == {int}
    assert [(removal.feature, removal.option) for removal in removed] == [("weight_bits", b) for b in (1, 9, 10)]
    assert str(removed[0]).startswith("onnxruntime-cpu does not take 1-bit weights: one signed bit holds only -1 and 0")
    assert (
        str(removed[1])
        == "onnxruntime-cpu does not take 9-bit weights: the runtime's integer kernels take int8 weights."
    )
    assert load("generic").allow("activation_bits", [8, 4, 8])[0] == (8, 4)
    with pytest.raises(
        TargetError, match=r"cannot run 9-bit and 16-bit activations: .*Allowed activation_bits: 2, 3, 4"
    ):
        load("generic").allow("activation_bits", (9, 16))


def test_a_removal_without_a_target_or_a_listed_reason_still_reads(own):
    assert (
        str(Removal("weight_granularity", "tensor", "no")) == "the target does not take weight scales per tensor: no."
    )
    target = load(own('weight_granularity = ["tensor", "channel", "group"]', 'weight_granularity = ["channel"]'))
    assert str(target.allow("weight_granularity", ("channel", "tensor"))[1][0]) == (
        "generic does not take weight scales per tensor: the target lists only channel."
    )


@pytest.mark.parametrize(
    ("feature", "options", "message"),
    [
        ("weight_bit", (8,), "unknown feature of a target 'weight_bit'. Did you mean 'weight_bits'"),
        ("weight_bits", (0,), "weight_bits is 0. Allowed: whole numbers from 1 to 16"),
        ("weight_bits", (17,), "weight_bits is 17"),
        ("weight_bits", (True,), "weight_bits is True"),
        ("weight_bits", (4.0,), r"weight_bits is 4\.0"),
        ("weight_bits", ("8",), "weight_bits is '8'"),
        ("weight_bits", (), "weight_bits was given no options"),
        ("weight_bits", 8, r"options of weight_bits are 8. Give several in a tuple: \(8,\)"),
        ("weight_symmetry", "symmetric", r"in a tuple: \('symmetric',\)"),
        ("weight_symmetry", ("symetric",), "unknown weight symmetry 'symetric'. Did you mean 'symmetric'"),
        ("weight_granularity", (8,), "unknown weight granularity '8'"),
        (
            "weight_granularity",
            ("group",),
            "Allowed: channel, tensor. Groups of inputs are called by their size: 'group32'",
        ),
    ],
)
def test_bad_questions_are_named(feature, options, message):
    with pytest.raises(InputError, match=message):
        load("generic").allow(feature, options)


def test_unknown_targets_are_listed():
    with pytest.raises(InputError, match=r"unknown target 'onnxruntime'. Did you mean 'onnxruntime-cpu'\?.*own"):
        load("onnxruntime")
    with pytest.raises(
        InputError, match=r"none\.toml cannot be read: No such file.*generic, inductor-x86, onnxruntime-cpu"
    ):
        load("/nowhere/none.toml")
    with pytest.raises(InputError, match=r"unknown target '\.\./targets/generic'"):
        load("../targets/generic")


def test_a_file_of_your_own(own):
    target = load(own('name = "generic"', 'name = "mine"'))
    assert isinstance(target, Target) and target.name == "mine" and target.allow("weight_bits", (4,)) == ((4,), [])
    session = load(own("[session]", '[session]\nthreads = 2\nfast = true\nproviders = ["a", "b"]')).session
    assert session == {"threads": 2, "fast": True, "providers": ("a", "b")}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight_symmetry", "weight_symetry", r"unknown key .*own\.toml: .* mean 'weight_symmetry'"),
        ('runtime = "reference"', "", "lacks 'runtime'"),
        ('runtime = "reference"', 'runtime = "tpu"', "'runtime' .* is 'tpu'. Allowed: onnxruntime, openvino"),
        ('add = "both"', 'add = "two"', "is 'two'. Allowed: both, one"),
        ('container = "uint8"', 'container = "int4"', "is 'int4'. Allowed: uint8, int8"),
        ('add = "both"', 'add = "both"\nexact = 1', "'exact' .* is 1. Allowed: true, false"),
        ('add = "both"', 'add = "both"\nexecutes = false', "executes=false and does not give its reason"),
        ("[refused]", '[refused]\nexecution = "x"', "executes=true and refuses"),
        ('name = "generic"', "name = 3", "'name' in the target file .* is 3. Give a text"),
        ('name = "generic"', 'name = " "', "Give a text"),
        ("[2, 3, 4, 5, 6, 7, 8]", "[]", r"'weight_bits' .* is \[\]. Give a list"),
        ("[2, 3, 4, 5, 6, 7, 8]", "8", "'weight_bits' .* is 8. Give a list"),
        ("[2, 3, 4, 5, 6, 7, 8]", "[2, 9]", "holds 9. Allowed: whole numbers from 1 to 8"),
        ("[2, 3, 4, 5, 6, 7, 8]", "[2, true]", "holds True"),
        ("[2, 3, 4, 5, 6, 7, 8]", "[2, 2]", "Name each entry once"),
        ('"conv", "linear"', '"conv", "conv3d"', "'operators' .* holds 'conv3d'. Allowed: conv, linear"),
        ("[slow]", "[slow]\nx = 3", "'x' of 'slow' .* is 3. Give a text"),
        ("[session]", "[session]\nx = [1]", r"'x' of 'session' .* is \[1\]"),
        ("[session]", "session = 3\n[x]", "unknown key"),
        ("[slow]", "[session.slow]", "'slow' of 'session' .* is {}. Give a text, a number"),
        ("[refused]", '[refused]\n"weight_bit:1" = "x"', "unknown feature .*'weight_bit'. Did you mean 'weight_bits'"),
        ("[refused]", '[refused]\n"weight_symmetry:odd" = "x"', "unknown option of 'weight_symmetry' .*'odd'"),
        ("[refused]", '[refused]\n"weight_bits:2" = "x"', "both allows and refuses 'weight_bits:2'"),
        ("[refused]", "[refused", "is not TOML"),
    ],
)  # fmt: skip
def test_own_files_are_checked_strictly(own, old, new, message):
    with pytest.raises(InputError, match=message):
        load(own(old, new))


def test_reasons_are_a_table(own):
    with pytest.raises(InputError, match=r"'slow' .* is 3. Give a table: \[slow\]"):
        load(own("add =", "slow = 3\nadd =", GENERIC.replace("[slow]", "")))
