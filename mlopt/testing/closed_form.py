"""Problems whose hypergradients are known from dense linear algebra."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import SGD

from ..problem import Estimator, Level, Problem, Variables
from ..tensors import unflatten
from .shapes import SHAPES, Shape

__all__ = ["ClosedForm", "logistic_regression", "quadratic"]


@attrs.frozen(eq=False)
class ClosedForm:
    """A problem at the solution of its inner levels, and the hypergradient there.

    Attributes:
        problem: the problem.
        gradient: the hypergradient, by parameter name.

    Example:
        >>> from mlopt.testing import quadratic
        >>> case = quadratic("two", mlopt.Dense())
        >>> case.error(mlopt.hypergradient(case.problem).gradient) < 1e-8
        True
    """

    problem: Problem
    gradient: dict[str, Tensor]

    def error(self, gradient: Mapping[str, Tensor]) -> float:
        """Return ||gradient - exact|| / ||exact||, over all parameters."""
        exact = torch.cat([g.reshape(-1) for g in self.gradient.values()])
        flat = torch.cat([gradient[name].reshape(-1) for name in self.gradient])
        return float((flat - exact).norm() / exact.norm())


def quadratic(
    shape: str | Shape,
    estimator: Estimator | Mapping[str, Estimator],
    *,
    seed: int = 0,
    size: int = 2,
    condition: float = 3.0,
    level: str | None = None,
    dtype: torch.dtype = torch.float64,
) -> ClosedForm:
    """Return a problem of quadratic losses of a given shape, and its exact hypergradient.

    The loss of level i is f_i(s) = s^T Q_i s / 2 + b_i^T s, s the variables of the level and of those it refers to. So a
    level's solution is an affine map of the variables outside it, its total objective is the quadratic composed with that
    map, and the hypergradient is the gradient of the composition. All are computed as matrices.

    Args:
        shape: a name in `SHAPES`, or a shape.
        estimator: the estimator of every level but the outermost, or one for each by name.
        seed: seed of the matrices and of the point.
        size: a level has a parameter of shape (2, size) and one of shape (), so 2 size + 1 variables.
        condition: the ratio of the largest to the smallest eigenvalue of each Q_i; the outermost's is indefinite.
        level: the level whose hypergradient to return; the outermost if None. The levels inside it are at their solutions;
            it and the others are at a random point.
        dtype: dtype of the parameters.

    Returns:
        The problem, and the hypergradient of `level`.

    Example:
        >>> from mlopt.testing import quadratic
        >>> case = quadratic("nested", mlopt.Dense())
        >>> case.error(mlopt.hypergradient(case.problem).gradient) < 1e-8
        True
    """
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    generator = torch.Generator().manual_seed(seed)
    names = list(shape)
    n = 2 * size + 1
    rows = {name: torch.arange(i * n, (i + 1) * n) for i, name in enumerate(names)}
    forms = {name: _form(name, shape, rows, condition, generator) for name in names}
    target = names[0] if level is None else level
    state = torch.cat([_normal(generator, n * len(names)), torch.ones(1, dtype=torch.float64)])
    response = _response(target, shape, rows, forms)
    state = response @ state
    exact = (response.T @ forms[target] @ response @ state)[rows[target]]
    modules = {name: _Blocks(state[rows[name]], size, dtype) for name in names}
    levels = []
    for name in names:
        used = torch.cat([rows[name], *(rows[ref] for ref in shape[name][1]), torch.tensor([n * len(names)])])
        loss = _QuadraticLoss(forms[name][used][:, used].to(dtype), shape[name][1])
        rule = None if name == names[0] else estimator if isinstance(estimator, Estimator) else estimator[name]
        levels.append(Level(name, modules[name], loss, optimizer=partial(SGD, lr=0.01), estimator=rule))
    named = dict(modules[target].named_parameters())
    gradient = dict(zip(named, unflatten(exact, tuple(named.values())), strict=True))
    return ClosedForm(Problem(*levels), gradient)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _form(name: str, shape: Shape, rows: Mapping[str, Tensor], condition: float, generator: torch.Generator) -> Tensor:
    """Return the symmetric matrix of a level's loss over (all variables, 1), zero for variables that it does not use."""
    used = torch.cat([rows[name], *(rows[ref] for ref in shape[name][1])])
    n = len(used)
    basis = torch.linalg.qr(_normal(generator, n, n)).Q
    spectrum = condition ** torch.linspace(0, 1, n, dtype=torch.float64)
    if shape[name][0] is None:
        # The outermost level needs no minimum: no system is solved with its Hessian.
        spectrum[::2] *= -1
    size = sum(len(r) for r in rows.values()) + 1
    form = torch.zeros(size, size, dtype=torch.float64)
    form[used[:, None], used] = (basis * spectrum) @ basis.T
    form[used, -1] = form[-1, used] = _normal(generator, n)
    return form


def _response(host: str, shape: Shape, rows: Mapping[str, Tensor], forms: Mapping[str, Tensor]) -> Tensor:
    """Return the matrix that takes (all variables, 1) to the same with the levels inside `host` at their solutions."""
    guests = [name for name in shape if shape[name][0] == host]
    identity = torch.eye(len(forms[host]), dtype=torch.float64)
    if not guests:
        return identity
    deeper = {guest: _response(guest, shape, rows, forms) for guest in guests}
    # One system for all levels inside: the guests' total gradients are zero, and the rest respond to their hosts. (A guest may
    # refer to a level inside another guest, so the two cannot be solved one after the other.)
    equations, unknowns = [], []
    for guest in guests:
        equations.append((deeper[guest].T @ forms[guest] @ deeper[guest])[rows[guest]])
        unknowns.append(rows[guest])
        for name in _inside(guest, shape):
            equations.append((identity - deeper[guest])[rows[name]])
            unknowns.append(rows[name])
    system, unknown = torch.cat(equations), torch.cat(unknowns)
    known = torch.ones(len(identity), dtype=torch.bool)
    known[unknown] = False
    solved = identity.clone()
    solved[unknown] = 0.0
    solved[unknown[:, None], known.nonzero()[:, 0]] = -torch.linalg.solve(system[:, unknown], system[:, known])
    return solved


def _inside(host: str, shape: Shape) -> list[str]:
    guests = [name for name in shape if shape[name][0] == host]
    return guests + [name for guest in guests for name in _inside(guest, shape)]


class _Blocks(nn.Module):
    """Variables in two parameters of different shapes; calling it returns them in one vector."""

    def __init__(self, values: Tensor, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(values[:-1].reshape(2, size).to(dtype))
        self.shift = nn.Parameter(values[-1].clone().to(dtype))

    def forward(self) -> Tensor:
        return torch.cat([self.weight.reshape(-1), self.shift.reshape(1)])


class _QuadraticLoss:
    """The loss s^T Q s / 2, with the levels it refers to as keyword-only parameters of its signature."""

    def __init__(self, form: Tensor, refs: tuple[str, ...]) -> None:
        kinds = inspect.Parameter
        own = [kinds(name, kinds.POSITIONAL_ONLY) for name in ("_module", "_batch")]
        self.__signature__ = inspect.Signature([*own, *(kinds(ref, kinds.KEYWORD_ONLY) for ref in refs)])
        self._form, self._refs = form, refs

    def __call__(self, module: nn.Module, batch: Any, /, **others: nn.Module) -> Tensor:
        own = module()
        s = torch.cat([own, *(others[ref]() for ref in self._refs), own.new_ones(1)])
        return s @ self._form.to(s.device) @ s / 2


def logistic_regression(
    estimator: Estimator, *, seed: int = 0, samples: int = 12, features: int = 3, ridge: float = 0.1
) -> ClosedForm:
    """Return a problem of sample weights for a regularised logistic regression, and its exact hypergradient.

    With the margins m_i = y_i <x_i, beta>, the inner level minimises mean_i sigmoid(w_i) log(1 + exp(-m_i)) +
    ridge ||beta||^2 / 2 over beta, by Newton's method to a gradient of 1e-12; the outer loss is the plain mean of the
    same loss on other samples. The hypergradient is -B^T H^-1 v, with H and B from their formulas.

    Args:
        estimator: the estimator of the inner level.
        seed: seed of the samples and of the weights.
        samples: number of weighted samples, and of held-out ones.
        features: components of beta.
        ridge: the regularisation, above zero.

    Returns:
        The problem of levels `weights` and `regression`, in float64, and the hypergradient.

    Example:
        >>> from mlopt.testing import logistic_regression
        >>> case = logistic_regression(mlopt.ConjugateGradient(iterations=3))
        >>> case.error(mlopt.hypergradient(case.problem).gradient) < 1e-8
        True
    """
    generator = torch.Generator().manual_seed(seed)
    # Rows y_i x_i: the losses use a label only in this product.
    training, validation = _normal(generator, samples, features), _normal(generator, samples, features)
    logits = _normal(generator, samples)
    weights, beta = torch.sigmoid(logits), torch.zeros(features, dtype=torch.float64)
    for _ in itertools.repeat(None, 50):
        miss = torch.sigmoid(-(training @ beta))
        slope = -(training.T @ (weights * miss)) / samples + ridge * beta
        curvature = training.T @ (training * (weights * miss * (1 - miss))[:, None]) / samples
        curvature = curvature + ridge * torch.eye(features, dtype=torch.float64)
        if slope.norm() < 1e-12:
            break
        beta = beta - torch.linalg.solve(curvature, slope)
    cotangent = -(validation.T @ torch.sigmoid(-(validation @ beta))) / samples
    mixed = -(training * (miss * weights * (1 - weights))[:, None]) / samples
    exact = -(mixed @ torch.linalg.solve(curvature, cotangent))

    def outer(module: nn.Module, batch: Tensor, *, regression: nn.Module) -> Tensor:
        return nn.functional.softplus(-(batch @ regression())).mean()

    def inner(module: nn.Module, batch: Tensor, *, weights: nn.Module) -> Tensor:
        losses = nn.functional.softplus(-(batch @ module()))
        value: Tensor = (torch.sigmoid(weights()) * losses).mean() + ridge * module().square().sum() / 2
        return value

    problem = Problem(
        Level("weights", Variables(logits), outer, data=[validation]),
        Level("regression", Variables(beta), inner, data=[training], estimator=estimator),
    )
    return ClosedForm(problem, {"value": exact})
