"""Gradient-matching splits on NAS-Bench-201 / CIFAR-10: does a forest rank better than one supernet, at equal image passes?

Published (Hu et al., ICLR 2022) are accuracies of what a search finds; how well the forest ranks is not. The leaves go on
from what they inherit, and the passes of all sets of weights sum to those of the one supernet. The balanced mixture (Javan
Roshtkhari et al., 2023) stands beside them::

    COMMON="--data DIR --table nas_bench_201_cifar10.csv.gz --out RUNS"
    python -m scripts.reproduce.gm_nas_bench_201 all $COMMON                                                   # CPU
    python -m scripts.reproduce.gm_nas_bench_201 all $COMMON --setting full --device cuda --seeds 0 --minutes 9
"""

from __future__ import annotations

from nasq.search_spaces.nas_bench_201 import nas_bench_201

from scripts.reproduce.pa_da_nas_bench_201 import SETTINGS
from scripts.reproduce.ranking_study import FAIR, GM, GM_ONCE, MIXTURE, PA_DA, PA_DA_WHOLE, UNIFORM, Study, run

STUDY = Study(
    "gm_nas_bench_201", nas_bench_201, "nas-bench-201", "cifar10_test_200",
    {
        "uniform": UNIFORM, "fair": FAIR, "pa-da": PA_DA, "pa-da-whole": PA_DA_WHOLE, "gm-once": GM_ONCE, "gm": GM,
        "mixture": MIXTURE,
    },
    SETTINGS,
)  # fmt: skip

if __name__ == "__main__":
    run(STUDY, __doc__)
