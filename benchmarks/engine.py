"""Cost of `mlopt.solve` relative to the same loop written by hand: a level of ten variables, and hyper-cleaning.

Both loops take the same steps on the same batches and end at the same variables. The loop by hand records its losses as numbers
and does nothing else: no check for finite values, no schedule, no callbacks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam

import mlopt

from .report import interleaved, write

DAMPING, ITERATIONS, INNER = 1e-1, 10, 10


def ten_variables(steps: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return a run of a level of ten variables, by `solve` and by hand; each returns its final variables."""
    target = torch.linspace(0, 1, 10)
    sgd = partial(SGD, lr=0.01)

    def loss(own: nn.Module, batch: Tensor) -> Tensor:
        return (own() - batch).square().sum()

    def ours() -> Tensor:
        x = mlopt.variables(torch.zeros(10))
        mlopt.solve(mlopt.Problem(mlopt.Level("x", x, loss, data=[target], optimizer=sgd)), steps, progress=False)
        return x.value.detach()

    def by_hand() -> Tensor:
        x = mlopt.variables(torch.zeros(10))
        optimizer, losses = sgd(x.parameters()), []
        for _ in range(steps):
            optimizer.zero_grad()
            value = loss(x, target)
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return x.value.detach()

    return ours, by_hand


class SampleWeights(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))

    def forward(self, index: Tensor) -> Tensor:
        return self.logits[index].sigmoid()


class HyperCleaning:
    """Hyper-cleaning with 1,000 samples of 64 features, a network 64-64-10, ten inner steps, ten CG iterations."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        generator = torch.Generator().manual_seed(0)
        teacher = torch.randn(64, 10, generator=generator)
        inputs = torch.randn(1_300, 64, generator=generator)
        labels = (inputs @ teacher).argmax(1)
        noisy = torch.where(
            torch.rand(1_300, generator=generator) < 0.5, torch.randint(10, (1_300,), generator=generator), labels
        )
        self._train = inputs[:1_000], noisy[:1_000], torch.arange(1_000)
        self._valid = inputs[1_000:], labels[1_000:]

    @staticmethod
    def training_loss(classifier: nn.Module, batch: tuple[Tensor, ...], *, weights: nn.Module) -> Tensor:
        inputs, labels, index = batch
        losses = cross_entropy(classifier(inputs), labels, reduction="none")
        return (weights(index) * losses).mean() + 1e-3 * sum(p.square().sum() for p in classifier.parameters())

    @staticmethod
    def validation_loss(weights: nn.Module, batch: tuple[Tensor, ...], *, classifier: nn.Module) -> Tensor:
        inputs, labels = batch
        return cross_entropy(classifier(inputs), labels)

    def _start(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return SampleWeights(1_000), nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def ours(self) -> Tensor:
        weights, classifier = self._start()
        problem = mlopt.Problem(
            mlopt.Level("weights", weights, self.validation_loss, data=[self._valid], optimizer=partial(Adam, lr=0.1)),
            mlopt.Level(
                "classifier",
                classifier,
                self.training_loss,
                data=[self._train],
                optimizer=partial(SGD, lr=0.5, momentum=0.9),
                steps=INNER,
                estimator=mlopt.ConjugateGradient(iterations=ITERATIONS, damping=DAMPING),
            ),
        )
        mlopt.solve(problem, self._steps, progress=False)
        return weights.logits.detach()

    def by_hand(self) -> Tensor:
        weights, classifier = self._start()
        own, others = list(classifier.parameters()), list(weights.parameters())
        inner, outer = SGD(own, lr=0.5, momentum=0.9), Adam(others, lr=0.1)
        losses = []
        for _ in range(self._steps):
            for _ in range(INNER):
                inner.zero_grad()
                value = self.training_loss(classifier, self._train, weights=weights)
                value.backward(inputs=own)
                inner.step()
            losses.append(value.item())
            value = self.validation_loss(weights, self._valid, classifier=classifier)
            cotangent = torch.autograd.grad(value, own)
            losses.append(value.item())
            gradient = torch.autograd.grad(
                self.training_loss(classifier, self._train, weights=weights), own, create_graph=True
            )
            solution = _conjugate_gradients(gradient, own, cotangent)
            mixed = torch.autograd.grad(gradient, others, solution)
            for variable, derivative in zip(others, mixed, strict=True):
                variable.grad = -derivative
            outer.step()
        return weights.logits.detach()


def _conjugate_gradients(gradient: Sequence[Tensor], own: list[nn.Parameter], right: Sequence[Tensor]) -> list[Tensor]:
    """Return q with (H + damping) q ~ right, by ten iterations on the graph of the gradient."""
    shapes = [v.shape for v in own]
    sizes = [v.numel() for v in own]

    def product(vector: Tensor) -> Tensor:
        parts = [part.reshape(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
        products = torch.autograd.grad(gradient, own, parts, retain_graph=True)
        return torch.cat([f.reshape(-1) for f in products]) + DAMPING * vector

    residual = torch.cat([r.reshape(-1) for r in right])
    solution, direction, square = torch.zeros_like(residual), residual.clone(), residual @ residual
    for _ in range(ITERATIONS):
        image = product(direction)
        step = square / (direction @ image)
        solution += step * direction
        residual = residual - step * image
        square, before = residual @ residual, square
        direction = residual + (square / before) * direction
    return [part.reshape(shape) for part, shape in zip(solution.split(sizes), shapes, strict=True)]


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of the page, as lines of Markdown."""
    table = ["| loop | `solve` / by hand | target: at most | |", "|---|---:|---:|---|"]
    for row in rows:
        verdict = "met" if row["ratio"] <= row["asked"] else "not met"
        table.append(f"| {row['loop']} | {row['ratio']:.2f} | {row['asked']} | {verdict} |")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half a minute")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with commit and versions")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cleaning = HyperCleaning(10 if options.quick else 40)
    cases = {
        "a level of ten variables, SGD": (*ten_variables(500 if options.quick else 2_000), 1.2),
        "hyper-cleaning: 1,000 samples, 64-64-10, ten inner steps, ten CG iterations": (
            cleaning.ours,
            cleaning.by_hand,
            1.05,
        ),
    }
    rows = []
    for name, (ours, by_hand, target) in cases.items():
        torch.testing.assert_close(ours(), by_hand(), rtol=1e-2, atol=1e-3)
        times = interleaved([ours, by_hand], 5 if options.quick else 21, "cpu")
        rows.append({"loop": name, "ratio": times[0] / times[1], "asked": target})
    Console(width=130).print("\n".join(lines(rows)), markup=False, highlight=False)
    write(options.json, "cpu", rows)


if __name__ == "__main__":
    main()
