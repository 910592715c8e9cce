"""Solve and differentiate the problems with one library; print the results as a line of JSON."""

from __future__ import annotations

import importlib
import inspect
import json
import statistics
import sys
import time
import warnings
from typing import Any

from .problems import PROBLEMS, data


def measure(library: str, rounds: int) -> list[dict[str, Any]]:
    """Return for each problem the value, its derivative, the lines of code, and the median seconds of a call.

    Args:
        library: the name of its module here, without `with_`.
        rounds: calls; one more is made before, which may compile.
    """
    module = importlib.import_module(f".with_{library}", __package__)
    rows = []
    for name in PROBLEMS:
        problem, arrays, seconds = getattr(module, name), data(name), []
        for _ in range(rounds + 1):
            begin = time.process_time()
            value, gradient = (
                problem(arrays) if library in ("mlopt", "torchopt") else module.differentiated(problem, arrays)
            )
            seconds.append(time.process_time() - begin)
        rows.append(
            {
                "library": library,
                "problem": name,
                "value": value,
                "gradient": gradient.tolist(),
                "lines": sum(1 for line in inspect.getsource(problem).splitlines() if line.strip()),
                "seconds": statistics.median(seconds[1:]),
            }
        )
    return rows


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # TorchOpt's, of torch's names
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
