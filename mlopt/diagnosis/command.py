"""The command `mlopt diagnose module:attribute`: examine a problem of the user's own before a long run."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..errors import ProblemError
from ..problem import Problem
from .diagnosis import diagnose

__all__ = ["load_problem", "main"]


def main(arguments: Sequence[str], *, prog: str = "mlopt diagnose") -> int:
    """Run the command.

    Args:
        arguments: the options.
        prog: how the command was called.

    Returns:
        The exit status: 0 where the problem is safe to run, 1 where a finding is an error.

    Raises:
        ProblemError: there is no such problem.
        SystemExit: after `--help`, and options that cannot be parsed.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Examine a problem before a long run: which estimators and products are safe for it, and why others are "
        "not. Ends with 0 where it is safe to run, with 1 where it is not.",
    )
    parser.add_argument(
        "problem", metavar="MODULE:ATTRIBUTE", help="a mlopt.Problem, or a function without arguments that returns one"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random numbers and batches (default: 0)")
    options = parser.parse_args(arguments)
    problem = load_problem(options.problem)
    diagnosis = diagnose(problem, seed=options.seed)
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    console.print(problem)
    console.print(diagnosis)
    return 0 if diagnosis.safe else 1


def load_problem(place: str) -> Problem:
    """Return the problem at `module:attribute`, the module looked for in the current folder first.

    Raises:
        ProblemError: there is no such module or attribute, or it is no problem.
    """
    module_name, separator, attribute = place.partition(":")
    if not (module_name and separator and attribute):
        raise ProblemError(f"diagnose: {place!r}; give MODULE:ATTRIBUTE, such as experiment:problem for experiment.py")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if importlib.util.find_spec(module_name.partition(".")[0]) is None:
        raise ProblemError(f"diagnose: there is no module {module_name!r} in {folder} or among the installed packages")
    found = importlib.import_module(module_name)
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ProblemError(f"diagnose: module {module_name!r} has no attribute {attribute!r}")
        found = getattr(found, name)
    problem = found() if callable(found) else found
    if not isinstance(problem, Problem):
        raise ProblemError(
            f"diagnose: {place!r} is a {type(problem).__name__}; it must be a mlopt.Problem, or a function that returns one"
        )
    return problem
