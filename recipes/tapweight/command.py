"""The command of a modality: claim the output folder, run each seed, report and save the results."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console
from rich.table import Table

import mlopt
from mlopt.durations import in_words
from mlopt.files import replacing
from mlopt.ranks import Ranks

from .command_line import CommandLine, parse, written_options
from .configuration import ConfigurationError, read, write
from .modality import Configuration, Device, Modality, device_of
from .predictor import MODEL, PREDICTOR, check_free
from .recipe import TapWeight
from .result import TapWeightResult
from .sharing import first_before_others, in_each
from .spread import Spread

__all__ = ["command"]

_CHECKPOINTS = "checkpoints"
#: A marker file: the first result replaces the earlier one in the folder, also after a resume.
_OVERWRITES = "overwrites"
#: Keys that a resumed run may change: the result does not depend on them.
_FREE = ("output", "device", "checkpoint_every")
_FILES = (
    "weights.json",
    "scores.json",
    "history.csv",
    "weights.png",
    "config.json",
    "environment.json",
    "summary.json",
    "predictions.csv",
    "splits.json",
    "skipped.csv",
)


def command(kind: type[Modality[Any]], arguments: Sequence[str], *, prog: str) -> None:
    """Run the command line of a modality: adapt an encoder once for each seed, report and save the results.

    With `--plan` it only reads and checks everything, and prints what it would do. Of several processes, the first one writes
    and prints.

    Args:
        kind: the modality.
        arguments: the options.
        prog: the name of the command.

    Raises:
        ConfigurationError: the options, or their file, cannot be used; the output folder holds a result, or, with `--resume`, a
            run of another configuration.
        ValueError: the data or the encoder cannot be used.
        SystemExit: after `--help`, and options that cannot be parsed.
    """
    ranks = Ranks.of_work(prog)
    line = in_each(ranks, partial(_parsed, kind, arguments, prog, printed=ranks.first))
    configuration: Configuration[Any, Any] = line.run
    output, device = Path(configuration.output or ""), device_of(configuration.device)
    _require_alike(ranks, attrs.evolve(line, run=attrs.evolve(configuration, device=device)))
    whole = configuration.resolved(output=output, seeds=configuration.seeds, device=device)

    def claim() -> None:
        _check_output(output, line.overwrite, line.resume)
        _check_same(whole, output / _CHECKPOINTS / "config.json", line.overwrite)
        if not line.plan:
            _claim(output, line.overwrite)

    ranks.by_first(claim)
    console = Console(quiet=not ranks.first)
    modality = first_before_others(ranks, lambda: kind(configuration, partial(_say, console)))
    if line.plan:
        ranks.by_first(lambda: _show_plan(console, modality, device))
        return
    results: list[TapWeightResult] = []
    for seed in configuration.seeds:
        if len(configuration.seeds) > 1:
            console.rule(f"seed {seed}")
        recipe = in_each(ranks, partial(modality.build, seed, device))
        first_before_others(ranks, partial(_introduce, console, recipe))
        recipe.check(configuration.steps, methods=configuration.methods)
        # Only now: a run that cannot start leaves nothing behind.
        ranks.by_first(partial(_begin, whole, output / _CHECKPOINTS, line.overwrite and not results))
        results.append(_run(recipe, configuration, seed, resume=line.resume))
        ranks.by_first(partial(_save, console, modality, results[-1], seed, device))
    if len(results) > 1:
        ranks.by_first(lambda: _save_several(console, whole, results, output))
    _say(console, f"Saved in {output}.")


def _parsed(kind: type[Modality[Any]], arguments: Sequence[str], prog: str, *, printed: bool) -> CommandLine[Any]:
    """Return the options, checked; print nothing if `printed` is False."""
    with contextlib.nullcontext() if printed else _silent():
        line = parse(arguments, kind.configuration_class, prog=prog, description=kind.summary)
    line.run.check(written_options(arguments, kind.configuration_class))
    return line


def _require_alike(ranks: Ranks, line: CommandLine[Any]) -> None:
    """Raise unless all processes have the same options."""
    plain = attrs.asdict(line, value_serializer=lambda _, __, value: str(value) if isinstance(value, Path) else value)
    (first, *others) = ranks.all_of(_flat(plain))
    for rank, other in enumerate(others, 1):
        if differ := [key for key in first if other[key] != first[key]]:
            key = differ[0].removeprefix("run.")
            raise ConfigurationError(
                f"process 0 has {key}={first[differ[0]]!r}, and process {rank} has {key}={other[differ[0]]!r}; start all "
                "processes with the same options"
            )


def _begin(whole: Configuration[Any, Any], folder: Path, overwrite: bool) -> None:
    """Write the configuration of a new run; mark that its first result replaces an earlier one, if it does."""
    _note(whole, folder / "config.json")
    if overwrite:
        (folder / _OVERWRITES).touch()


def _save(console: Console, modality: Modality[Any], result: TapWeightResult, seed: int, device: Device) -> None:
    """Write and print the result of a seed."""
    configuration: Configuration[Any, Any] = modality.configuration
    output, folder = Path(configuration.output or ""), _folder(configuration, seed)
    if (output / _CHECKPOINTS / _OVERWRITES).is_file():
        _clear(output)
        (output / _CHECKPOINTS / _OVERWRITES).unlink()
    result.save(folder)
    _list_skipped(_left_out(modality), output / "skipped.csv")
    write(configuration.resolved(output=folder, seeds=(seed,), device=device), folder / "config.json")
    for table in result.tables():
        console.print(table)
    _say(console, result.verdict)


def _save_several(
    console: Console, whole: Configuration[Any, Any], results: Sequence[TapWeightResult], output: Path
) -> None:
    """Write and print what the results of several seeds have in common."""
    write(whole, output / "config.json")
    _summarise(console, results, whole.seeds, output)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Print nothing inside."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _show_plan(console: Console, modality: Modality[Any], device: str) -> None:
    """Print what a run would do, for each seed: the rows left out, the task, the phases and their cost."""
    configuration: Configuration[Any, Any] = modality.configuration
    for (source, reason), count in Counter((source, reason) for source, _, reason in _left_out(modality)).items():
        _say(console, f"Left out of {Path(source).name}: {count} row{'s' * (count > 1)} ({reason}).")
    seconds = 0.0
    for seed in configuration.seeds:
        if len(configuration.seeds) > 1:
            console.rule(f"seed {seed}")
        recipe = modality.build(seed, device)
        _introduce(console, recipe)
        plan = recipe.plan(configuration.steps, methods=configuration.methods)
        seconds += plan.whole.seconds
        console.print(plan.table())
    runs = f" for {len(configuration.seeds)} seeds" if len(configuration.seeds) > 1 else ""
    _say(console, f"The run takes at most these passes: about {in_words(seconds)} on this machine{runs}.")
    _say(console, "Nothing was trained or written.")


def _left_out(modality: Modality[Any]) -> list[tuple[str, int, str]]:
    """Return the file, the row and the reason of each row that was left out, once."""
    rows = ((source, each.row, each.reason) for source, skipped in modality.skipped for each in skipped)
    return list(dict.fromkeys(rows))


def _list_skipped(rows: Sequence[tuple[str, int, str]], file: Path) -> None:
    """Write the rows that were left out, if there are any."""
    if rows:
        with file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("file", "row", "reason"), *rows])


def _folder(configuration: Configuration[Any, Any], seed: int) -> Path:
    """Return the folder of a seed's result."""
    output = Path(configuration.output or "")
    return output / f"seed-{seed}" if len(configuration.seeds) > 1 else output


def _run(recipe: TapWeight, configuration: Configuration[Any, Any], seed: int, *, resume: bool) -> TapWeightResult:
    folder = _folder(configuration, seed) / _CHECKPOINTS
    checkpoints = mlopt.Checkpoints(folder, every=configuration.checkpoint_every)
    return recipe.fit(configuration.steps, methods=configuration.methods, checkpoint=checkpoints, resume=resume)


def _introduce(console: Console, recipe: TapWeight) -> None:
    """Print the task, and remarks on the data."""
    _say(console, f"Task: {recipe.task.introduction()}.")
    recipe.prepare()
    remarks = [*recipe.task.remarks]
    for objective in recipe.objectives:
        remarks += [f"{objective.name}: {remark}" for remark in objective.remarks]
    for remark in remarks:
        _say(console, f"Note: {remark}.")


def _check_output(output: Path, overwrite: bool, resume: bool) -> None:
    """Refuse an output folder that holds a result or an unfinished run."""
    if output.exists() and not output.is_dir():
        raise ConfigurationError(f"output={str(output)!r} is a file; give a folder")
    check_free(output / MODEL)
    if overwrite and resume:
        raise ConfigurationError("--overwrite and --resume cannot be combined; give only one of them")
    begun, held = (output / _CHECKPOINTS / "config.json").is_file(), next(_held(output), None)
    if held is not None and not overwrite and not (resume and begun):
        raise ConfigurationError(
            f"{output} already holds a result ({held.name}); give another --output, or --overwrite"
        )
    if begun and not overwrite and not resume:
        raise ConfigurationError(
            f"{output} holds an unfinished run; resume it with --resume, or pass another --output or --overwrite"
        )


def _claim(output: Path, overwrite: bool) -> None:
    """Create the output folder before any computation."""
    if overwrite:
        for folder in (output, *output.glob("seed-*")):
            if (folder / _CHECKPOINTS).is_dir():
                shutil.rmtree(folder / _CHECKPOINTS)
    output.mkdir(parents=True, exist_ok=True)


def _check_same(configuration: Configuration[Any, Any], file: Path, overwrite: bool) -> None:
    """Compare the configuration with that of a run to resume, if there is one.

    Raises:
        ConfigurationError: they differ in something that the result depends on.
    """
    if file.is_file() and not overwrite:
        before = read(file, type(configuration))
        own, other = (_flat(attrs.asdict(whole)) for whole in (configuration, before))
        differ = [key for key in own if own[key] != other[key] and key not in _FREE]
        if differ:
            raise ConfigurationError(
                f"the run in {file.parent.parent} has {differ[0]}={other[differ[0]]!r}, not {own[differ[0]]!r}; resume with "
                "the same configuration, or pass another --output"
            )


def _note(configuration: Configuration[Any, Any], file: Path) -> None:
    """Write the configuration of a new run."""
    if not file.is_file():
        with replacing(file) as staged:
            write(configuration, staged)


def _flat(nested: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a dictionary of dictionaries, by the dotted path of their keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{path}".rstrip("."): entry for path, entry in inner.items()}
    return flat


def _held(output: Path) -> Iterator[Path]:
    """Yield the files and folders that earlier runs left in a folder."""
    yield from (output / name for name in _FILES if (output / name).is_file())
    if (output / "encoder" / "model.safetensors").is_file():
        yield output / "encoder"
    if (output / MODEL / PREDICTOR).is_file():
        yield output / MODEL
    yield from (folder for folder in sorted(output.glob("seed-*")) if (folder / "weights.json").is_file())


def _clear(output: Path) -> None:
    """Remove earlier results once there is a new one: a result of fewer seeds would mix with them."""
    for old in list(_held(output)):
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def _summarise(console: Console, results: Sequence[TapWeightResult], seeds: Sequence[int], output: Path) -> None:
    """Print means and standard deviations over the seeds, and write them to `summary.json`."""
    first = results[0]
    weights = {name: Spread.of([result.weights[name] for result in results]) for name in first.weights}
    scores = {
        method: {split: Spread.of([result.scores[method][split] for result in results]) for split in score}
        for method, score in first.scores.items()
    }
    summary = {"seeds": list(seeds), "metric": first.metric, "weights": weights, "scores": scores}
    (output / "summary.json").write_text(json.dumps(summary, default=attrs.asdict, indent=2) + "\n", encoding="utf-8")
    _say(console, f"Means (and standard deviations) over {len(seeds)} seeds:")
    table = Table("objective", "weight", "helps", "harms", title=f"Weights of {first.main.title}")
    for name, spread in sorted(weights.items(), key=lambda item: -item[1].mean):
        signals = [result.signals[name] for result in results if name in result.signals]
        means = [signal.mean for signal in signals if signal.significant]
        helps = sum(mean > 0 for mean in means)
        table.add_row(name, str(spread), f"{helps} of {len(seeds)}", f"{len(means) - helps} of {len(seeds)}")
    console.print(table)
    better = "higher" if first.greater_is_better else "lower"
    table = Table("method", "validation", "test", title=f"{first.metric} ({better} is better)")
    for method, score in scores.items():
        table.add_row(first.outcomes[method].title, str(score["valid"]), str(score["test"]))
    console.print(table)


def _say(console: Console, sentence: str) -> None:
    """Print a sentence literally: rich would read brackets as markup."""
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)
