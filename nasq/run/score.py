"""Scoring many subnets of a space: which ones, on what, in how many processes, and going on after a kill."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nasq import plugins
from nasq.data import load as load_data
from nasq.errors import ArtifactError, InputError, NasqError
from nasq.quant import quantize
from nasq.ranking import Batch, Proxy, combine, expand, load_proxy, score
from nasq.ranking.nodes import NodeStatistics, node_statistics
from nasq.ranking.passes import Passes
from nasq.ranking.table_names import from_official_name, official_name
from nasq.ranking.untrained import calibrate_untrained
from nasq.run.score_file import ScoreFile, column
from nasq.space import Subnet
from nasq.supernet import Supernet

__all__ = ["ScoreJob", "chosen_subnets", "fresh", "run_score"]

WHOLE = 20_000
"""A space up to this size is scored whole where no number is given."""

WAIT = 300.0
"""Seconds that other processes wait for the first."""

Listener = Callable[[int, int], None]


@dataclass(frozen=True)
class ScoreJob:
    """What to score.

    Attributes:
        space: Name of an installed space.
        proxies: Names of installed proxies.
        out: The CSV.
        count: How many subnets, drawn from ``seed``; ``None``: all of a small space.
        subnets: A file of subnets instead.
        data: Name of the data set; ``None``: the space's own where a proxy needs data, noise otherwise.
        data_root: Its directory.
        batch: Images.
        seed: Of subnets, images, initialisation and whatever proxies draw.
        inherit: Whether subnets take the supernet's weights rather than being initialised at their own size.
        weight_bits: Options of weight bits; with ``activation_bits`` the space is quantized first.
        activation_bits: Options of activation bits.
        nodes: Whether the node-wise statistics of ParZC are written, too (``FILE.csv.nodes``).
        output: Which element of a tuple holds the logits.
        chunk: At most so many images at once.
    """

    space: str
    proxies: tuple[str, ...]
    out: Path
    count: int | None = None
    subnets: Path | None = None
    data: str | None = None
    data_root: Path | None = None
    batch: int = 64
    seed: int = 0
    inherit: bool = False
    weight_bits: tuple[int, ...] = ()
    activation_bits: tuple[int, ...] = ()
    nodes: bool = False
    output: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class _Prepared:
    job: ScoreJob
    proxies: list[Proxy]
    supernet: Supernet
    batch: Batch
    file: ScoreFile
    subnets: list[Subnet]


def _stream(seed: int, purpose: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _batch(job: ScoreJob, proxies: Sequence[Proxy], info: plugins.SpaceInfo) -> tuple[Batch, str]:
    """The images and labels, and what they are in words."""
    needing = [one.name for one in proxies if one.needs.data or one.needs.labels]
    if job.data is None and not needing and not job.nodes:
        return (torch.randn(job.batch, *info.input_shape, generator=_stream(job.seed, "images")), None), "noise"
    name = job.data or info.data
    if not name:
        raise InputError(
            f"{', '.join(needing) or '--nodes'} needs images and the space {job.space!r} names no data set of its own. "
            "Give one: --data NAME --data-root DIR."
        )
    data = load_data(name, job.data_root, seed=0)
    if data.input_shape != info.input_shape:
        raise InputError(
            f"the images of {name!r} are {list(data.input_shape)} and {job.space!r} takes {list(info.input_shape)}. "
            "Give a data set of that shape: --data."
        )
    if not 1 <= job.batch <= len(data.train):
        raise InputError(f"the batch is {job.batch}. Allowed: 1 to {len(data.train)}, the training images of {name!r}.")
    at = torch.randperm(len(data.train), generator=_stream(job.seed, "images"))[: job.batch]
    return (data.normalise(data.train.images[at]), data.train.labels[at]), f"{name} {data.fingerprint}"


def _network(job: ScoreJob, factory: Any, x: Tensor) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        network: nn.Module = factory()
    if not job.weight_bits and not job.activation_bits:
        return network
    if not job.weight_bits or not job.activation_bits:
        raise InputError("a quantized space needs options for both: --weight-bits and --activation-bits.")
    quantized = quantize(network, x[:1], weight_bits=job.weight_bits, activation_bits=job.activation_bits)
    # Step sizes from the scored batch: a score of a network whose grids mean nothing means nothing.
    calibrate_untrained(quantized, x)
    return quantized


def chosen_subnets(job: ScoreJob, supernet: Supernet) -> list[Subnet]:
    """The subnets to score, canonical, each once.

    Raises:
        InputError: The space is too large to be scored whole, or the file of subnets cannot be read.
    """
    space = supernet.space
    if job.subnets is not None:
        return list(dict.fromkeys(space.canonical(one) for one in _listed(job.subnets, supernet)))
    if job.count is None and space.size > WHOLE:
        raise InputError(
            f"{job.space!r} holds {space.size:,} subnets; only spaces of up to {WHOLE:,} are scored whole. Give --count N."
        )
    wanted = space.size if job.count is None else min(job.count, space.size)
    if wanted < 1:
        raise InputError(f"--count is {job.count}. Allowed: 1 or more.")
    rng, found = _stream(job.seed, "subnets"), dict[Subnet, None]()
    if wanted == space.size and space.size <= WHOLE:
        return _every(supernet)
    while len(found) < wanted:
        rows = space.canonical(space.sample_batch(2 * wanted, rng))
        found.update(dict.fromkeys(space.to_subnets(rows)))
    return list(found)[:wanted]


def _every(supernet: Supernet) -> list[Subnet]:
    """All subnets of a small space, in the order of its options."""
    space, found = supernet.space, dict[Subnet, None]()
    if not space.choices:  # one network, such as timm's before bits
        return [space.largest()]
    total = int(np.prod([int(one) for one in space.sizes], dtype=object))
    if total > 50 * WHOLE:
        raise InputError(f"the space has {total:,} combinations, too many to list. Give --count N.")
    rows = np.stack(np.unravel_index(np.arange(total), tuple(int(one) for one in space.sizes)), 1).astype(np.int16)
    settled, member = space.settle(rows)
    found.update(dict.fromkeys(space.to_subnets(settled[member])))
    return list(found)


def _listed(path: Path, supernet: Supernet) -> list[Subnet]:
    """A CSV with a column ``subnet`` or ``name``, or a line of JSON or an official name for each subnet."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"the subnets' file {path} cannot be read: {error}.") from error
    reader = csv.DictReader(io.StringIO(text))
    if {"subnet", "name"} & set(reader.fieldnames or ()):
        cells = [row.get("subnet") or row.get("name") or "" for row in reader]
    else:
        cells = [line.strip() for line in text.splitlines() if line.strip()]
    if not cells:
        raise InputError(f"{path} names no subnet. Give a line (or a row of a CSV with a column 'subnet') for each.")
    return [Subnet.from_json(one) if one.startswith("{") else from_official_name(supernet.module, one) for one in cells]


def _prepare(job: ScoreJob) -> _Prepared:
    proxies = [load_proxy(name) for name in dict.fromkeys(job.proxies)]
    if not proxies and not job.nodes:
        raise InputError("nothing to score with. Give --proxy NAME ('nasq proxies' lists them).")
    factory = plugins.load("search_spaces", job.space)
    info = plugins.space_info(factory)
    batch, words = _batch(job, proxies, info)
    supernet = Supernet(_network(job, factory, batch[0]), job.space)
    names = [one.name for one in expand(proxies)] + [one.name for one in proxies]
    columns = list(dict.fromkeys(names))
    settings = {
        "space": job.space, "fingerprint": supernet.space.fingerprint, "proxies": list(job.proxies), "data": words,
        "batch": job.batch, "seed": job.seed, "inherit": job.inherit, "nodes": job.nodes, "output": job.output,
    }  # fmt: skip
    return _Prepared(
        job, proxies, supernet, batch, ScoreFile(job.out, columns, settings), chosen_subnets(job, supernet)
    )


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """Initialises every module that can do so, as torch's constructors do, in place; returns the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return model


def run_score(job: ScoreJob, listener: Listener | None = None) -> dict[str, Any]:
    """Scores what is not scored yet; with ``RANK`` and ``WORLD_SIZE`` set (torchrun) only this process's share.

    Args:
        job: What to do.
        listener: Told how many rows are done, of how many.

    Returns:
        Facts: the file, the numbers of rows and of values that are not finite by column, whether all rows are there.

    Raises:
        InputError: See :class:`ScoreJob`; or the file holds scores of other settings.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    ready = _prepare(job)
    if rank > 0:
        _wait_for(ready.file.path)
    done = ready.file.open(repair=rank == 0)
    mine = [one for index, one in enumerate(ready.subnets) if index % world == rank and one.id not in done]
    total = len(mine) if world > 1 else len(ready.subnets)
    before = total - len(mine)
    if listener is not None:
        listener(before, total)
    for index, subnet in enumerate(mine):
        name = official_name(ready.supernet.module, subnet)
        ready.file.add(subnet.id, name, subnet.to_json(), *_values(ready, subnet))
        if listener is not None:
            listener(before + index + 1, total)
    with ready.file.locked():
        return _finish(ready)


def _wait_for(path: Path) -> None:
    """The first process makes the file."""
    until = time.monotonic() + WAIT
    while not (path.exists() and path.stat().st_size):
        if time.monotonic() > until:
            raise NasqError(f"{path} was not made by the first process within {WAIT:.0f} s. See what became of it.")
        time.sleep(0.1)


def _values(ready: _Prepared, subnet: Subnet) -> tuple[dict[str, float], NodeStatistics | None]:
    job = ready.job
    model = ready.supernet.extract(subnet)
    seed = int.from_bytes(hashlib.sha256(f"{job.seed}/{subnet.id}".encode()).digest()[:7], "little")
    if not job.inherit and not job.weight_bits:
        fresh(model, seed)
    rng = torch.Generator().manual_seed(seed)
    with _named(subnet):
        values = score(expand(ready.proxies), model, ready.batch, generator=rng, output=job.output, chunk=job.chunk)
    if not job.nodes:
        return values, None
    return values, node_statistics(Passes(model, ready.batch, seed=seed, output=job.output))


@contextlib.contextmanager
def _named(subnet: Subnet) -> Iterator[None]:
    """Whatever a proxy raises, somebody else's too, becomes one line with its place and the subnet."""
    try:
        yield
    except NasqError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise NasqError(
            f"scoring the subnet {subnet.id} failed in {place.filename}, line {place.lineno}: {type(error).__name__}: "
            f"{error}. The rows before it are kept: repair the proxy, and run the same command again."
        ) from error


def _finish(ready: _Prepared) -> dict[str, Any]:
    """Puts rows in order and fills in what compares candidates, once every row is there."""
    rows = ready.file.open(repair=False)
    order = [one.id for one in ready.subnets]
    complete = all(one in rows for one in order)
    singles = [one.name for one in expand(ready.proxies)]
    here = [rows[one] for one in order if one in rows]
    values = {name: np.array(column(here, name), dtype=np.float64) for name in singles}
    if complete:
        added = {name: one for name, one in combine(ready.proxies, values).items() if name not in singles}
        ready.file.finish([*order, *(one for one in rows if one not in set(order))], _padded(added, len(rows)))
        values.update(added)
    strange = {name: int((~np.isfinite(one)).sum()) for name, one in values.items()}
    return {
        "out": str(ready.file.path), "rows": len(here), "of": len(order), "complete": complete,
        "not_finite": {name: count for name, count in strange.items() if count},
    }  # fmt: skip


def _padded(columns: Mapping[str, Any], length: int) -> dict[str, list[float]]:
    """Rows of an earlier, larger selection take no part in a comparison."""
    return {name: [*map(float, one), *[float("nan")] * (length - len(one))] for name, one in columns.items()}
