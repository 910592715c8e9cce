"""The four problems in TorchOpt, by `custom_root`. Each function returns the value and its derivative by u."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid
from torch.optim import LBFGS
from torchopt import linear_solve
from torchopt.diff.implicit import custom_root

START = torch.zeros(20, dtype=torch.float64)
#: TorchOpt has no solver for matrices that are not symmetric, but one for normal equations.
SYMMETRIC = linear_solve.solve_cg(rtol=1e-12, maxiter=100)
NORMAL = linear_solve.solve_normal_cg(rtol=1e-12, maxiter=100)


def tensors(arrays: dict[str, Any]) -> Any:
    return (torch.from_numpy(arrays[key]) for key in ("A", "B", "y"))


def ridge(arrays: dict[str, Any]) -> Any:
    a, _, y = tensors(arrays)

    def condition(x, u):
        return 2 * a.T @ (a @ x - y) + 2 * u.exp() * x

    @custom_root(condition, argnums=1, solve=SYMMETRIC)
    def solve(x, u):
        return torch.linalg.solve(a.T @ a + u.detach().exp().diag(), a.T @ y)

    return differentiated(solve, arrays)


def game(arrays: dict[str, Any]) -> Any:
    a, b, y = tensors(arrays)

    def condition(x, u):
        return a @ x + b @ u + y

    @custom_root(condition, argnums=1, solve=NORMAL)
    def solve(x, u):
        return torch.linalg.solve(a, -(b @ u.detach() + y))

    return differentiated(solve, arrays)


def equilibrium(arrays: dict[str, Any]) -> Any:
    a, b, y = tensors(arrays)

    def condition(x, u):
        return x - torch.tanh(a @ x + b @ u + y)

    @custom_root(condition, argnums=1, solve=NORMAL)
    def solve(x, u):
        for _ in range(60):
            x = torch.tanh(a @ x + b @ u.detach() + y)
        return x

    return differentiated(solve, arrays)


def logistic(arrays: dict[str, Any]) -> Any:
    a, _, y = tensors(arrays)

    def loss(x, u):
        return -logsigmoid(y * (a @ x)).sum() + (u.exp() * x.square()).sum()

    condition = torch.func.grad(loss)

    @custom_root(condition, argnums=1, solve=SYMMETRIC)
    def solve(x, u):
        x = x.clone().requires_grad_()
        optimizer = LBFGS([x], max_iter=300, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = loss(x, u.detach())
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(closure)
        return x.detach()

    return differentiated(solve, arrays)


def differentiated(solve: Any, arrays: dict[str, Any]) -> Any:
    u = torch.tensor(arrays["u"], requires_grad=True)
    value = torch.from_numpy(arrays["c"]) @ solve(START, u)
    value.backward()
    return value.item(), u.grad.numpy()
