"""What a command of the recipe does whatever the modality: claim the output folder, run each seed, tell and save the results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from rich.console import Console
from rich.table import Table

import mlopt
from mlopt.files import replacing

from .configuration import ConfigurationError, read, write
from .recipe import TapWeight
from .result import WAYS, TapWeightResult
from .spread import Spread

__all__ = ["Recipes", "run", "say"]

_CHECKPOINTS = "checkpoints"
#: A file that says, also to a run that is gone on with, that the first result replaces what the folder holds.
_OVERWRITES = "overwrites"
#: What a run may be gone on with otherwise: it does not change the result.
_FREE = ("output", "device", "checkpoint_every")
_FILES = (
    "weights.json",
    "scores.json",
    "history.csv",
    "weights.png",
    "config.json",
    "environment.json",
    "summary.json",
)


class Recipes(Protocol):
    """How a modality makes the recipe of each seed from its configuration, once all data are read."""

    def __call__(self, seed: int, device: str) -> TapWeight:
        """Return the recipe, as a run of this seed alone would have it."""
        ...

    def introduce(self, recipe: TapWeight) -> str:
        """Say in a sentence what the task is."""
        ...


def run(configuration: Any, prepare: Any, *, overwrite: bool = False, resume: bool = False) -> list[TapWeightResult]:
    """Adapt an encoder once for each seed; tell and save the results.

    Args:
        configuration: the whole run: `output`, `seeds`, `steps`, `baselines`, `device`, `checkpoint_every`, and methods `check`
            and `resolved`.
        prepare: reads the data, telling what there is on a console, and returns the modality's `Recipes`.
        overwrite: replace the result that the output folder holds.
        resume: go on with the run of the same configuration that was begun there, if there is one.

    Returns:
        The results, one a seed.

    Raises:
        ConfigurationError: keys that are missing or do not go together; an output folder that holds a result, or, with `resume`,
            a run of another configuration.
        DataError: the data cannot be used.
    """
    configuration.check()
    device, output, seeds = _device(configuration.device), configuration.output, configuration.seeds
    _claim(output, overwrite, resume)
    whole = configuration.resolved(output=output, seeds=seeds, device=device)
    console = Console()
    recipes: Recipes = prepare(configuration, console)
    results = []
    for seed in seeds:
        if len(seeds) > 1:
            console.rule(f"seed {seed}")
        recipe = recipes(seed, device)
        say(console, recipes.introduce(recipe))
        _remark(console, recipe)
        # Only now: what cannot even begin leaves nothing behind.
        _note(whole, output / _CHECKPOINTS / "config.json")
        if overwrite and not results:
            (output / _CHECKPOINTS / _OVERWRITES).touch()
        folder = output / f"seed-{seed}" if len(seeds) > 1 else output
        checkpoints = mlopt.Checkpoints(folder / _CHECKPOINTS, every=configuration.checkpoint_every)
        baselines = configuration.baselines
        result = recipe.fit(configuration.steps, baselines=baselines, checkpoint=checkpoints, resume=resume)
        if (output / _CHECKPOINTS / _OVERWRITES).is_file():
            _clear(output)
            (output / _CHECKPOINTS / _OVERWRITES).unlink()
        result.save(folder)
        write(configuration.resolved(output=folder, seeds=(seed,), device=device), folder / "config.json")
        for table in result.tables():
            console.print(table)
        say(console, result.verdict)
        results.append(result)
    if len(seeds) > 1:
        write(whole, output / "config.json")
        _summarise(console, results, seeds, output)
    say(console, f"Saved in {output}.")
    return results


def _remark(console: Console, recipe: TapWeight) -> None:
    """Tell what a user should know about the data."""
    recipe.prepare()
    remarks = [*getattr(recipe.task, "remarks", ())]
    for objective in recipe.objectives:
        remarks += [f"{objective.name}: {remark}" for remark in getattr(objective, "remarks", ())]
    for remark in remarks:
        say(console, f"Note: {remark}.")


def _device(name: str) -> str:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigurationError("device='cuda', but PyTorch finds no GPU here; give 'cpu' or 'auto'")
    return ("cuda" if available else "cpu") if name == "auto" else name


def _claim(output: Path, overwrite: bool, resume: bool) -> None:
    """Make the output folder before anything is computed, and refuse one that holds a result, or a run that was begun."""
    if output.exists() and not output.is_dir():
        raise ConfigurationError(f"output={str(output)!r} is a file; give a folder")
    if overwrite and resume:
        raise ConfigurationError("--overwrite and --resume do not go together; give one of them")
    begun, held = (output / _CHECKPOINTS / "config.json").is_file(), next(_held(output), None)
    if held is not None and not overwrite and not (resume and begun):
        raise ConfigurationError(
            f"{output} already holds a result ({held.name}); give another --output, or --overwrite"
        )
    if begun and not overwrite and not resume:
        raise ConfigurationError(
            f"{output} holds a run that was begun; go on with it by --resume, or give another --output, or --overwrite"
        )
    if overwrite:
        for folder in (output, *output.glob("seed-*")):
            if (folder / _CHECKPOINTS).is_dir():
                shutil.rmtree(folder / _CHECKPOINTS)
    output.mkdir(parents=True, exist_ok=True)


def _note(configuration: Any, file: Path) -> None:
    """Write down the configuration of a run that begins; hold it against that of a run to go on with.

    Raises:
        ConfigurationError: they differ in something that the result depends on.
    """
    if file.is_file():
        before = read(file, type(configuration))
        own, other = (_flat(attrs.asdict(one)) for one in (configuration, before))
        differ = [key for key in own if own[key] != other[key] and key not in _FREE]
        if differ:
            raise ConfigurationError(
                f"the run in {file.parent.parent} has {differ[0]}={other[differ[0]]!r}, not {own[differ[0]]!r}; go on with the "
                "same configuration, or give another --output"
            )
        return
    with replacing(file) as staged:
        write(configuration, staged)


def _flat(nested: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a dictionary of dictionaries, by the dotted path of their keys."""
    flat = {}
    for key, value in nested.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{path}".rstrip("."): entry for path, entry in inner.items()}
    return flat


def _held(output: Path) -> Iterator[Path]:
    """Yield what earlier runs left in a folder."""
    yield from (output / name for name in _FILES if (output / name).is_file())
    if (output / "encoder" / "model.safetensors").is_file():
        yield output / "encoder"
    yield from (folder for folder in sorted(output.glob("seed-*")) if (folder / "weights.json").is_file())


def _clear(output: Path) -> None:
    """Remove what earlier runs left, once there is a new result: one of fewer seeds would mix with the old."""
    for old in list(_held(output)):
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def _summarise(console: Console, results: Sequence[TapWeightResult], seeds: Sequence[int], output: Path) -> None:
    """Tell, and write to `summary.json`, means and standard deviations over the seeds."""
    first = results[0]
    weights = {name: Spread.of([result.weights[name] for result in results]) for name in first.weights}
    scores = {
        way: {split: Spread.of([result.scores[way][split] for result in results]) for split in score}
        for way, score in first.scores.items()
    }
    summary = {"seeds": list(seeds), "metric": first.metric, "weights": weights, "scores": scores}
    (output / "summary.json").write_text(json.dumps(summary, default=attrs.asdict, indent=2) + "\n", encoding="utf-8")
    say(console, f"Means (and standard deviations) over {len(seeds)} seeds:")
    table = Table("objective", "weight", "helps", "harms", title="Learned weights")
    for name, spread in sorted(weights.items(), key=lambda item: -item[1].mean):
        means = [result.signals[name].mean for result in results if result.signals[name].significant]
        helps = sum(mean > 0 for mean in means)
        table.add_row(name, str(spread), f"{helps} of {len(seeds)}", f"{len(means) - helps} of {len(seeds)}")
    console.print(table)
    better = "higher" if first.greater_is_better else "lower"
    table = Table("way", "validation", "test", title=f"{first.metric} ({better} is better)")
    for way, score in scores.items():
        table.add_row(WAYS[way], str(score["valid"]), str(score["test"]))
    console.print(table)


def say(console: Console, sentence: str) -> None:
    """Print a sentence as it is: to rich, brackets would be markup."""
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)
