"""The four problems in mlopt. Each function returns the value and its derivative by u."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from torch.optim import LBFGS, SGD

import mlopt

WOLFE = "strong_wolfe"
START = torch.zeros(20, dtype=torch.float64)
#: Levels are made once, as a model's layers are.
LEVELS: dict[str, mlopt.Level] = {}


def tensors(arrays: dict[str, Any]) -> Any:
    return (torch.from_numpy(arrays[key]) for key in ("A", "B", "y"))


def ridge(arrays: dict[str, Any]) -> Any:
    a, _, y = tensors(arrays)

    def loss(x, batch, *, u):
        return (a @ x() - y).square().sum() + (u().exp() * x().square()).sum()

    def solver(x, batch, *, u):
        x.value.data.copy_(torch.linalg.solve(a.T @ a + u().detach().exp().diag(), a.T @ y))

    level = mlopt.Level("x", mlopt.variables(START), loss, solver=solver, estimator=mlopt.Dense())
    return differentiated(LEVELS.setdefault("ridge", level), arrays)


def game(arrays: dict[str, Any]) -> Any:
    a, b, y = tensors(arrays)

    def residual(x, batch, *, u):
        return a @ x() + b @ u() + y

    def solver(x, batch, *, u):
        x.value.data.copy_(torch.linalg.solve(a, -(b @ u().detach() + y)))

    level = mlopt.Level("x", mlopt.variables(START), residual=residual, solver=solver, estimator=mlopt.Dense())
    return differentiated(LEVELS.setdefault("game", level), arrays)


def equilibrium(arrays: dict[str, Any]) -> Any:
    a, b, y = tensors(arrays)

    def residual(x, batch, *, u):
        return x() - torch.tanh(a @ x() + b @ u() + y)

    picard = partial(SGD, lr=1.0)
    rule = mlopt.GMRES(iterations=20, rtol=1e-10)
    level = mlopt.Level("x", mlopt.variables(START), residual=residual, optimizer=picard, estimator=rule)
    return differentiated(LEVELS.setdefault("equilibrium", level), arrays, steps=60)


def logistic(arrays: dict[str, Any]) -> Any:
    a, _, y = tensors(arrays)

    def loss(x, batch, *, u):
        return -logsigmoid(y * (a @ x())).sum() + (u().exp() * x().square()).sum()

    def solver(x, batch, *, u):
        optimizer = LBFGS(x.parameters(), max_iter=300, tolerance_grad=1e-9, tolerance_change=0, line_search_fn=WOLFE)

        def closure():
            optimizer.zero_grad()
            value = loss(x, batch, u=u)
            value.backward(inputs=[x.value])
            return value

        optimizer.step(closure)

    level = mlopt.Level("x", mlopt.variables(START), loss, solver=solver, estimator=mlopt.Dense())
    return differentiated(LEVELS.setdefault("logistic", level), arrays)


def differentiated(level: mlopt.Level, arrays: dict[str, Any], **options: Any) -> Any:
    u = torch.tensor(arrays["u"], requires_grad=True)
    x = mlopt.solution(level, values={"u": u}, **options).variables["value"]
    value = torch.from_numpy(arrays["c"]) @ x
    value.backward()
    return value.item(), u.grad.numpy()
