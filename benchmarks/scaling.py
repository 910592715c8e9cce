"""The speedup of one problem over GPUs: a formula, with the exchanges that a run of two processes counts.

Two gloo processes run a problem of two levels, and count the numbers and the sums that they exchange in an outer step. The rest
is arithmetic with assumed speeds of GPUs and links: nothing was run on several GPUs. The global batch is the same for any number.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam

import mlopt
from mlopt.diagnosis import estimate_requirements

from .report import write

ITERATIONS, INNER, FEATURES, ROWS = 10, 10, 4, 8
ESTIMATORS: dict[str, Callable[[], mlopt.Estimator]] = {
    "Identity": mlopt.Identity,
    "FiniteDifference": mlopt.FiniteDifference,
    "ConjugateGradient": partial(mlopt.ConjugateGradient, iterations=ITERATIONS, rtol=0.0, damping=1.0),
    "ConjugateGradient, differences": partial(
        mlopt.ConjugateGradient, iterations=ITERATIONS, rtol=0.0, damping=1.0, products="finite_difference"
    ),
}
#: Assumed: an encoder of 435 million variables in float32 (DeBERTa-v3-large), ten outer variables, tokens of a global batch, the
#: operations that a GPU does in a second, bytes a second and seconds for a message on a link.
VARIABLES, OUTER, BYTES, TOKENS, OPERATIONS = 435_000_000, 10, 4, 64 * 512, 4e14
LINKS = {"NVLink": (450e9, 1e-5), "Ethernet": (12.5e9, 5e-5)}
GPUS = (1, 2, 4, 8, 16, 32, 64)


def problem(estimator: mlopt.Estimator, width: int, outer: int) -> mlopt.Problem:
    """Return weights of groups of examples outside, a network inside with INNER steps for each outer step."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    batch = inputs, torch.arange(ROWS) % 2, torch.arange(ROWS) % outer

    def held_out(weights: nn.Module, batch: Any, *, model: nn.Module) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def training(model: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        losses = cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (weights()[batch[2]].sigmoid() * losses).mean()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, 2)).double()
    sgd = partial(SGD, lr=1e-2)
    weights = mlopt.variables(torch.zeros(outer, dtype=torch.float64))
    return mlopt.Problem(
        mlopt.Level("weights", weights, held_out, data=[batch], optimizer=partial(Adam, lr=1e-2)),
        mlopt.Level("model", net, training, data=[batch], optimizer=sgd, steps=INNER, estimator=estimator),
    )


def exchanged(estimator: mlopt.Estimator, width: int, outer: int) -> tuple[int, int, int]:
    """Return the variables inside, and the numbers and the sums of the last of three outer steps, in this process."""
    counts: list[list[int]] = [[]]
    original = dist.all_reduce

    class Cut(mlopt.Callback):
        def on_step_end(self, run: Any) -> None:
            counts.append([])

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        counts[-1].append(tensor.numel())
        return original(tensor, *arguments, **options)

    case = problem(estimator, width, outer)
    dist.all_reduce = counting
    try:
        mlopt.solve(case, 4, seed=0, progress=False, callbacks=[Cut()])
    finally:
        dist.all_reduce = original
    return sum(x.numel() for x in case["model"].parameters), sum(counts[2]), len(counts[2])


def _serve(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    rows = []
    for name, make in ESTIMATORS.items():
        small, wide, more = (exchanged(make(), *sizes) for sizes in ((3, 2), (5, 2), (3, 4)))
        rows.append(
            {
                "estimator": name,
                "inner vectors": (wide[1] - small[1]) / (wide[0] - small[0]),
                "outer vectors": (more[1] - small[1]) / 2,
                "sums": small[2],
            }
        )
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def counted() -> list[dict[str, Any]]:
    """Return, for each estimator, vectors and sums of an outer step as two processes count them, and passes of one GPU.

    A pass is a forward and a backward pass over the whole batch; a product with second derivatives by reverse mode counts as one.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_serve, (2, folder), nprocs=2)
        rows: list[dict[str, Any]] = json.loads((Path(folder) / "rows.json").read_text())
    for row in rows:
        estimator = ESTIMATORS[row["estimator"]]()
        levels = estimate_requirements(problem(estimator, 3, 2)).levels
        evaluations = sum(level.evaluations or 0 for level in levels.values())
        reverse = getattr(estimator, "products", "") == "autograd"
        row["passes"] = evaluations + (int(levels["model"].products or 0) + 1) * reverse
    return rows


def seconds(row: dict[str, Any], gpus: int, link: str) -> float:
    """Return the time of an outer step on replicated GPUs: passes over the rows of one, and ring reductions.

    A ring reduction of s bytes sends 2 (R - 1) / R s from each GPU, in 2 (R - 1) messages.
    """
    bandwidth, latency = LINKS[link]
    computing = row["passes"] * 6 * VARIABLES * TOKENS / OPERATIONS / gpus
    sent = BYTES * (row["inner vectors"] * VARIABLES + row["outer vectors"] * OUTER)
    ring = 2 * (gpus - 1)
    return float(computing + ring / gpus * sent / bandwidth + ring * latency * row["sums"])


def sharded(row: dict[str, Any], gpus: int, link: str) -> float:
    """Return the same for sharded variables: a pass gathers them twice and scatters the gradient, half a reduction each.

    Sharded levels take products by differences, two passes each, so this is for estimators with those.
    """
    bandwidth, latency = LINKS[link]
    computing = row["passes"] * 6 * VARIABLES * TOKENS / OPERATIONS / gpus
    sent = 3 * (gpus - 1) / gpus * BYTES * VARIABLES * row["passes"]
    return float(computing + sent / bandwidth + 3 * (gpus - 1) * latency * row["passes"])


def break_even(row: dict[str, Any], link: str) -> float:
    """Return the tokens of a GPU at which many replicated GPUs exchange for as long as they compute; VARIABLES cancels."""
    return 2 * BYTES * row["inner vectors"] * OPERATIONS / (LINKS[link][0] * 6 * row["passes"])


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the tables of the page, as lines of Markdown."""
    table = [
        f"| estimator | vectors inside | vectors outside | sums | passes | {' | '.join(f'tokens, {link}' for link in LINKS)} |",
        f"|---|{'---:|' * (4 + len(LINKS))}",
    ]
    for row in rows:
        numbers = (row["inner vectors"], row["outer vectors"], row["sums"], row["passes"])
        tokens = (f"{break_even(row, link):,.0f}" for link in LINKS)
        table.append(f"| {row['estimator']} | {' | '.join((*(f'{n:.0f}' for n in numbers), *tokens))} |")
    for title, time, chosen in (
        ("replicated", seconds, rows),
        ("sharded", sharded, [row for row in rows if "ifference" in row["estimator"]]),
    ):
        for link in LINKS:
            table += ["", f"Speedup, {title}, {link}:", ""]
            table += [f"| estimator | {' | '.join(map(str, GPUS))} |", f"|---|{'---:|' * len(GPUS)}"]
            for row in chosen:
                alone = seconds(row, 1, link)
                table.append(
                    f"| {row['estimator']} | {' | '.join(f'{alone / time(row, n, link):.1f}' for n in GPUS)} |"
                )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Count the exchanges and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the counts, with commit and versions")
    options = parser.parse_args(arguments)
    rows = counted()
    Console(width=130).print("\n".join(lines(rows)), markup=False, highlight=False)
    write(options.json, "cpu", rows)


if __name__ == "__main__":
    main()
