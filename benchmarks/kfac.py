"""K-FAC as preconditioner of conjugate gradients: error and time of a hypergradient on four problems.

Times are CPU times on one thread, in plain gradients of the inner loss: medians and ranges over rounds in which all calls take
turns. Errors are relative to the exact hypergradient, or, with Gauss-Newton products, to that of converged conjugate gradients
on the same matrix in double precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mlopt

from .hypergrad import exact
from .hypergrad.adapters.mlopt import problem
from .hypergrad.cases import Case, cleaning_loss, flat, make
from .report import clock, write

#: By problem: the recipe, the ridge of the inner loss, and the products.
CASES = {
    "MLP 64-256-10, ridge 1e-3, Gauss-Newton": ("MLP 64-256-10", 1e-3, "gauss_newton"),
    "softmax 64-10, ridge 2e-3": ("softmax regression 64-10", 2e-3, "autograd"),
    "GIN, ridge 0.3": ("GIN", 0.3, "autograd"),
    "transformer, ridge 0.3": ("transformer", 0.3, "autograd"),
}
CG, KFAC = (5, 10, 20, 40, 80), (2, 5, 10, 20)


def case_of(recipe: str, ridge: float, products: str) -> Case:
    """Return a case of `benchmarks.hypergrad` with another ridge, after L-BFGS for that ridge, and its reference."""
    case = make(recipe)
    if products == "gauss_newton":
        case.inner_loss = partial(cleaning_loss, ridge=ridge)
        exact.minimise(case, 15)
        case = case.to(torch.float32).to(torch.float64)
        converged = mlopt.ConjugateGradient(iterations=5_000, rtol=1e-10, products=products)
        result = mlopt.hypergradient(problem(case, converged))
        assert result.reports["inner"].converged
        case.exact = flat(list(result.gradient.values()))
    assert case.exact is not None
    return case


def estimators(products: str) -> dict[tuple[str, int], mlopt.Estimator]:
    """Return the estimators, by name and number of iterations, or rank."""
    solver = partial(mlopt.ConjugateGradient, rtol=0.0, products=products)
    sketch = mlopt.linear.NystromPreconditioner(rank=10)
    return (
        {("CG", k): solver(iterations=k) for k in CG}
        | {("CG, K-FAC", k): solver(iterations=k, preconditioner=mlopt.KFACPreconditioner()) for k in KFAC}
        | {("CG, Nystrom of rank 10", k): solver(iterations=k, preconditioner=sketch) for k in (5, 20)}
        | {("Nystrom", k): mlopt.Nystrom(rank=k, products=products) for k in (10, 20)}
    )


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of a problem."""
    recipe, ridge, products = CASES[name]
    reference = case_of(recipe, ridge, products)
    assert reference.exact is not None
    case = dataclasses.replace(reference.to(torch.float32), exact=None)
    made = {key: problem(case, estimator) for key, estimator in estimators(products).items()}
    rows = []
    for (estimator, k), own in made.items():
        gradient: Tensor = flat(list(mlopt.hypergradient(own).gradient.values())).double()
        error = float((gradient - reference.exact).norm() / reference.exact.norm())
        rows.append({"case": name, "estimator": estimator, "iterations": k, "error": error})
    calls: list[Callable[[], Any]] = [partial(mlopt.hypergradient, own) for own in made.values()]
    ratios: list[list[float]] = [[] for _ in rows]
    case.plain_gradient()
    for _ in range(rounds):
        plain = statistics.median(_seconds(case.plain_gradient) for _ in range(9))
        for call, own_ratios in zip(calls, ratios, strict=True):
            own_ratios.append(_seconds(call) / plain)
    for row, own_ratios in zip(rows, ratios, strict=True):
        row |= {"time": statistics.median(own_ratios), "range": [min(own_ratios), max(own_ratios)]}
    return rows


def _seconds(call: Callable[[], Any]) -> float:
    begin = clock("cpu")
    call()
    return clock("cpu") - begin


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kfac", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="softmax regression only, one round")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with commit and versions")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # Most estimators stop before they converge.
    warnings.simplefilter("ignore", mlopt.TrustWarning)
    names = ["softmax 64-10, ridge 2e-3"] if options.quick else list(CASES)
    rows = [row for name in names for row in measure(name, 1 if options.quick else 7)]
    table = Table("problem", "estimator", "iterations", "error", "time", "range")
    for row in rows:
        low, high = row["range"]
        cells = (row["case"], row["estimator"], str(row["iterations"]), f"{row['error']:.1e}", f"{row['time']:.1f}")
        table.add_row(*cells, f"{low:.1f}-{high:.1f}")
    Console(width=130).print(table)
    write(options.json, "cpu", rows)


if __name__ == "__main__":
    main()
