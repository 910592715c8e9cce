"""Compiled products against live ones: time of a hypergradient by ten iterations of conjugate gradients, on five problems.

Times are in plain gradients of the inner loss: medians over rounds in which all calls take turns. On a GPU, compiled code of
small levels is replayed as a CUDA graph; a further row launches its kernels one by one. Memory is what a call allocates: a graph
keeps its own between calls, which is not part of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

import mlopt
from mlopt.estimators.products import traced

from .hypergrad.adapters.mlopt import problem
from .hypergrad.cases import flat, make
from .hypergrad.measuring import peak_memory
from .report import interleaved, write

CASES = ("logistic regression", "MLP 64-256-10", "MLP 784-256-10", "transformer", "GIN")
ITERATIONS = 10


def measure(name: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of a case."""
    reference = make(name)
    assert reference.exact is not None
    calls: dict[str, Callable[[], Any]] = {}
    rows = []
    kinds = ("live", "compiled") if device == "cpu" else ("live", "compiled", "compiled, no graph")
    for kind in kinds:
        case = reference.to(torch.float32, device)
        rule = mlopt.ConjugateGradient(iterations=ITERATIONS, rtol=0.0, compile=kind != "live")
        calls[kind] = partial(mlopt.hypergradient, problem(case, rule))
        with patch.object(traced, "replay", _none) if kind == "compiled, no graph" else nullcontext():
            gradient = flat(list(calls[kind]().gradient.values())).double().cpu()
        error = float((gradient - reference.exact).norm() / reference.exact.norm())
        calls[kind]()  # the tenth product is compared with the live one
        rows.append({"case": name, "products": kind, "error": error, "memory": peak_memory(calls[kind], device)})
    case = reference.to(torch.float32, device)
    plain, *times = interleaved([case.plain_gradient, *calls.values()], rounds, device, warm_up=2)
    for row, seconds in zip(rows, times, strict=True):
        row |= {"time": seconds / plain, "plain seconds": plain, "live / this": times[0] / seconds}
    return rows


def _none(*_: object) -> None:
    """Stand for `replay`: launch the kernels of compiled code one by one."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="two small problems, few rounds")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with commit and versions")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [
        row
        for name in (CASES[:2] if options.quick else CASES)
        for row in measure(name, options.device, 5 if options.quick else 21)
    ]
    table = Table("problem", "products", "error", "memory, MiB", "time / plain gradient", "live / this")
    for row in rows:
        numbers = (
            f"{row['error']:.1e}",
            f"{row['memory'] / 2**20:.2f}",
            f"{row['time']:.1f}",
            f"{row['live / this']:.2f}",
        )
        table.add_row(row["case"], row["products"], *numbers)
    Console(width=130).print(table)
    write(options.json, options.device, rows)


if __name__ == "__main__":
    main()
