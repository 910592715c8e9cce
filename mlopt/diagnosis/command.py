"""The command `mlopt diagnose module:attribute`: diagnose a user's problem before a long run."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import ProblemError
from ..problem import Problem
from .diagnosis import diagnose

__all__ = ["load_problem", "main"]


def main(arguments: Sequence[str], *, prog: str = "mlopt diagnose") -> int:
    """Run the command.

    Args:
        arguments: the options.
        prog: name of the command, for its help.

    Returns:
        The exit status: 0 if the problem is safe to run, 1 if a finding is an error.

    Raises:
        ProblemError: the problem does not exist.
        SystemExit: after `--help`, or for options that cannot be parsed.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Diagnose a problem before a long run: which estimators and products are safe for it, and why others are "
        "not. The exit status is 0 if it is safe to run, 1 if it is not.",
    )
    parser.add_argument(
        "problem", metavar="MODULE:ATTRIBUTE", help="a mlopt.Problem, or a function without arguments that returns one"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of random numbers and batches (default: 0)")
    parser.add_argument(
        "--processes", type=int, default=1, help="number of processes for which memory is estimated (default: 1)"
    )
    options = parser.parse_args(arguments)
    problem = load_problem(options.problem)
    diagnosis = diagnose(problem, seed=options.seed, processes=options.processes)
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    console.print(problem)
    console.print(diagnosis)
    return 0 if diagnosis.safe else 1


def load_problem(place: str) -> Problem:
    """Return the problem at `module:attribute`; modules of the current folder come first.

    Raises:
        ProblemError: the module or attribute does not exist, or is not a problem.
    """
    module_name, separator, attribute = place.partition(":")
    if not (all(name.isidentifier() for name in module_name.split(".")) and separator and attribute):
        raise ProblemError(f"diagnose: {place!r}; give MODULE:ATTRIBUTE, such as experiment:problem for experiment.py")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, and imports one that does not
        raise ProblemError(
            f"diagnose: there is no module {module_name!r} in {folder} or among the installed packages"
        ) from error
    for name in attribute.split("."):
        if not hasattr(value, name):
            raise ProblemError(f"diagnose: module {module_name!r} has no attribute {attribute!r}")
        value = getattr(value, name)
    problem = value() if callable(value) else value
    if not isinstance(problem, Problem):
        raise ProblemError(
            f"diagnose: {place!r} is a {type(problem).__name__}; it must be a mlopt.Problem, or a function that returns one"
        )
    return problem
