"""The benchmark stage: the best bundle beside the same subnet in fp32, on this machine."""

from __future__ import annotations

from typing import Any

from nasq.deploy import bundle, storage
from nasq.deploy.bench import bench_bundle
from nasq.files import write_json
from nasq.run.assemble import Workshop
from nasq.run.card import with_latency
from nasq.run.directory import RunDirectory
from nasq.run.export import CARD, exported
from nasq.run.search import Evaluation, search_results

__all__ = ["bench"]


def bench(run: RunDirectory, workshop: Workshop, evaluation: Evaluation | None = None) -> dict[str, Any]:
    """Times the best bundle's file, its fp32 file and torch; writes ``bench.json`` and returns it."""
    evaluation = evaluation or Evaluation(workshop)
    settings = workshop.config.bench
    best = exported(run)["best"]
    _, records = search_results(run)
    subnet = next(record.subnet for record in records if record.subnet.id == best)
    plain = workshop.float_subnet(subnet, evaluation.statistics(subnet)).cpu()
    images = workshop.data.normalise(workshop.data.validation.images).cpu().numpy()
    report = bench_bundle(
        run.best, plain, settings.batch_sizes, settings.threads, images=images, repeats=settings.repeats
    ).to_json()
    write_json(run.path / "bench.json", report)
    text = storage.path_of(run.best, CARD).read_text()
    bundle.add_file(run.best, CARD, with_latency(text, report).encode())
    run.tell({"event": "bench.done", "rows": len(report["rows"])})
    return report
