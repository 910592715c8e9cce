"""How time and memory of a hypergradient grow: with variables, iterations, tensors, levels in a chain, and levels in a nest.

Time is CPU time relative to a plain gradient of the innermost loss, timed between the calls; memory is the most that a call holds
besides the modules, in bytes for each variable of the levels inside. One thread, float32.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import mlopt
from mlopt.testing import quadratic

from .hypergrad.measuring import peak_memory, release
from .report import interleaved, write

FEATURES, CLASSES, EXAMPLES, ITERATIONS, RIDGE, DAMPING = 64, 10, 64, 10, 1e-2, 0.3

ESTIMATORS: dict[str, Callable[[], mlopt.Estimator]] = {
    "Identity": mlopt.Identity,
    "FiniteDifference": mlopt.FiniteDifference,
    "Neumann": partial(mlopt.Neumann, iterations=ITERATIONS, step_size=0.1),
    "ConjugateGradient": partial(mlopt.ConjugateGradient, iterations=ITERATIONS, rtol=0.0, damping=DAMPING),
    "ConjugateGradient, compiled": partial(
        mlopt.ConjugateGradient, iterations=ITERATIONS, rtol=0.0, damping=DAMPING, compile=True
    ),
    "ConjugateGradient, differences": partial(
        mlopt.ConjugateGradient, iterations=ITERATIONS, rtol=0.0, damping=DAMPING, products="finite_difference"
    ),
    "MINRES": partial(mlopt.MINRES, iterations=ITERATIONS, rtol=0.0, damping=DAMPING),
    "Nystrom": partial(mlopt.Nystrom, rank=ITERATIONS, damping=DAMPING),
    "Unrolled": partial(mlopt.Unrolled, steps=ITERATIONS),
    "ValueFunction": partial(mlopt.ValueFunction, steps=ITERATIONS),
}


def reweighting(net: nn.Module, estimator: mlopt.Estimator) -> mlopt.Problem:
    """Return a problem that weighs the examples of a classifier."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[Tensor, Tensor]:
        inputs = torch.randn(EXAMPLES, FEATURES, generator=generator)
        return inputs, torch.randint(CLASSES, (EXAMPLES,), generator=generator)

    def held_out(weights: nn.Module, batch: Any, *, net: nn.Module) -> Tensor:
        return cross_entropy(net(batch[0]), batch[1])

    def training(net: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        losses = cross_entropy(net(batch[0]), batch[1], reduction="none")
        decay = torch.stack([p.square().sum() for p in net.parameters()]).sum()
        return (weights().sigmoid() * losses).mean() + RIDGE / 2 * decay

    return mlopt.Problem(
        mlopt.Level("weights", mlopt.variables(torch.zeros(EXAMPLES)), held_out, data=[draw()]),
        mlopt.Level("net", net, training, data=[draw()], optimizer=partial(SGD, lr=0.1), estimator=estimator),
    )


def network(variables: float) -> nn.Module:
    """Return a network of two hidden layers with about this number of variables."""
    torch.manual_seed(0)
    linear = FEATURES + CLASSES + 1
    width = round((math.sqrt(linear**2 + 4 * variables) - linear) / 2)
    return nn.Sequential(
        nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES)
    )


def slices(count: int) -> nn.Module:
    """Return a network of about 10,000 variables whose hidden weights are cut into this number of tensors."""
    width = 10_000 // FEATURES

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = (torch.randn(FEATURES * width) / 8).tensor_split(count)
            self.parts = nn.ParameterList(part.clone() for part in parts)
            self.last = nn.Linear(width, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = torch.cat(list(self.parts)).view(FEATURES, width)
            return self.last((inputs @ hidden).tanh())

    torch.manual_seed(0)
    return Split()


def chain(levels: int, *, nested: bool) -> mlopt.Problem:
    """Return levels of 21 variables with quadratic losses: a chain, or a nest whose losses refer to the level inside, too."""
    names = [f"x{i}" for i in range(levels)]
    references: dict[str, set[str]] = {name: set() for name in names}
    for before, after in itertools.pairwise(names):
        references[after].add(before)
        if nested:
            references[before].add(after)
    if not nested:
        references[names[0]].add(names[-1])
    hosts = dict(zip(names[1:], names, strict=False))
    shape = {name: (hosts.get(name), tuple(sorted(references[name]))) for name in names}
    rule = mlopt.ConjugateGradient(iterations=3, rtol=0.0)
    return quadratic(shape, rule, size=10, condition=2.0, dtype=torch.float32).problem


def plain(problem: mlopt.Problem) -> Callable[[], object]:
    """Return a function that takes the gradient of the innermost loss."""
    level = problem.levels[-1]
    batch = None if level.data is None else next(iter(level.data))
    others = {name: problem[name].module for name in level.references}

    def gradient() -> object:
        return torch.autograd.grad(level.definition(level.module, batch, **others), level.parameters)

    return gradient


def measure(label: dict[str, Any], problem: mlopt.Problem, rounds: int) -> dict[str, Any]:
    """Return a row: time over a plain gradient, bytes for each variable, and products with Hessians of the innermost level."""
    call = partial(mlopt.hypergradient, problem, seed=0)
    reports = call().reports
    innermost = problem.levels[-1]
    size = sum(p.numel() for level in problem.levels[1:] for p in level.parameters)
    peak = peak_memory(call, "cpu")
    ours, one = interleaved([call, plain(problem)], rounds, "cpu")
    release()
    return label | {
        "variables": size,
        "time": ours / one,
        "bytes per variable": peak / size,
        "products": reports[innermost.name].products,
    }


def sizes(quick: bool, rounds: int) -> list[dict[str, Any]]:
    counts = (1e4, 1e5) if quick else (1e4, 1e5, 1e6, 1e7)
    return [
        measure({"table": "variables", "estimator": name}, reweighting(network(n), make()), rounds)
        for name, make in ESTIMATORS.items()
        for n in counts
        if not (quick and name.endswith("compiled"))  # the compiler takes longer than all the rest
    ]


def iterations(quick: bool, rounds: int) -> list[dict[str, Any]]:
    counts = (1, 10) if quick else (1, 2, 5, 10, 20, 40)
    return [
        measure({"table": "iterations", "iterations": k}, reweighting(network(1e5), rule), rounds)
        for k in counts
        for rule in [mlopt.ConjugateGradient(iterations=k, rtol=0.0, damping=DAMPING)]
    ]


def tensors(quick: bool, rounds: int) -> list[dict[str, Any]]:
    counts = (1, 20) if quick else (1, 10, 100, 2_000)
    rule = mlopt.ConjugateGradient(iterations=ITERATIONS, rtol=0.0, damping=DAMPING)
    return [measure({"table": "tensors", "tensors": n}, reweighting(slices(n), rule), rounds) for n in counts]


def chains(quick: bool, rounds: int) -> list[dict[str, Any]]:
    counts = (2, 4) if quick else (2, 4, 8, 16, 32)
    return [measure({"table": "chain", "levels": n}, chain(n, nested=False), rounds) for n in counts]


def nests(quick: bool, rounds: int) -> list[dict[str, Any]]:
    counts = (1, 2) if quick else (1, 2, 3, 4)
    return [measure({"table": "nest", "depth": n}, chain(n + 1, nested=True), rounds) for n in counts]


#: By table, the title of the column that changes.
COLUMNS = {"iterations": "iterations", "tensors": "tensors", "chain": "levels", "nest": "depth"}


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the tables of the page, as lines of Markdown."""
    sized = [row for row in rows if row["table"] == "variables"]
    counts = sorted({row["variables"] for row in sized})
    table = [
        f"| estimator | {' | '.join(f'{quantity}, {n:,}' for quantity in ('time', 'bytes') for n in counts)} |",
        f"|---|{'---:|' * 2 * len(counts)}",
    ]
    for estimator, group in itertools.groupby(sized, lambda row: row["estimator"]):
        own = sorted(group, key=lambda row: row["variables"])
        cells = [f"{row['time']:.1f}" for row in own] + [f"{row['bytes per variable']:,.0f}" for row in own]
        table.append(f"| {estimator} | {' | '.join(cells)} |")
    for name, column in COLUMNS.items():
        table += ["", f"| {column} | variables | time | bytes | products |", "|---:|---:|---:|---:|---:|"]
        table += [
            f"| {row[column]} | {row['variables']:,} | {row['time']:.1f} | {row['bytes per variable']:,.0f} | {row['products']} |"
            for row in rows
            if row["table"] == name
        ]
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tables and print them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: less than a minute")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with commit and versions")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rounds = 3 if options.quick else 7
    rows = [row for part in (sizes, iterations, tensors, chains, nests) for row in part(options.quick, rounds)]
    print("\n".join(lines(rows)))
    write(options.json, "cpu", rows)


if __name__ == "__main__":
    main()
