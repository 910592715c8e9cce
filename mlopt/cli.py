"""The command line, `mlopt COMMAND ...` and `mlopt RECIPE MODALITY ...`; only the requested command is imported."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from .errors import ArgumentError, MloptError
from .imports import import_optional, installed_version
from .launcher import EchoError, joined, require_alone
from .validation import shown

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


_COMMANDS: dict[str, Command | Recipe] = {
    "diagnose": Command("diagnose a problem before a long run", "mlopt.diagnosis.command"),
    "derivatives": Command("list the derivatives that torch computes wrongly", "mlopt.diagnosis.derivatives"),
    "tapweight": Recipe(
        "adapt an encoder to a task and learn the weight of each pretraining objective",
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
                "predict with the models of a run",
                "mlopt.recipes.tapweight.prediction",
                "all",
                "predict",
            ),
            "embed": Command(
                "write the features from the finetuned encoder of a run",
                "mlopt.recipes.tapweight.prediction",
                "all",
                "embed",
            ),
            "demo": Command(
                "run an example on molecules that ship with mlopt",
                "mlopt.recipes.tapweight.molecules.demo",
                "molecules",
            ),
            "demo-text": Command(
                "run an example on the documentation that ships with Python",
                "mlopt.recipes.tapweight.text.demo",
                "text",
            ),
        },
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments after `mlopt`; those of the process if None.

    Returns:
        The exit status: that of the command, or 0 if it returns none; 2 for invalid input, such as a command that does not exist,
        with a message on standard error; 130 after an interruption.

    Raises:
        SystemExit: after `--help` and `--version`.
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
    """Run the command that the arguments name."""
    _check(arguments)
    known, rest = _parser().parse_known_args(arguments)
    chosen: Command = known.chosen
    if not chosen.shared:
        require_alone(f"`{known.prog}`")
    with joined():
        status = getattr(_load(chosen, known.prog), chosen.function)(rest, prog=known.prog)
    return status if isinstance(status, int) else 0


def _check(arguments: Sequence[str]) -> None:
    """Refuse arguments that do not begin with a command, unless they ask for the help or the version.

    Raises:
        ArgumentError: they do not; the message names the nearest command.
    """
    prog, commands, options = "mlopt", _COMMANDS, ["-h", "--help", "--version"]
    for word in arguments:
        if word in options:
            return
        if word not in commands:
            raise ArgumentError(_unknown(word, prog, commands, options))
        chosen, prog = commands[word], f"{prog} {word}"
        if isinstance(chosen, Command):
            return
        commands, options = {**chosen.commands}, ["-h", "--help"]
    raise ArgumentError(f"a command is missing after `{prog}`; give one of {', '.join(commands)}, or --help")


def _unknown(word: str, prog: str, commands: Mapping[str, Command | Recipe], options: Sequence[str]) -> str:
    """Return the sentence on a word that is neither a command nor an option, with the nearest one."""
    if word.startswith("-"):
        near = difflib.get_close_matches(word, options, n=1, cutoff=0.75)
        remedy = f"did you mean {near[0]}?" if near else f"give one of {', '.join(commands)} before its options"
        return f"`{prog}` has no option {word}; {remedy}"
    recipes = ((name, each) for name, each in commands.items() if isinstance(each, Recipe))
    paths = {command: f"{prog} {name} {command}" for name, recipe in recipes for command in recipe.commands}
    paths |= {name: f"{prog} {name}" for name in commands}
    near = difflib.get_close_matches(word.casefold(), paths, n=1)
    remedy = f"did you mean `{paths[near[0]]}`?" if near else f"give one of {', '.join(commands)}"
    return f"`{prog}` has no command {shown(word)}; {remedy}"


def _parser() -> argparse.ArgumentParser:
    """Return the parser of arguments that `_check` accepts."""
    parser = argparse.ArgumentParser(
        prog="mlopt", description="Multi-level optimisation in PyTorch.", allow_abbrev=False
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"mlopt {installed_version()}",
        help="print the version",
    )
    top = parser.add_subparsers(title="commands and recipes", metavar="COMMAND")
    for name, each in _COMMANDS.items():
        if isinstance(each, Command):
            _add(top, name, each)
            continue
        child = top.add_parser(name, help=each.summary, description=f"{each.summary.capitalize()}.")
        commands = child.add_subparsers(title="commands", metavar="COMMAND")
        for inner, command in each.commands.items():
            _add(commands, inner, command)
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
