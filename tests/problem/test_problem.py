"""Levels and problems: error messages, references inferred from a loss, and printing."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from core_cases import squared
from torch import Tensor, nn

import mlopt
from mlopt.testing import SHAPES, quadratic


def module() -> nn.Module:
    return mlopt.variables(torch.ones(2))


def level(name: str, loss: Callable[..., Any] = squared, **arguments: Any) -> mlopt.Level:
    return mlopt.Level(name, arguments.pop("module", None) or module(), loss, **arguments)


def on(*names: str) -> Callable[..., Tensor]:
    """Return a loss that refers to levels."""
    listed = "".join(f", {name}" for name in names)
    loss: Callable[..., Tensor] = eval(f"lambda own, batch{', *' if names else ''}{listed}: own().sum()")
    return loss


def refused(sentence: str) -> Any:
    return pytest.raises(mlopt.ProblemError, match=sentence)


# Levels


@pytest.mark.parametrize("name", ["two words", "", "1st", "class", "a-b", 3])
def test_names_are_python_names(name: Any) -> None:
    with refused(re.escape(f"Level: name={name!r}; it must be a valid Python name")):
        level(name)


@pytest.mark.parametrize("value", [torch.ones(2), nn.Parameter(torch.ones(2)), [nn.Linear(1, 1)], nn.Linear])
def test_a_module_is_a_module(value: Any) -> None:
    with refused(r"(?s)level 'a': module=.*; give an nn\.Module; wrap a bare tensor in mlopt\.variables\(tensor\)"):
        mlopt.Level("a", value, squared)


@pytest.mark.parametrize("steps", [0, -1, 1.0, True, "3", None])
def test_steps_are_whole_and_positive(steps: Any) -> None:
    with refused(re.escape(f"level 'a': steps={steps!r}; it must be a whole number >= 1")):
        level("a", steps=steps)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            iter([1]),
            r"data is a list_iterator that can be iterated only once; give an iterable that starts again each epoch",
        ),
        ((x for x in [1]), r"data is a generator that can be iterated only once"),
        (torch.ones(2, 2), r"data is a tensor, whose rows would be batches; give \[tensor\] for one batch"),
        (3, r"data=3 is a int that cannot be iterated; give batches: a DataLoader, or a list"),
    ],
)
def test_data_can_be_iterated_repeatedly(data: Any, sentence: str) -> None:
    with refused("level 'a': " + sentence):
        level("a", data=data)


def test_an_estimator_is_an_estimator() -> None:
    with refused(r"level 'a': estimator=.*; give an estimator, such as mlopt\.ConjugateGradient\(iterations=10\)"):
        level("a", estimator=mlopt.ConjugateGradient)
    with refused("level 'a': estimator='dense' is a str; give an estimator"):
        level("a", estimator="dense")


@pytest.mark.parametrize("arguments", [{"loss": 3}, {"loss": squared, "regularizer": 3}], ids=["loss", "regularizer"])
def test_a_loss_can_be_called(arguments: dict[str, Any]) -> None:
    with refused("the (loss|regularizer) of level 'a' is 3, which is not callable; give a function"):
        level("a", **arguments)


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (lambda own, batch, **others: 0, r"takes \*\*others: name the levels it refers to, one keyword-only parameter"),
        (lambda own: 0, r"takes 1 required positional parameters \(own\); it must take 2 \(the module and the batch\)"),
        (
            lambda own, batch, y: 0,
            r"takes 3 required positional parameters \(own, batch, y\); it must take 2.*after a \*",
        ),
        (lambda *, y: 0, r"takes 0 required positional parameters"),
        (torch.add, "its signature cannot be read"),
    ],
)
def test_a_loss_takes_the_module_and_the_batch(loss: Callable[..., Any], sentence: str) -> None:
    with refused("the loss of level 'a'.*" + sentence):
        level("a", loss)


def test_a_regularizer_takes_the_module() -> None:
    with refused(r"the regularizer of level 'a' takes 2 required positional .*; it must take 1 \(the module\)"):
        level("a", regularizer=lambda own, batch: 0)


class Callable_:  # noqa: N801
    """Losses that are an object, its method and its static method."""

    def __call__(self, own: nn.Module, batch: Any, *, y: nn.Module) -> Tensor:
        return own().sum()

    def method(self, own: nn.Module, batch: Any, *, z: nn.Module, beta: float = 0.5) -> Tensor:
        return own().sum()

    @staticmethod
    def static(own: nn.Module, batch: Any = None, scale: float = 1.0, *, w: nn.Module) -> Tensor:
        return own().sum()


def plain(own: nn.Module, batch: Any, *, y: nn.Module, z: nn.Module, temperature: float = 1.0) -> Tensor:
    return own().sum()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (plain, ("y", "z")),
        (squared, ()),
        (partial(plain, temperature=2.0), ("y", "z")),
        (partial(plain, z=module()), ("y",)),
        (Callable_(), ("y",)),
        (Callable_().method, ("z",)),
        (Callable_.static, ("w",)),
        (partial(Callable_().method, beta=1.0), ("z",)),
    ],
)
def test_references_are_required_keyword_only_parameters(loss: Callable[..., Any], expected: tuple[str, ...]) -> None:
    assert level("a", loss).references == expected


def test_references_of_loss_and_regularizer_are_joined() -> None:
    both = level("a", on("y", "z"), regularizer=lambda own, *, z, w, decay=1.0: own().sum())
    assert both.references == ("y", "z", "w")
    assert both.loss_references == ("y", "z")
    assert both.regularizer_references == ("z", "w")


def test_variables_are_a_copy() -> None:
    tensor = torch.ones(2)
    wrapped = mlopt.variables(tensor)
    tensor.add_(1)
    assert torch.equal(wrapped(), torch.ones(2))
    assert wrapped() is wrapped.value


# Problems


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: mlopt.Problem(), "Problem: it has no level"),
        (lambda: mlopt.Problem([level("a")]), "argument 0 is a list; give levels one by one, outermost first"),
        (lambda: mlopt.Problem(level("a"), level("a")), "two levels have the name 'a'; rename one"),
        (
            lambda: mlopt.Problem(level("weights", on("clasifier")), level("classifier", on("weights"))),
            "level 'weights' refers to 'clasifier', which is not a level; the levels are weights, classifier. "
            "Did you mean 'classifier'?",
        ),
        (
            lambda: mlopt.Problem(level("a", on("zzz")), level("b")),
            r"level 'a' refers to 'zzz', which is not a level; the levels are a, b\.$",
        ),
        (
            lambda: mlopt.Problem(level("a", on("a"))),
            "level 'a' refers to itself.*remove the keyword-only parameter 'a'",
        ),
        (
            lambda: mlopt.Problem(level("a", on("b")), level("b"), level("c", on("a"))),
            "level 'c' cannot influence 'a', the outermost level.*refer to it, or leave the level out",
        ),
        (
            lambda: mlopt.Problem(level("a"), level("b", on("a"), estimator=mlopt.Identity())),
            "level 'b' cannot influence 'a'",
        ),
        (
            lambda: mlopt.Problem(level("a", on("b")), level("b", on("a"))),
            "level 'b': estimator=None, and its solution depends on 'a'.*give one, such as mlopt.ConjugateGradient",
        ),
        (
            lambda: mlopt.Problem(level("a", module=nn.ReLU())),
            "level 'a': its ReLU has no trainable parameter; set requires_grad, or pass the module to the losses directly",
        ),
        (
            lambda: mlopt.Problem(level("a", module=nn.Linear(1, 1).requires_grad_(False))),
            "level 'a': its Linear has no trainable parameter",
        ),
        (
            lambda: mlopt.Problem(level("a", module=mlopt.variables(torch.ones(1, dtype=torch.complex64)))),
            "level 'a': parameter 'value' is of torch.complex64; only real floating dtypes",
        ),
        (
            lambda: mlopt.Problem(
                level("a", on("b")),
                level("b", on("a", "c"), estimator=mlopt.Identity()),
                level("c", on("a", "b"), estimator=mlopt.Identity()),
                level("d"),
            ),
            "level 'd' cannot influence 'a'",
        ),
    ],
)
def test_an_invalid_problem_is_refused(build: Callable[[], mlopt.Problem], sentence: str) -> None:
    with refused(sentence):
        build()


def test_a_level_that_depends_on_nothing_needs_no_estimator() -> None:
    problem = mlopt.Problem(level("a", on("b")), level("b"))
    assert not problem.needs_estimator("b")
    assert mlopt.hypergradient(problem).reports == {}


def test_a_module_of_two_levels_is_refused() -> None:
    shared = module()
    with refused(r"levels 'a' and 'b' train the same tensor \(a.value is b.value\); give one of them a copy"):
        mlopt.Problem(level("a", on("b"), module=shared), level("b", module=shared))


@pytest.mark.parametrize("arguments", [{"level": "inner"}, {"batches": {"inner": None}}])
def test_an_unknown_level_is_named(arguments: dict[str, Any]) -> None:
    with refused("there is no level 'inner'; the levels are a, b"):
        mlopt.hypergradient(mlopt.Problem(level("a", on("b")), level("b")), **arguments)


def test_a_loss_without_a_graph_is_an_error() -> None:
    problem = mlopt.Problem(level("a", lambda own, batch, *, b: own().sum().detach()), level("b"))
    with refused("the loss of level 'a' does not depend on its variables: was it computed under no_grad, or detached?"):
        mlopt.hypergradient(problem)


@pytest.mark.parametrize("products", ["autograd", "forward", "finite_difference"])
@pytest.mark.parametrize("name", ["inner", "loss", "level", "module", "batch", "value", "T"])
def test_any_name_works(name: str, products: str) -> None:
    _check_name(name, products)


@pytest.mark.parametrize("name", ["train", "values", "update", "type", "forward"])
def test_any_name_works_with_forward_products(name: str) -> None:
    _check_name(name, "forward")


def _check_name(name: str, products: str) -> None:
    shape = {"x": (None, (name,)), name: ("x", ("x",))}
    case = quadratic(shape, mlopt.Dense(products=products))
    assert case.error(mlopt.hypergradient(case.problem).gradient) < 1e-6


# Printing


@pytest.mark.parametrize("shape", SHAPES)
def test_printing_draws_every_level_under_its_host(shape: str) -> None:
    problem = quadratic(shape, mlopt.Neumann(iterations=7)).problem
    lines = str(problem).splitlines()
    drawn = {line.strip("│├└─ ").split()[0]: line for line in lines}
    assert set(drawn) == set(SHAPES[shape])
    assert len(lines) == len(drawn)
    depth = {name: len(line) - len(line.lstrip("│├└─ ")) for name, line in drawn.items()}
    order = list(drawn)
    for name, (host, refs) in SHAPES[shape].items():
        above = [n for n in order[: order.index(name)] if depth[n] < depth[name]]
        assert (above[-1] if above else None) == host
        assert f"refers to {', '.join(refs)}" in drawn[name]
        assert "5 variables" in drawn[name]
        assert ("Neumann(iterations=7" in drawn[name]) == (host is not None)
    assert repr(problem) == f"Problem({', '.join(SHAPES[shape])})"


def test_printing_shows_steps_and_counts() -> None:
    text = str(
        mlopt.Problem(
            level("a", on("b"), module=mlopt.variables(torch.ones(()))),
            level("b", module=nn.Linear(100, 20), steps=3),
        )
    )
    assert text.splitlines()[0] == "a  1 variable, refers to b"
    assert text.splitlines()[1].endswith("b  2,020 variables, 3 steps a solve")
