"""PA&DA on NAS-Bench-201 / CIFAR-10: Kendall of a supernet's ranking, beside uniform sampling and strict fairness.

Published (Lu et al., CVPR 2023): 0.713 over all 15,625 cells, ranked on test images with batch statistics. Here subnets are
ranked on validation images that training does not see, with BatchNorm statistics of training images::

    COMMON="--data DIR --table nas_bench_201_cifar10.csv.gz --out RUNS"
    python -m scripts.reproduce.pa_da_nas_bench_201 all $COMMON                                                # CPU
    python -m scripts.reproduce.pa_da_nas_bench_201 all $COMMON --setting full --device cuda --seeds 0 --minutes 9
"""

from __future__ import annotations

from nasq.search_spaces.nas_bench_201 import nas_bench_201

from scripts.reproduce.ranking_study import FAIR, PA_DA, PA_DA_WHOLE, UNIFORM, Setting, Study, run

SHORT = Setting(
    network={"C": 16, "N": 1}, training_images=10_000, validation_images=512, passes=24,
    config={"batch_size": 64, "lr": 0.05, "weight_decay": 2.5e-4}, subnets=1_000, batch_size=256, repetitions=20,
    bf16=True,
)  # fmt: skip
"""What one core trains and ranks in about an hour, with three ways and two seeds."""
FULL = Setting(
    network={"C": 16, "N": 5}, training_images=45_000, validation_images=5_000, passes=250,
    config={"batch_size": 256, "lr": 0.05, "weight_decay": 2.5e-4}, subnets=None, batch_size=2_500, repetitions=100,
)  # fmt: skip
BRIEF = Setting(
    network={"C": 8, "N": 1}, training_images=10_000, validation_images=512, passes=15,
    config={"batch_size": 64, "lr": 0.05, "weight_decay": 2.5e-4}, subnets=1_000, batch_size=128, repetitions=10,
    image_size=16, bf16=True,
)  # fmt: skip
"""What a quarter of a core trains and ranks in less than an hour, with three ways and two seeds."""
SETTINGS = {"brief": BRIEF, "short": SHORT, "full": FULL}
STUDY = Study(
    "pa_da_nas_bench_201", nas_bench_201, "nas-bench-201", "cifar10_test_200",
    {"uniform": UNIFORM, "pa-da": PA_DA, "pa-da-whole": PA_DA_WHOLE, "fair": FAIR}, SETTINGS,
)  # fmt: skip

if __name__ == "__main__":
    run(STUDY, __doc__)
