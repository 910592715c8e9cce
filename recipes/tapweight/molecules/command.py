"""`mlopt tapweight molecules`: read molecules, adapt an encoder, tell what was learned, and save it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import attrs
from rich.console import Console

from mlopt.rng import seed_everything

from ..command import run, say
from ..recipe import TapWeight
from .configuration import CommandLine, Configuration, parse
from .data import Molecules, molecule_net, read_corpus
from .encoder import GINE
from .objectives import make_objective
from .task import MoleculeTask

__all__ = ["main"]


def main(arguments: Sequence[str], *, prog: str = "mlopt tapweight molecules") -> None:
    """Run the command line of TapWeight on molecules.

    Args:
        arguments: the options.
        prog: how the command was called.

    Raises:
        ConfigurationError: the options, or their file, cannot be used.
        DataError: the molecules cannot be used.
        SystemExit: after `--help`, and options that cannot be parsed.
    """
    options: CommandLine = parse(arguments, prog=prog)
    run(options, _Recipes, overwrite=options.overwrite, resume=options.resume)


class _Recipes:
    """The recipe of each seed."""

    def __init__(self, configuration: Configuration, console: Console) -> None:
        self._configuration = configuration
        # The labelled molecules first: they are few, so that a mistake in their file shows at once.
        self._tasks = {seed: _task(configuration, seed) for seed in configuration.seeds}
        data = configuration.data
        self._corpus = read_corpus(data.corpus, strict=data.strict, limit=data.corpus_limit)
        say(console, f"Corpus: {self._corpus.summary()}.")

    def __call__(self, seed: int, device: str) -> TapWeight:
        """Return the recipe of a seed."""
        return _recipe(self._configuration, self._tasks[seed], self._corpus, seed, device)

    def introduce(self, recipe: TapWeight) -> str:
        """Say what the task is."""
        task: Any = recipe.task
        sizes = ", ".join(f"{len(examples)} {split}" for split, examples in task.splits.items())
        return f"Task: {task.kind} of {', '.join(task.label_names)}, scored by {task.metric_name}; molecules: {sizes}."


def _task(configuration: Configuration, seed: int) -> MoleculeTask:
    data = configuration.data
    options: dict[str, Any] = {
        "kind": data.kind,
        "split": data.split,
        "chirality": data.chirality,
        "metric": data.metric,
        "seed": seed,
    }
    if data.dataset is not None:
        return MoleculeTask.from_molecules(molecule_net(data.dataset, data.root), **options)
    files: dict[str, Any] = {"valid": data.valid, "test": data.test, "labels": data.labels, "strict": data.strict}
    return MoleculeTask.from_csv(data.train, **files, **options)


def _recipe(configuration: Configuration, task: MoleculeTask, corpus: Molecules, seed: int, device: str) -> TapWeight:
    seed_everything(seed)
    return TapWeight(
        GINE(**attrs.asdict(configuration.encoder)).to(device),
        [make_objective(name) for name in configuration.objectives],
        task,
        # Copies, since objectives attach their targets to the graphs, and keep those that they find there.
        attrs.evolve(corpus, graphs=tuple(copy.copy(graph) for graph in corpus.graphs)),
        settings=configuration.settings,
        seed=seed,
    )
