"""The four problems in jaxopt. Each function returns the value and its derivative by u."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt
from jaxopt import linear_solve
from jaxopt.implicit_diff import custom_root

jax.config.update("jax_enable_x64", True)
START = jnp.zeros(20)


def ridge(arrays: dict[str, Any]) -> Any:
    a, y = arrays["A"], arrays["y"]

    def condition(x, u):
        return 2 * a.T @ (a @ x - y) + 2 * jnp.exp(u) * x

    @custom_root(condition, solve=partial(linear_solve.solve_cg, tol=1e-12))
    def solve(x, u):
        return jnp.linalg.solve(a.T @ a + jnp.diag(jnp.exp(u)), a.T @ y)

    return solve


def game(arrays: dict[str, Any]) -> Any:
    a, b, y = arrays["A"], arrays["B"], arrays["y"]

    def condition(x, u):
        return a @ x + b @ u + y

    @custom_root(condition, solve=linear_solve.solve_gmres)
    def solve(x, u):
        return jnp.linalg.solve(a, -(b @ u + y))

    return solve


def equilibrium(arrays: dict[str, Any]) -> Any:
    a, b, y = arrays["A"], arrays["B"], arrays["y"]

    def image(x, u):
        return jnp.tanh(a @ x + b @ u + y)

    solver = jaxopt.FixedPointIteration(image, maxiter=60, tol=1e-14, implicit_diff_solve=linear_solve.solve_gmres)
    return lambda x, u: solver.run(x, u).params


def logistic(arrays: dict[str, Any]) -> Any:
    a, y = arrays["A"], arrays["y"]

    def loss(x, u):
        return jnp.logaddexp(0, -y * (a @ x)).sum() + (jnp.exp(u) * x**2).sum()

    exact = partial(linear_solve.solve_cg, tol=1e-12)
    solver = jaxopt.LBFGS(loss, maxiter=300, tol=1e-9, implicit_diff_solve=exact)
    return lambda x, u: solver.run(x, u).params


@cache
def compiled(problem: Any) -> Any:
    """Return the compiled value and derivative of a problem; jax compiles once."""
    from .problems import data

    arrays = data(problem.__name__)
    solve = problem(arrays)
    return jax.jit(jax.value_and_grad(lambda u: jnp.asarray(arrays["c"]) @ solve(START, u)))


def differentiated(problem: Any, arrays: dict[str, Any]) -> Any:
    value, gradient = compiled(problem)(arrays["u"])
    return float(value), jax.device_get(gradient)
