"""PA&DA on NAS-Bench-Macro / CIFAR-10: 6,561 networks whose accuracies are all known.

Nothing is published for PA&DA on this space: the question is whether what holds for NAS-Bench-201 holds for another kind of
space, whose operators all have weights but one::

    COMMON="--data DIR --table nas_bench_macro_cifar10.csv.gz --out RUNS"
    python -m scripts.reproduce.pa_da_nas_bench_macro all $COMMON                                              # CPU
    python -m scripts.reproduce.pa_da_nas_bench_macro all $COMMON --setting full --device cuda --seeds 0 --minutes 9
"""

from __future__ import annotations

from nasq.search_spaces.nas_bench_macro import nas_bench_macro

from scripts.reproduce.ranking_study import PA_DA, UNIFORM, Setting, Study, run

SETTINGS = {
    "short": Setting(
        network={"width": 0.25}, training_images=10_000, validation_images=1_000, passes=20,
        config={"batch_size": 128, "lr": 0.05, "weight_decay": 2.5e-4}, subnets=1_000, batch_size=1_000, repetitions=20,
    ),
    "full": Setting(
        network={}, training_images=45_000, validation_images=5_000, passes=120,
        config={"batch_size": 256, "lr": 0.05, "weight_decay": 2.5e-4}, subnets=None, batch_size=2_500, repetitions=100,
    ),
}  # fmt: skip
STUDY = Study(
    "pa_da_nas_bench_macro",
    nas_bench_macro,
    "nas-bench-macro",
    "mean_acc",
    {"uniform": UNIFORM, "pa-da": PA_DA},
    SETTINGS,
)

if __name__ == "__main__":
    run(STUDY, __doc__)
