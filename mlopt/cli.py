"""The command line, `mlopt COMMAND ...` and `mlopt RECIPE MODALITY ...`; only the requested command is imported."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import attrs

from .errors import MloptError
from .imports import import_optional, installed_version
from .launcher import EchoError, joined, require_alone

__all__ = ["main"]


@attrs.frozen
class Command:
    """A command.

    Attributes:
        summary: a phrase for the help.
        module: the module with its function, `function(arguments, *, prog)`, which may return an exit status.
        extra: the extra that it needs; empty if it needs none.
        function: the name of the function.
        shared: True if several processes of a launcher can run it together.
    """

    summary: str
    module: str
    extra: str = ""
    function: str = "main"
    shared: bool = False


@attrs.frozen
class Recipe:
    """The commands of a recipe, by name."""

    summary: str
    commands: dict[str, Command]


_DIAGNOSE = Command("diagnose a problem before a long run", "mlopt.diagnosis.command")

_DERIVATIVES = Command("measure which derivatives torch has right", "mlopt.diagnosis.derivatives")

_RECIPES = {
    "tapweight": Recipe(
        "adapt an encoder to a task, learning how much each pretraining objective should weigh",
        {
            "molecules": Command(
                "predict properties of molecules, from SMILES",
                "mlopt.recipes.tapweight.molecules.modality",
                "molecules",
                shared=True,
            ),
            "text": Command(
                "classify texts, or predict numbers for them",
                "mlopt.recipes.tapweight.text.modality",
                "text",
                shared=True,
            ),
            "predict": Command(
                "predict with the result of a run",
                "mlopt.recipes.tapweight.prediction",
                "all",
                "predict",
            ),
            "embed": Command(
                "write the features of a result's finetuned encoder",
                "mlopt.recipes.tapweight.prediction",
                "all",
                "embed",
            ),
            "demo": Command(
                "run it on molecules that ship with mlopt", "mlopt.recipes.tapweight.molecules.demo", "molecules"
            ),
            "demo-text": Command(
                "run it on the documentation that ships with Python", "mlopt.recipes.tapweight.text.demo", "text"
            ),
        },
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments after `mlopt`; those of the process if None.

    Returns:
        The exit status: that of the command, or 0 if it returns none; 2 for invalid input, with a message on standard error; 130
        after an interruption.

    Raises:
        SystemExit: after `--help`, `--version`, and arguments that cannot be parsed.
        Exception: a fault of the program, with its traceback.

    Example:
        >>> from mlopt.cli import main
        >>> main(["diagnose", "experiment"])  # prints a message on standard error
        2
    """
    try:
        return _dispatch(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        return _refuse("interrupted; progress since the last checkpoint is lost", 130)
    except EchoError:
        return 2
    except (MloptError, OSError) as error:
        return _refuse(str(error), 2)


def _dispatch(arguments: list[str]) -> int:
    """Run the command that the arguments name; without a command, print the help."""
    known, rest = _parser().parse_known_args(arguments)
    chosen: Command | argparse.ArgumentParser = known.chosen
    if isinstance(chosen, Command):
        if not chosen.shared:
            require_alone(f"`{known.prog}`")
        with joined():
            status = getattr(_load(chosen, known.prog), chosen.function)(rest, prog=known.prog)
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
        version=f"mlopt {installed_version()}",
        help="print the version",
    )
    parser.set_defaults(chosen=parser)
    recipes = parser.add_subparsers(title="commands and recipes", metavar="COMMAND")
    _add(recipes, "diagnose", _DIAGNOSE)
    _add(recipes, "derivatives", _DERIVATIVES)
    for name, recipe in _RECIPES.items():
        child = recipes.add_parser(name, help=recipe.summary, description=f"{recipe.summary.capitalize()}.")
        child.set_defaults(chosen=child)
        commands = child.add_subparsers(title="commands", metavar="COMMAND")
        for modality, command in recipe.commands.items():
            _add(commands, modality, command)
    return parser


def _add(commands: Any, name: str, command: Command) -> None:
    """Add a command that parses its own arguments."""
    leaf = commands.add_parser(name, help=command.summary, add_help=False, allow_abbrev=False)
    leaf.set_defaults(chosen=command, prog=leaf.prog)


def _load(command: Command, prog: str) -> Any:
    if not command.extra:
        return importlib.import_module(command.module)
    return import_optional(command.module, f"`{prog}`", f"'mlopt-torch[{command.extra}]'")


def _refuse(message: str, status: int) -> int:
    print(f"mlopt: {message}", file=sys.stderr)
    return status
