"""The commands `mlopt tapweight predict` and `mlopt tapweight embed`: use the predictor of a run on the rows of a file."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import numpy as np
from rich.console import Console

from mlopt.files import replacing
from mlopt.imports import import_optional

from .configuration import ConfigurationError
from .examples import UnusableError
from .files import DataError
from .modality import Device, device_of
from .names import distinct
from .predictor import Predictor, describe, model_folder
from .words import Option, given

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["embed", "load", "predict"]

#: The modules of the modalities, by the name in the description of a predictor; the name is also that of their extra.
_MODULES = {name: f"mlopt.recipes.tapweight.{name}.predictor" for name in ("molecules", "text")}
_OPTIONS = {
    "--input": Option("input", 1),
    "--output": Option("output", 1),
    "--columns": Option("columns", None),
    "--device": Option("device", 1),
}


def load(folder: Path, *, device: str = "cpu") -> Predictor:
    """Return the predictor of a run, of any modality.

    Args:
        folder: the folder of the run's result, or the folder `model` in it.
        device: the device to compute on.

    Raises:
        DataError: the folder holds no predictor.
        MissingDependencyError: the modality needs a package that is not installed.
    """
    name = describe(model_folder(folder))["modality"]
    if name not in _MODULES:
        raise DataError(f"{folder}: there is no modality {name!r}; use the class that saved the predictor")
    module = import_optional(_MODULES[name], f"a predictor of {name}", f"'mlopt-torch[{name}]'")
    predictor: Predictor = module.Predictor.load(folder, device=device)
    return predictor


def predict(arguments: Sequence[str], *, prog: str) -> None:
    """Predict the labels of the rows of a file.

    Args:
        arguments: the options.
        prog: the name of the command.

    Raises:
        ConfigurationError: the options cannot be used.
        DataError: the predictor or the file cannot be used.
    """
    options = _options(arguments, prog, "Predict the labels of new examples with the models of a run.", (".csv",))
    predictor, contents = _opened(options)
    predictions = predictor.predict(contents)
    _write(options.output, predictor, contents, predictions.header, predictions.cells, predictions.reasons)
    _say(options.output, predictions.reasons)


def embed(arguments: Sequence[str], *, prog: str) -> None:
    """Write the features of the rows of a file; see `predict`."""
    options = _options(
        arguments,
        prog,
        "Write the features of new examples from the finetuned encoder of a run.",
        (".npy", ".csv"),
    )
    predictor, contents = _opened(options)
    features, reasons = predictor.features(contents)
    if options.output.suffix == ".npy":
        with replacing(options.output) as staged, open(staged, "wb") as stream:
            np.save(stream, features)
    else:
        cells = [
            [""] * len(row) if reason else [*map(repr, row)]
            for row, reason in zip(features.tolist(), reasons, strict=True)
        ]
        _write(options.output, predictor, contents, [f"feature_{k}" for k in range(features.shape[1])], cells, reasons)
    _say(options.output, reasons)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are those of the command: one sentence."""

    def error(self, message: str) -> NoReturn:
        """Refuse a command line."""
        raise ConfigurationError(f"{message}; --help lists the options")


def _options(arguments: Sequence[str], prog: str, description: str, suffixes: tuple[str, ...]) -> argparse.Namespace:
    given(arguments, _OPTIONS, positional=True)
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="the folder of the result of a run")
    parser.add_argument(
        "--input", type=Path, required=True, metavar="FILE", help="the file of the SMILES or texts, one per row"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"{' or '.join(suffixes)}; it has a row for each row of the input",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="COLUMN",
        help="the column of the input, or the two columns of a pair (default: as in the training file, or else the usual names)",
    )
    parser.add_argument(
        "--device",
        choices=get_args(Device),
        default="auto",
        help="the device to compute on; auto is a GPU if there is one",
    )
    options = parser.parse_args(arguments)
    if options.output.suffix not in suffixes:
        raise ConfigurationError(f"output={str(options.output)!r}; give a name that ends in {' or '.join(suffixes)}")
    if options.output.resolve() == options.input.resolve():
        raise ConfigurationError(f"--output={str(options.output)!r} would overwrite the input; give another name")
    return options


def _opened(options: argparse.Namespace) -> tuple[Predictor, list[Any]]:
    """Return the predictor, and the contents of all rows of the input."""
    predictor = load(options.folder, device=device_of(options.device))
    count = len(predictor.columns)
    if options.columns and len(options.columns) != count:
        raise ConfigurationError(f"--columns names {len(options.columns)} columns; the predictor takes {count}")
    return predictor, predictor.read(options.input, options.columns)


def _write(
    file: Path,
    predictor: Predictor,
    contents: Sequence[Any],
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    reasons: Sequence[str],
) -> None:
    """Write the contents of each row, its cells, and the reason if it cannot be used."""
    with replacing(file) as staged, open(staged, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(distinct([*predictor.columns, *header, "reason"]))
        for content, row, reason in zip(contents, cells, reasons, strict=True):
            own = "" if isinstance(content, UnusableError) else content
            writer.writerow([*([own] if isinstance(own, str | None) else own), *row, reason])


def _say(output: Path, reasons: Sequence[str]) -> None:
    """Print the number of rows, and how many could not be used."""
    bad = [k for k, reason in enumerate(reasons) if reason]
    named = f"; {len(bad)} cannot be used, the first: record {bad[0] + 1} ({reasons[bad[0]]})" if bad else ""
    sentence = f"{len(reasons)} rows in {output}{named}."
    Console().print(sentence, markup=False, highlight=False, soft_wrap=True)
