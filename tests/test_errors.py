"""Every error that mlopt and its recipes raise on purpose derives from MloptError."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mlopt", "recipes")
NOT_OURS = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)}

#: Raised by design though they do not derive from MloptError.
ALLOWED = {
    (
        "mlopt/estimators/products/kernels.py",
        "RuntimeError",
    ): "its caller reports it like the RuntimeErrors of autograd",
    (
        "mlopt/estimators/products/tracing.py",
        "RuntimeError",
    ): "its caller names the level, like those of torch's tracer",
    ("mlopt/problem/captures.py", "RuntimeError"): "its caller names the level, like those of torch's tracer",
    ("recipes/tapweight/sharing.py", "Interrupted"): "a SystemExit, as after a signal to one process",
    ("mlopt/imports.py", "AttributeError"): "the protocol of a module's __getattr__",
    (
        "mlopt/files.py",
        "OSError",
    ): "an OSError, with the name of the file",
    ("mlopt/solving/loop.py", "Interrupted"): "a SystemExit",
    ("mlopt/testing/contract.py", "NotImplementedError"): "a test that lacks its estimator",
    ("mlopt/testing/contract.py", "SkipTest"): "unittest's way to skip",
    ("mlopt/testing/measuring.py", "AssertionError"): "a failed test",
    ("mlopt/testing/side_effects.py", "FloatingPointError"): "a loss that fails, for a test",
    ("recipes/__init__.py", "ImportError"): "no part of mlopt is imported yet",
    ("recipes/tapweight/files.py", "FileNotFoundError"): "an OSError, as open() raises it",
    ("recipes/tapweight/molecules/encoder.py", "FileNotFoundError"): "an OSError, as open() raises it",
}


def trees() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            yield str(file.relative_to(ROOT)), ast.parse(file.read_text(encoding="utf-8"))


def name_of(node: ast.expr | None) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def ours() -> set[str]:
    """Return the names of classes that derive from MloptError, and of functions annotated to return one."""
    nodes = [node for _, tree in trees() for node in ast.walk(tree)]
    classes = {node.name: {name_of(base) for base in node.bases} for node in nodes if isinstance(node, ast.ClassDef)}
    names = {"MloptError"}
    while more := {name for name, bases in classes.items() if bases & names} - names:
        names |= more
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return names | {function.name for function in functions if name_of(function.returns) in names}


def caught(kind: str, function: ast.AST, raised: ast.Raise) -> bool:
    """Say whether a handler around a `raise` in its own function catches it."""
    for node in ast.walk(function):
        if isinstance(node, ast.Try) and any(raised in ast.walk(statement) for statement in node.body):
            for handler in node.handlers:
                kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
                if kind in map(name_of, kinds):
                    return True
    return False


def raised() -> Iterator[tuple[str, int, str]]:
    """Yield file, line and class of every `raise` of a new error that leaves its function."""
    for path, tree in trees():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            kind = name_of(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
            # A variable is an error that was raised before.
            new = isinstance(node.exc, ast.Call) or kind in NOT_OURS
            if new and not any(caught(kind, function, node) for function in functions):
                yield path, node.lineno, kind


def test_every_error_that_is_raised_on_purpose_derives_from_mlopt_error() -> None:
    known = ours()
    strangers = [place for place in raised() if place[2] not in known and (place[0], place[2]) not in ALLOWED]
    assert not strangers


def test_every_exception_to_the_rule_is_still_used() -> None:
    assert {(path, kind) for path, _, kind in raised()} >= ALLOWED.keys()


@pytest.mark.parametrize(
    ("code", "leaves"),
    [
        ("def f():\n    try:\n        raise ValueError(1)\n    except (TypeError, ValueError):\n        pass", False),
        ("def f():\n    try:\n        raise ValueError(1)\n    except TypeError:\n        pass", True),
        ("def f():\n    try:\n        pass\n    except ValueError:\n        raise ValueError(1)", True),
    ],
)
def test_only_a_handler_around_it_catches_an_error(code: str, leaves: bool) -> None:
    (function,) = ast.parse(code).body
    (error,) = (node for node in ast.walk(function) if isinstance(node, ast.Raise))
    assert caught("ValueError", function, error) is not leaves
