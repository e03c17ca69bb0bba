from __future__ import annotations

import csv
import gzip
import itertools
import os
from pathlib import Path

import pytest
import torch
from nasq.search_spaces.nas_bench_macro import BLOCKS, NasBenchMacro, from_name, name_of, nas_bench_macro
from torch import nn

from nasq import Supernet
from nasq.cost import CostModel, counted_macs
from nasq.errors import InputError


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    return Supernet(NasBenchMacro(width=0.125)).eval()


def test_names_go_both_ways_for_every_network(supernet: Supernet) -> None:
    names = ["".join(digits) for digits in itertools.product("012", repeat=8)]
    assert supernet.space.size == len(names) == 6561
    for name in names:
        assert name_of(from_name(name)) == name
    assert supernet.space.contains(from_name("01201201"))


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("NASQ_DATA"), reason="set NASQ_DATA to the directory of the public data sets")
def test_every_row_of_the_published_table() -> None:
    with gzip.open(Path(os.environ["NASQ_DATA"]) / "tables" / "nas_bench_macro_cifar10.csv.gz", "rt") as file:
        table = list(csv.DictReader(file))
    supernet = Supernet(nas_bench_macro())
    subnets = [from_name(row["arch"]) for row in table]
    found = CostModel(supernet, torch.zeros(1, 3, 32, 32)).evaluate(supernet.space.to_rows(subnets))
    assert len(set(subnets)) == 6561
    assert found["params"].tolist() == [int(row["params"]) for row in table]
    assert [f"{value:.6e}" for value in found["macs"]] == [f"{float(row['flops']):.6e}" for row in table]


def published_counts(name: str) -> tuple[int, int]:
    """Parameters and multiply-adds by hand, from the published description."""
    params = macs = 0

    def conv(channels: int, out: int, kernel: int, side: int, groups: int = 1) -> None:
        nonlocal params, macs
        weights = channels // groups * out * kernel**2
        params, macs = params + weights + 2 * out, macs + weights * side**2

    conv(3, 32, 3, 32)
    channels, side, digits = 32, 32, iter(name)
    for layers, out in ((2, 64), (3, 128), (3, 256)):
        for position in range(layers):
            after = side if position else side // 2
            kernel, expansion = {"0": (1, 0), "1": (3, 3), "2": (5, 6)}[next(digits)]
            if expansion:
                hidden = channels * expansion
                conv(channels, hidden, 1, side)
                conv(hidden, hidden, kernel, after, groups=hidden)
                conv(hidden, out, 1, after)
            elif not position:
                conv(channels, out, 1, after)
            channels, side = out, after
    conv(channels, 1280, 1, side)
    return params + 1280 * 10 + 10, macs + 1280 * 10


def test_costs_of_every_network_follow_the_description() -> None:
    supernet = Supernet(nas_bench_macro())
    names = ["".join(digits) for digits in itertools.product("012", repeat=8)]
    rows = supernet.space.to_rows([from_name(name) for name in names])
    found = CostModel(supernet, torch.zeros(1, 3, 32, 32)).evaluate(rows)
    wanted = [published_counts(name) for name in names]
    assert list(zip(found["params"].tolist(), found["macs"].tolist(), strict=True)) == wanted
    # A row of the published table.
    assert wanted[names.index("02012100")] == (890_666, 47_327_744)


def test_costs_equal_counters_and_extraction_equals_activation(supernet: Supernet) -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = CostModel(supernet, x)
    for seed in range(6):
        subnet = supernet.space.sample(torch.Generator().manual_seed(seed))
        plain, costs = supernet.extract(subnet), model.of(subnet)
        assert costs["params"] == sum(p.numel() for p in plain.parameters())
        assert costs["macs"] == counted_macs(plain, x[:1])
        with supernet.activate(subnet), torch.no_grad():
            assert torch.equal(plain(x), supernet(x))


def test_identities_and_shortcuts_are_where_they_are_published(supernet: Supernet) -> None:
    layers = list(supernet.module.layers)
    assert [isinstance(layer.branches["identity"], nn.Identity) for layer in layers] == [
        False, True, False, True, True, False, True, True,
    ]  # fmt: skip
    for layer in layers:
        same = isinstance(layer.branches["identity"], nn.Identity)
        assert [layer.branches[name].shortcut for name in BLOCKS[1:]] == [same, same]


def test_the_network_knows_official_names(supernet: Supernet) -> None:
    subnet = from_name("22212220")
    assert supernet.module.official_name(subnet) == "22212220"
    assert supernet.module.from_official_name("22212220") == subnet


@pytest.mark.parametrize("text", ["", "2221222", "222122200", "22212223", "2221222 ", "2221222\u00b2"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is no NAS-Bench-Macro network.*leading zeros count"):
        from_name(text)


def test_other_refusals() -> None:
    with pytest.raises(InputError, match=r"no block for 'layer0'\. Give one of identity, mb3_k3, mb6_k5"):
        name_of({})
    with pytest.raises(InputError, match="unknown block of 'layer7': 'mb9'"):
        name_of({**from_name("00000000"), "layer7": "mb9"})
    for width in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match=r"the width .* which has to be above 0"):
            nas_bench_macro(width=width)
