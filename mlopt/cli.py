"""The command line: `mlopt diagnose ...`, `mlopt RECIPE MODALITY ...`; each command is imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from .errors import MloptError

__all__ = ["main"]


@attrs.frozen
class Command:
    """A command.

    Attributes:
        summary: what it does, in a phrase.
        module: where its `main(arguments, *, prog)` is, which may return an exit status.
        extra: the optional dependencies that it needs; empty where it needs none.
    """

    summary: str
    module: str
    extra: str = ""


@attrs.frozen
class Recipe:
    """A recipe's commands, by name."""

    summary: str
    commands: dict[str, Command]


_DIAGNOSE = Command("examine a problem of yours before a long run", "mlopt.diagnosis.command")

_RECIPES = {
    "tapweight": Recipe(
        "adapt an encoder to a task, learning how much each pretraining objective should weigh",
        {
            "molecules": Command(
                "predict properties of molecules, from SMILES", "mlopt.recipes.tapweight.molecules.modality", "molecules"
            ),
            "text": Command(
                "classify texts, or predict numbers for them", "mlopt.recipes.tapweight.text.modality", "text"
            ),
            "demo": Command(
                "watch it on molecules that ship with mlopt", "mlopt.recipes.tapweight.molecules.demo", "molecules"
            ),
            "demo-text": Command(
                "watch it on the documentation that ships with Python", "mlopt.recipes.tapweight.text.demo", "text"
            ),
        },
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows `mlopt`; those of the process when None.

    Returns:
        The exit status: that of the command, 0 where it tells none; 2 after an error in what was given, told on standard
        error; 130 when interrupted.

    Raises:
        SystemExit: after `--help`, `--version` and arguments that cannot be parsed.
        Exception: an error in the program itself, with its traceback.
    """
    try:
        return _dispatch(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        return _refuse("interrupted; of a run that had not ended, what its checkpoints hold is saved", 130)
    except (MloptError, OSError) as error:
        return _refuse(str(error), 2)
    except (ValueError, ImportError) as error:
        if not _on_purpose(error):
            raise
        return _refuse(str(error), 2)


def _dispatch(arguments: list[str]) -> int:
    """Hand the arguments to the command that they name, or print the help of what they name instead."""
    known, rest = _parser().parse_known_args(arguments)
    chosen: Command | argparse.ArgumentParser = known.chosen
    if isinstance(chosen, Command):
        status = _load(chosen, known.prog).main(rest, prog=known.prog)
        return status if isinstance(status, int) else 0
    if rest:
        chosen.error(f"unrecognised arguments: {' '.join(rest)}")
    chosen.print_help()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlopt", description="Multi-level optimisation in PyTorch.", allow_abbrev=False
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"mlopt {importlib.metadata.version('mlopt-torch')}",
        help="print the version",
    )
    parser.set_defaults(chosen=parser)
    recipes = parser.add_subparsers(title="commands and recipes", metavar="COMMAND")
    _add(recipes, "diagnose", _DIAGNOSE)
    for name, recipe in _RECIPES.items():
        child = recipes.add_parser(name, help=recipe.summary, description=f"{recipe.summary.capitalize()}.")
        child.set_defaults(chosen=child)
        commands = child.add_subparsers(title="commands", metavar="COMMAND")
        for modality, command in recipe.commands.items():
            _add(commands, modality, command)
    return parser


def _add(commands: Any, name: str, command: Command) -> None:
    """Add a command whose arguments are its own business."""
    leaf = commands.add_parser(name, help=command.summary, add_help=False, allow_abbrev=False)
    leaf.set_defaults(chosen=command, prog=leaf.prog)


def _load(command: Command, prog: str) -> Any:
    try:
        return importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "mlopt" or not command.extra:
            raise
        raise ModuleNotFoundError(
            f"`{prog}` needs {missing}, which is not installed: pip install 'mlopt-torch[{command.extra}]'"
        ) from error


def _on_purpose(error: Exception) -> bool:
    """Say whether a `raise` in mlopt made the error, and not a call that failed, such as torch's or `zip`'s."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(__file__).parent) and (last.line or "").startswith("raise ")


def _refuse(sentence: str, status: int) -> int:
    print(f"mlopt: {sentence}", file=sys.stderr)
    return status
