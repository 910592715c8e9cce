"""Solutions as values in mlopt, TorchOpt, jaxopt and optimistix: four problems, in lines, error and time.

The error is that of the derivative, relative to dense algebra in numpy. Lines are those of the function that states and solves
the problem. Times are CPU times of a solve and its derivative on one thread, as ratios to mlopt in this run; jax compiles before.
Each library runs in its own environment; `make peers` creates them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..report import write
from .problems import PROBLEMS, exact

_ROOT = Path(__file__).parents[2]
#: By library, the environment of `make peers`; None for that of this process.
_ENVIRONMENTS = {"mlopt": None, "torchopt": "torchopt", "jaxopt": "jax", "optimistix": "jax"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the libraries that are installed, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solutions", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer calls")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with commit and versions")
    options = parser.parse_args(arguments)
    console, rows = Console(), []
    for library, environment in _ENVIRONMENTS.items():
        python = Path(sys.executable) if environment is None else _ROOT / ".peers" / environment / "bin" / "python"
        if not python.is_file():
            console.print(f"{library}: absent; run `make peers`")
            continue
        rows += _measured(library, python, 5 if options.quick else 50)
    console.print(table(rows))
    write(options.json, "cpu", rows)


def _measured(library: str, python: Path, rounds: int) -> list[dict[str, Any]]:
    command = [str(python), "-m", f"{__package__}.worker", library, str(rounds)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1") | {
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    }
    done = subprocess.run(command, cwd=_ROOT, env=os.environ | threads, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{library} failed:\n{done.stderr[-2000:]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        value, gradient = exact(row["problem"])
        own = np.asarray(row.pop("gradient"))
        row["error"] = float(np.linalg.norm(own - gradient) / np.linalg.norm(gradient))
        row["value_error"] = abs(row.pop("value") - value) / abs(value)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table with a line for each problem and library."""
    shown = Table("problem", "library", "lines", "error", "time")
    ours = {row["problem"]: row["seconds"] for row in rows if row["library"] == "mlopt"}
    for name in PROBLEMS:
        for row in (row for row in rows if row["problem"] == name):
            time = f"{row['seconds'] / ours[name]:.2f}"
            shown.add_row(name, row["library"], str(row["lines"]), f"{row['error']:.0e}", time)
    return shown


if __name__ == "__main__":
    main()
