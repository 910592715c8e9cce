"""`python -m benchmarks.hypergrad`: error and cost of every estimator.

Error: L2-regularised multinomial logistic regression with a weight for each sample, float64, at its optimum, against a
dense solve; relative error and cosine of the hypergradient. Cost: the same outer problem over a network of one hidden layer in
float32, damped so that no solver stops early; CPU time of `mlopt.hypergradient` over that of one plain gradient of the inner
loss, interleaved, by medians. Neumann spends ten products more, on finding a step size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlopt

from .report import interleaved, write

SOLVERS: dict[str, Callable[[int, str, float], mlopt.Estimator]] = {
    "Identity": lambda k, products, damping: mlopt.Identity(products=products),
    "Neumann": lambda k, products, damping: mlopt.Neumann(terms=k, products=products, damping=damping),
    "ConjugateGradient": lambda k, products, damping: mlopt.ConjugateGradient(
        iterations=k, rtol=0.0, products=products, damping=damping
    ),
}
PRODUCTS = ("autograd", "forward", "finite_difference")


@attrs.frozen
class Row:
    """An estimator's figures; None where it was not measured."""

    estimator: str
    products: str
    iterations: int
    error: float
    cosine: float
    cost: float | None


class SampleWeights(nn.Module):
    """A weight in (0, 1) for each sample."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count, dtype=dtype))

    def forward(self) -> Tensor:
        return self.logits.sigmoid()


def problem(network: nn.Module, estimator: mlopt.Estimator, dtype: torch.dtype) -> mlopt.Problem:
    """Return hyper-cleaning on scikit-learn's digits: 1,000 training samples, the others for validation."""
    images, digits = load_digits(return_X_y=True)
    inputs, labels = torch.from_numpy(images).to(dtype) / 16, torch.from_numpy(digits)

    def training_loss(classifier: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        losses = cross_entropy(classifier(inputs[:1000]), labels[:1000], reduction="none")
        return (weights() * losses).mean() + 5e-3 * sum(p.square().sum() for p in classifier.parameters())

    def validation_loss(weights: nn.Module, batch: Any, *, classifier: nn.Module) -> Tensor:
        return cross_entropy(classifier(inputs[1000:]), labels[1000:])

    return mlopt.Problem(
        mlopt.Level("weights", SampleWeights(1000, dtype), validation_loss),
        mlopt.Level("classifier", network, training_loss, estimator=estimator),
    )


def inner_loss(made: mlopt.Problem) -> Tensor:
    """Return the inner loss at the present point."""
    level = made["classifier"]
    return level.loss(level.module, None, weights=made["weights"].module)


def to_the_optimum(made: mlopt.Problem) -> None:
    """Minimise the inner loss by L-BFGS, to a gradient of about 1e-10."""
    optimizer = torch.optim.LBFGS(
        made["classifier"].parameters,
        max_iter=2_000,
        tolerance_grad=1e-11,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = inner_loss(made)
        loss.backward()
        return loss

    optimizer.step(closure)


def measure(iterations: Sequence[int], rounds: int) -> list[Row]:
    """Return a row for each solver, kind of products and number of iterations."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 10, bias=False, dtype=torch.float64)
    exact = problem(linear, mlopt.Dense(), torch.float64)
    to_the_optimum(exact)
    truth = mlopt.hypergradient(exact).gradient["logits"]
    network = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10))
    rows, calls = [], []
    for name, make in SOLVERS.items():
        for products in PRODUCTS:
            for k in iterations if name != "Identity" else iterations[:1]:
                found = mlopt.hypergradient(problem(linear, make(k, products, 0.0), torch.float64)).gradient["logits"]
                error = float((found - truth).norm() / truth.norm())
                cosine = float(torch.cosine_similarity(found, truth, dim=0))
                rows.append(Row(name, products, 0 if name == "Identity" else k, error, cosine, None))
                made = problem(network, make(k, products, 1.0), torch.float32)
                calls.append(lambda made=made: mlopt.hypergradient(made))
    plain = problem(network, mlopt.Identity(), torch.float32)
    times = interleaved(
        [lambda: torch.autograd.grad(inner_loss(plain), plain["classifier"].parameters), *calls], rounds, "cpu"
    )
    return [attrs.evolve(row, cost=seconds / times[0]) for row, seconds in zip(rows, times[1:], strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hypergrad", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 iterations only, few rounds")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with commit and versions")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = measure((10,) if options.quick else (10, 100), rounds=5 if options.quick else 20)
    table = Table("estimator", "products", "iterations", "relative error", "cosine", "time / plain gradient")
    for row in rows:
        iterations = str(row.iterations) if row.iterations else "-"
        table.add_row(
            row.estimator, row.products, iterations, f"{row.error:.1e}", f"{row.cosine:.4f}", f"{row.cost:.1f}"
        )
    Console(width=110).print(table)
    write(options.json, "cpu", [attrs.asdict(row) for row in rows])


if __name__ == "__main__":
    main()
