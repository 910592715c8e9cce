"""The memory of an outer step for an encoder with the shapes of DeBERTa-v3-large, on one GPU and sharded over eight.

The encoder is made of tensors without data. The vectors that an outer step holds are estimated and measured on a network of a
million variables with a small batch, without a callback that reads `.grad` and with one. The rest is arithmetic.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.optim import Adam

import mlopt
from mlopt.diagnosis import estimate_requirements
from mlopt.diagnosis.sharding import Sharding

from .hypergrad.measuring import peak_memory
from .report import write
from .scale import network, reweighting

BYTES, GPUS, SMALL, ITERATIONS = 4, 8, 1e6, 5
SOLVE = {"iterations": ITERATIONS, "rtol": 0.0, "damping": 3.0}
ESTIMATORS: dict[str, Callable[[], mlopt.Estimator]] = {
    "Identity": mlopt.Identity,
    "FiniteDifference": mlopt.FiniteDifference,
    "ConjugateGradient": partial(mlopt.ConjugateGradient, **SOLVE),
    "ConjugateGradient, differences": partial(mlopt.ConjugateGradient, products="finite_difference", **SOLVE),
}


class Reader(mlopt.Callback):
    """A callback that may read `.grad` of the levels inside."""


class Block(nn.Module):
    """The parameters of a layer of DeBERTa-v3-large."""

    def __init__(self, width: int = 1024, inner: int = 4096) -> None:
        super().__init__()
        self.attention = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.feed_forward = nn.ModuleList((nn.Linear(width, inner), nn.Linear(inner, width)))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))


class Encoder(nn.Module):
    """The parameters of DeBERTa-v3-large (He et al. 2023, arXiv 2111.09543): 24 layers, and a vocabulary of 128,100 words."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(128_100, width), nn.Embedding(512, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.blocks = nn.ModuleList(Block(width) for _ in range(24))


def problem(estimator: mlopt.Estimator) -> mlopt.Problem:
    """Return weights of examples outside, a network inside, and the same optimiser for both."""
    weights, net = reweighting(network(SMALL), estimator).levels
    adam = partial(Adam, lr=1e-4)
    own = {"data": net.data, "optimizer": adam, "estimator": estimator}
    return mlopt.Problem(
        mlopt.Level("weights", weights.module, weights.definition, data=weights.data, optimizer=adam),
        mlopt.Level("net", net.module, net.definition, **own),
    )


def measured(estimator: mlopt.Estimator, callbacks: Sequence[mlopt.Callback] = ()) -> float:
    """Return the vectors over the variables that a run holds at its peak."""
    own = problem(estimator)
    size = sum(BYTES * p.numel() for p in own["net"].parameters)
    run = partial(mlopt.solve, own, 2, seed=0, progress=False, callbacks=callbacks)
    return 1 + peak_memory(run, "cpu") / size


def rows() -> list[dict[str, Any]]:
    """Return, for each estimator, the vectors of an outer step, and the bytes of the encoder on one GPU and on one of GPUS."""
    with torch.device("meta"):
        encoder = Encoder()
    level = mlopt.Level("encoder", encoder, lambda module, batch: next(module.parameters()).sum())
    spread = Sharding.of(level, [encoder.words, *encoder.blocks], GPUS)
    size = sum(BYTES * p.numel() for p in level.parameters)
    table = []
    for name, make in ESTIMATORS.items():
        own = problem(make())
        estimate = estimate_requirements(own).memory / sum(BYTES * p.numel() for p in own["net"].parameters)
        takes_shards = not make().needs_whole
        table.append(
            {
                "estimator": name,
                "estimated vectors": estimate,
                "measured vectors": measured(make()),
                "measured vectors, .grad kept": measured(make(), [Reader()]),
                "one GPU": estimate * size,
                "shards": spread.of_vectors(estimate * size) if takes_shards else None,
                "gathered": spread.gathered if takes_shards else None,
            }
        )
    return table


def lines(table: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of the page, as lines of Markdown; memory in GiB."""
    columns = ("estimated vectors", "measured vectors", "measured vectors, .grad kept")
    text = [
        f"| estimator | vectors, estimated | measured | `.grad` kept | one GPU | shards on each of {GPUS} | gathered there |",
        f"|---|{'---:|' * 6}",
    ]
    for row in table:
        memory = ["-" if row[key] is None else f"{row[key] / 2**30:.1f}" for key in ("one GPU", "shards", "gathered")]
        text.append(f"| {row['estimator']} | {' | '.join((*(f'{row[key]:.1f}' for key in columns), *memory))} |")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the rows, with commit and versions")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = rows()
    Console(width=130).print("\n".join(lines(table)), markup=False, highlight=False)
    write(options.json, "cpu", table)


if __name__ == "__main__":
    main()
