"""`mlopt tapweight text`: read texts, adapt an encoder, tell what was learned, and save it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from mlopt.rng import seed_everything

from ..command import run, say
from ..recipe import TapWeight
from ..splits import random_split
from ..task import Split
from .configuration import CommandLine, Configuration, parse
from .data import Texts, read_corpus, read_table
from .encoder import TextEncoder
from .objectives import make_objective
from .task import TextTask

__all__ = ["main"]


def main(arguments: Sequence[str], *, prog: str = "mlopt tapweight text") -> None:
    """Run the command line of TapWeight on text.

    Args:
        arguments: the options.
        prog: how the command was called.

    Raises:
        ConfigurationError: the options, or their file, cannot be used.
        DataError: the texts cannot be used.
        ModelError: the encoder cannot be used.
        SystemExit: after `--help`, and options that cannot be parsed.
    """
    options: CommandLine = parse(arguments, prog=prog)
    run(options, _Recipes, overwrite=options.overwrite, resume=options.resume)


class _Recipes:
    """The recipe of each seed."""

    def __init__(self, configuration: Configuration, console: Console) -> None:
        self._configuration = configuration
        # The labelled texts first: they are few, so that a mistake in their file shows at once.
        self._splits = {seed: _splits(configuration, seed) for seed in configuration.seeds}
        data = configuration.data
        self._corpus = None
        if data.corpus is not None:
            self._corpus = read_corpus(data.corpus, strict=data.strict, limit=data.corpus_limit)
        encoder = self._encoder(configuration.seeds[0])
        for seed, (splits, metric) in self._splits.items():
            corpus = self._corpus_of(splits)
            TextTask(splits, encoder.collate, kind=data.kind, metric=metric)
            if seed == configuration.seeds[0]:
                cut = encoder.collate.remark(corpus, corpus.name)
                say(console, f"Corpus: {'; '.join([corpus.summary(), *cut])}.")

    def __call__(self, seed: int, device: str) -> TapWeight:
        """Return the recipe of a seed."""
        configuration = self._configuration
        splits, metric = self._splits[seed]
        encoder = self._encoder(seed).to(device)
        return TapWeight(
            encoder,
            [make_objective(name, encoder.tokenizer) for name in configuration.objectives],
            TextTask(splits, encoder.collate, kind=configuration.data.kind, metric=metric),
            self._corpus_of(splits),
            settings=configuration.settings,
            seed=seed,
        )

    def introduce(self, recipe: TapWeight) -> str:
        """Say what the task is."""
        task: Any = recipe.task
        sizes = ", ".join(f"{len(examples)} {split}" for split, examples in task.splits.items())
        what = f" into {', '.join(task.classes)}" if task.classes else ""
        return f"Task: {task.kind}{what}, scored by {task.metric_name}; texts: {sizes}."

    def _corpus_of(self, splits: dict[Split, Texts]) -> Texts:
        """Return the corpus, by default the task's own training texts, in examples that objectives may attach targets to."""
        if self._corpus is not None:
            return self._corpus.copy()
        own = splits["train"].unlabelled()
        return own.subset(range(len(own))[: self._configuration.data.corpus_limit])

    def _encoder(self, seed: int) -> TextEncoder:
        """Return the encoder; what its checkpoint lacks, such as a pooler, is drawn by the seed."""
        given = self._configuration.encoder
        options: dict[str, Any] = {"dtype": getattr(torch, given.dtype)}
        if given.layers is not None:
            options["num_hidden_layers"] = given.layers
        if given.attention is not None:
            options["attn_implementation"] = given.attention
        seed_everything(seed)
        encoder = TextEncoder.load(given.model, pooling=given.pooling, max_length=given.max_length, **options)
        if given.gradient_checkpointing:
            encoder.recompute_activations()
        return encoder


def _splits(configuration: Configuration, seed: int) -> tuple[dict[Split, Texts], str | None]:
    """Return the labelled texts, and the metric."""
    data = configuration.data
    if data.dataset is not None:
        from .glue_tasks import glue

        splits, metric = glue(data.dataset, seed=seed)
        return splits, data.metric or metric
    if data.valid is None:
        texts = read_table(data.train, text=data.text, label=data.label, strict=data.strict)
        parts = random_split(len(texts), seed=seed)
        return {split: texts.subset(rows) for split, rows in parts.items()}, data.metric
    files: dict[Split, Any] = {"train": data.train, "valid": data.valid, "test": data.test}
    return {
        split: read_table(file, text=data.text, label=data.label, strict=data.strict) for split, file in files.items()
    }, data.metric
