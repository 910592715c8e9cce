"""iMAML on 32 tasks at once, relative to a level for each task: time, iterations of conjugate gradients, and distance.

Each task has a support and a query set of 20 examples with ten features. Its level, a linear map or a network 10-20-1, is tied
to the common start by a proximal term. Both problems are evaluated at the same variables, to the same tolerance.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mlopt

from .report import interleaved, write

TASKS, FEATURES, EXAMPLES, GAMMA = 32, 10, 20, 5.0


def support(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return (net(inputs).squeeze(-1) - targets).square().sum() / 2


def proximal(net: nn.Module, *, meta: nn.Module) -> Tensor:
    pairs = zip(net.parameters(), meta.parameters(), strict=True)
    return GAMMA / 2 * torch.stack([(p - q).square().sum() for p, q in pairs]).sum()


def query(meta: nn.Module, batch: tuple[Tensor, Tensor], *, net: nn.Module) -> Tensor:
    return support(net, batch)


def problems(start: nn.Module, rule: mlopt.Estimator) -> tuple[mlopt.Problem, mlopt.Problem]:
    """Return the problem of all tasks at once, and that of a level for each."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[Tensor, Tensor]:
        inputs = torch.randn(TASKS, EXAMPLES, FEATURES, generator=generator)
        return inputs, inputs.sum(-1) + torch.randn(TASKS, EXAMPLES, generator=generator)

    seen, asked = draw(), draw()
    tasks = mlopt.stacked(start, TASKS)
    level = partial(mlopt.Level, estimator=rule)
    together = mlopt.Problem(
        mlopt.Level("meta", start, mlopt.over_tasks(query), data=[asked]),
        level("net", tasks, mlopt.over_tasks(support), data=[seen], regularizer=mlopt.over_tasks(proximal)),
    )
    names = [f"net{t}" for t in range(TASKS)]

    def total(meta: nn.Module, batch: tuple[Tensor, Tensor], nets: list[nn.Module]) -> Tensor:
        values = [query(meta, entry, net=net) for *entry, net in zip(*batch, nets, strict=True)]
        return torch.stack(values).sum()

    # The graph is read off the signature, so the function is made for these names.
    source = f"lambda meta, batch, *, {', '.join(names)}: total(meta, batch, [{', '.join(names)}])"
    apart = mlopt.Problem(
        mlopt.Level("meta", start, eval(source, {"total": total}), data=[asked]),
        *(
            level(name, tasks.task(t), support, data=[(seen[0][t], seen[1][t])], regularizer=proximal)
            for t, name in enumerate(names)
        ),
    )
    return together, apart


def measure(name: str, start: nn.Module, damping: float, rtol: float, rounds: int) -> dict[str, Any]:
    rule = mlopt.ConjugateGradient(iterations=1_000, rtol=rtol, damping=damping)
    both = problems(start, rule)
    one, many = (mlopt.hypergradient(problem, seed=0) for problem in both)
    value, expected = (torch.cat([g.reshape(-1) for g in result.gradient.values()]) for result in (one, many))
    times = interleaved([partial(mlopt.hypergradient, problem) for problem in both], rounds, "cpu")
    return {
        "level": name,
        "rtol": rtol,
        "iterations together": one.reports["net"].iterations,
        "iterations apart": max(report.iterations for report in many.reports.values()),
        "distance": float((value - expected).norm() / expected.norm()),
        "time ratio": times[0] / times[1],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with commit and versions")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    # Damping makes the Hessian of the network, which has taken no step, positive definite.
    levels = {
        "linear": (nn.Linear(FEATURES, 1), 0.0),
        "network": (nn.Sequential(nn.Linear(FEATURES, 20), nn.Tanh(), nn.Linear(20, 1)), 200.0),
    }
    rounds = 3 if options.quick else 15
    rows = [
        measure(name, start, damping, rtol, rounds)
        for name, (start, damping) in levels.items()
        for rtol in (1e-3, 1e-10)
    ]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.2g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=130).print(table)
    write(options.json, "cpu", rows)


if __name__ == "__main__":
    main()
