"""A slow study for a process that will be killed: ``python killed.py DIRECTORY BUDGET PAUSE``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from nasq.search import NSGA2, Objective, ObjectiveEvaluator, Study

if __package__:
    from .toy import ACCURACY, Costs, joint_space, limit, objective
else:
    from toy import ACCURACY, Costs, joint_space, limit, objective


def study(directory: Path, pause: float = 0.0) -> Study:
    space = joint_space()
    costs = Costs(space)

    def slow(subnet: object) -> float:
        time.sleep(pause)
        return ACCURACY.evaluate(subnet)  # type: ignore[arg-type]

    objectives = [Objective("accuracy", "%", "maximize", slow), objective(costs)]
    algorithm = NSGA2(space, objectives, [limit(costs, "bytes", upper=1500.0)], population=8, seed=1)
    evaluator = ObjectiveEvaluator(space, objectives, list(costs.measures().values()))
    return Study(directory, algorithm, evaluator)


if __name__ == "__main__":
    study(Path(sys.argv[1]), float(sys.argv[3])).run(int(sys.argv[2]))
