"""The four problems in optimistix. Each function returns the value and its derivative by u."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optimistix as optx

from .with_jaxopt import differentiated

__all__ = ["differentiated", "equilibrium", "game", "logistic", "ridge"]

NEWTON = optx.Newton(rtol=1e-12, atol=1e-12)


def ridge(arrays: dict[str, Any]) -> Any:
    a, y = arrays["A"], arrays["y"]

    def condition(x, u):
        return 2 * a.T @ (a @ x - y) + 2 * jnp.exp(u) * x

    return lambda x, u: optx.root_find(condition, NEWTON, x, u).value


def game(arrays: dict[str, Any]) -> Any:
    a, b, y = arrays["A"], arrays["B"], arrays["y"]

    def condition(x, u):
        return a @ x + b @ u + y

    return lambda x, u: optx.root_find(condition, NEWTON, x, u).value


def equilibrium(arrays: dict[str, Any]) -> Any:
    a, b, y = arrays["A"], arrays["B"], arrays["y"]

    def image(x, u):
        return jnp.tanh(a @ x + b @ u + y)

    iteration = optx.FixedPointIteration(rtol=1e-13, atol=1e-13)
    return lambda x, u: optx.fixed_point(image, iteration, x, u).value


def logistic(arrays: dict[str, Any]) -> Any:
    a, y = arrays["A"], arrays["y"]

    def loss(x, u):
        return jnp.logaddexp(0, -y * (a @ x)).sum() + (jnp.exp(u) * x**2).sum()

    solver = optx.LBFGS(rtol=1e-12, atol=1e-9)
    return lambda x, u: optx.minimise(loss, solver, x, u, max_steps=2_000).value
