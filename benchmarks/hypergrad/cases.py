"""The two-level problems: modules, data and losses in plain torch, and the point at which all libraries are compared.

An inner module x and an outer module u have the losses f(x, u) and F(x, u). The hypergradient at a point is
F_u - f_ux (f_xx)^-1 F_x, also if x does not minimise f there. The parent process creates a case once, at its point, and writes
its tensors to a file; every worker reads that file, so all of them use the same numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import data, exact
from .networks import GIN, SampleWeights, Transformer, Vector, mlp

__all__ = ["RECIPES", "Bound", "Case", "Recipe", "flat", "load", "make"]

Loss = Callable[[Any, Any, dict[str, Any]], Tensor]
SAMPLES = 1_000


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class Bound:
    """A module evaluated with given tensors in place of its parameters, for libraries of pure functions."""

    def __init__(self, module: nn.Module, tensors: Sequence[Tensor]) -> None:
        self._module, self._tensors = module, tuple(tensors)
        self._named = dict(zip((name for name, _ in module.named_parameters()), self._tensors, strict=True))

    def __call__(self, *inputs: Tensor) -> Any:
        return torch.func.functional_call(self._module, self._named, inputs)

    def parameters(self) -> Iterator[Tensor]:
        return iter(self._tensors)


@dataclasses.dataclass
class Case:
    """A problem at a point.

    Attributes:
        name: name of the recipe.
        inner: the module x.
        outer: the module u.
        data: the data that the losses read.
        inner_loss: f, of (inner, outer, data).
        outer_loss: F, of (inner, outer, data).
        step_size: 1 / (1.05 lambda_max(f_xx)), for series and fixed-point maps.
        exact: the hypergradient at this point, flat, in float64.
        identity: the same with the identity in place of f_xx, flat, in float64.
    """

    name: str
    inner: nn.Module
    outer: nn.Module
    data: dict[str, Any]
    inner_loss: Loss
    outer_loss: Loss
    step_size: float = 0.0
    exact: Tensor | None = None
    identity: Tensor | None = None

    def f(self) -> Tensor:
        """Return the inner loss at the modules' own parameters."""
        return self.inner_loss(self.inner, self.outer, self.data)

    def F(self) -> Tensor:  # noqa: N802
        """Return the outer loss at the modules' own parameters."""
        return self.outer_loss(self.inner, self.outer, self.data)

    def f_of(self, x: Sequence[Tensor], u: Sequence[Tensor]) -> Tensor:
        """Return the inner loss as a function of two lists of tensors."""
        return self.inner_loss(Bound(self.inner, x), Bound(self.outer, u), self.data)

    def F_of(self, x: Sequence[Tensor], u: Sequence[Tensor]) -> Tensor:  # noqa: N802
        """Return the outer loss as a function of two lists of tensors."""
        return self.outer_loss(Bound(self.inner, x), Bound(self.outer, u), self.data)

    @property
    def x(self) -> list[Tensor]:
        """The inner module's own parameters."""
        return list(self.inner.parameters())

    @property
    def u(self) -> list[Tensor]:
        """The outer module's own parameters."""
        return list(self.outer.parameters())

    def to(self, dtype: torch.dtype, device: str = "cpu", *, outer: torch.dtype | None = None) -> Case:
        """Return a copy with its numbers rounded to a dtype (optionally with another dtype for the outer variables)."""

        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(move(part) for part in value)
            return value.to(device, dtype if value.is_floating_point() else None)

        return dataclasses.replace(
            self,
            inner=copy.deepcopy(self.inner).to(device, dtype),
            outer=copy.deepcopy(self.outer).to(device, outer or dtype),
            data={key: move(value) for key, value in self.data.items()},
        )

    def plain_gradient(self) -> None:
        """Take one gradient of the inner loss by the inner variables: the unit of every cost."""
        torch.autograd.grad(self.f(), self.x)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The construction of a case.

    Attributes:
        modules: returns the inner and the outer module.
        data: returns the data, in float64.
        inner_loss: f.
        outer_loss: F.
        dtype: dtype of the computation in the libraries.
        travel: iterations of L-BFGS on f that bring x to its point; None if `data` contains the minimiser.
        pretraining: iterations of L-BFGS without the proximal term that find its anchor; None for an anchor at zero.
        at_optimum: True if x minimises f at the point, up to rounding.
        reference: if True, compute the exact hypergradient.
    """

    modules: Callable[[], tuple[nn.Module, nn.Module]]
    data: Callable[[], dict[str, Any]]
    inner_loss: Loss
    outer_loss: Loss
    dtype: torch.dtype = torch.float32
    travel: int | None = 15
    pretraining: int | None = 25
    at_optimum: bool = False
    reference: bool = True

    def case(self, name: str, tensors: dict[str, Any]) -> Case:
        """Return the case with these tensors, newly made or read from a file."""
        torch.manual_seed(0)
        inner, outer = self.modules()
        return Case(name, inner.double(), outer.double(), tensors, self.inner_loss, self.outer_loss)


def cleaning_loss(inner: Any, outer: Any, data: dict[str, Any], *, ridge: float) -> Tensor:
    """The inner loss of hyper-cleaning: samples weighted by the outer variables, and a proximal term.

    The term, ridge ||x - anchor||^2 / 2, makes f_xx positive definite, as in iMAML (Rajeswaran et al. 2019, arXiv 1909.04630).
    The anchor is a pretrained network, or zero for logistic regression.
    """
    losses = cross_entropy(inner(*data["training"]), data["labels"], reduction="none")
    penalty = sum((p - a).square().sum() for p, a in zip(inner.parameters(), data["anchor"], strict=True))
    return (outer() * losses).mean() + 0.5 * ridge * penalty


def validation_loss(inner: Any, outer: Any, data: dict[str, Any]) -> Tensor:
    """The outer loss of hyper-cleaning: the plain mean over held-out samples."""
    return cross_entropy(inner(*data["validation"]), data["validation_labels"])


def quadratic_inner(inner: Any, outer: Any, data: dict[str, Any]) -> Tensor:
    """f = x^T A x / 2 - x^T B u."""
    x, u = inner()[:, None], outer()[:, None]  # columns, because only products of matrices count as operations
    return (0.5 * x.T @ (data["A"] @ x) - x.T @ (data["B"] @ u)).squeeze()


def quadratic_outer(inner: Any, outer: Any, data: dict[str, Any]) -> Tensor:
    """F = ||x - c||^2 / 2 + ||u||^2 / 2."""
    return 0.5 * (inner() - data["c"]).square().sum() + 0.5 * outer().square().sum()


def _quadratic(condition: int) -> Recipe:
    return Recipe(
        lambda: (Vector(200), Vector(20)),
        partial(data.quadratic, condition=condition),
        quadratic_inner,
        quadratic_outer,
        torch.float64,
        travel=None,
        at_optimum=True,
    )


def _cleaning(inner: Callable[[], nn.Module], made: Callable[[], dict[str, Any]], ridge: float, **how: Any) -> Recipe:
    count = how.pop("count", SAMPLES)
    loss = partial(cleaning_loss, ridge=ridge)
    return Recipe(lambda: (inner(), SampleWeights(count)), made, loss, validation_loss, **how)


RECIPES: dict[str, Recipe] = {
    "quadratic, condition 10": _quadratic(10),
    "quadratic, condition 100": _quadratic(100),
    "quadratic, condition 1000": _quadratic(1000),
    "logistic regression": _cleaning(
        lambda: nn.Linear(64, 10, bias=False),
        data.digits,
        1e-2,
        dtype=torch.float64,
        travel=2_000,
        pretraining=None,
        at_optimum=True,
    ),
    "MLP 64-256-10": _cleaning(lambda: mlp(64, 256, 10), data.digits, 0.1),
    "MLP 784-256-10": _cleaning(lambda: mlp(784, 256, 10), partial(data.clusters, 784), 0.02, pretraining=8),
    "transformer": _cleaning(lambda: Transformer(64, 32, 4), data.sequences, 0.3, count=128, pretraining=15),
    "GIN": _cleaning(lambda: GIN(8, 64, 4), data.graphs, 0.3, count=128, pretraining=15),
    "MLP with dropout": _cleaning(lambda: mlp(64, 256, 10, dropout=True), data.digits, 0.1, reference=False),
    "softmax regression 64-10": _cleaning(lambda: nn.Linear(64, 10), data.digits, 2e-3, travel=30, pretraining=None),
    "softmax regression 784-10": _cleaning(
        lambda: nn.Linear(784, 10), partial(data.clusters, 784), 2e-3, travel=30, pretraining=None
    ),
    "MLP of 1M": _cleaning(
        lambda: mlp(784, 1024, 200, 10),
        partial(data.clusters, 784, 128),
        0.1,
        count=128,
        travel=2,
        pretraining=5,
        reference=False,
    ),
}


def make(name: str, file: str | os.PathLike[str] | None = None) -> Case:
    """Return a case in float64 at its point, with its references; if `file` is not None, write it there."""
    recipe = RECIPES[name]
    case = recipe.case(name, recipe.data())
    torch.manual_seed(1)
    with torch.no_grad():
        for variable in case.u:
            variable.copy_(torch.randn_like(variable))
    if recipe.travel is None:
        case.inner.load_state_dict({"value": torch.linalg.solve(case.data["A"], case.data["B"] @ case.u[0].detach())})
    else:
        _travel(case, recipe)
    # The references are computed at the rounded point that the libraries use.
    case = case.to(recipe.dtype).to(torch.float64)
    torch.manual_seed(2)
    case.step_size = 1 / (1.05 * exact.largest_eigenvalue(case))
    if recipe.reference:
        case.exact = exact.hypergradient(case)[0]
        case.identity = exact.hypergradient(case, identity=True)[0]
    if file is not None:
        kept = {"name": name, "data": case.data, "inner": case.inner.state_dict(), "outer": case.outer.state_dict()}
        torch.save(kept | {key: getattr(case, key) for key in ("step_size", "exact", "identity")}, file)
    return case


def _travel(case: Case, recipe: Recipe) -> None:
    """Find the anchor of the proximal term, and move x to its point."""
    assert recipe.travel is not None
    case.data["anchor"] = tuple(torch.zeros_like(p) for p in case.x)
    if recipe.pretraining is not None:
        loss = case.inner_loss
        case.inner_loss = partial(cleaning_loss, ridge=1e-3)
        exact.minimise(case, recipe.pretraining)
        case.inner_loss = loss
        case.data["anchor"] = tuple(p.detach().clone() for p in case.x)
    exact.minimise(case, recipe.travel)


def load(file: str | os.PathLike[str]) -> Case:
    """Return the case written by `make`, in float64."""
    kept = torch.load(file, weights_only=True)
    case = RECIPES[kept["name"]].case(kept["name"], kept["data"])
    case.inner.load_state_dict(kept["inner"])
    case.outer.load_state_dict(kept["outer"])
    case.step_size, case.exact, case.identity = kept["step_size"], kept["exact"], kept["identity"]
    return case
