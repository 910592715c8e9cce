"""Four problems as arrays, with their exact values and derivatives by dense algebra in numpy.

Each has a solution x*(u), and the value v = <c, x*(u)>, to be differentiated by u.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["PROBLEMS", "data", "exact"]

#: What each problem is, by name.
PROBLEMS = {
    "ridge": "argmin_x ||A x - y||^2 + sum_k exp(u_k) x_k^2, as a layer",
    "game": "the Nash game of two quadratic players: A x + B u + y = 0, A not symmetric",
    "equilibrium": "x = tanh(A x + B u + y), a deep equilibrium layer",
    "logistic": "argmin_x sum_i log(1 + exp(-y_i <a_i, x>)) + sum_k exp(u_k) x_k^2, by L-BFGS",
}
_SIZE = 20


def data(name: str) -> dict[str, Any]:
    """Return the arrays of a problem: A, B, y, c, and u at which it is differentiated."""
    generator = np.random.default_rng(0)
    rows = 40 if name in ("ridge", "logistic") else _SIZE
    matrix = generator.standard_normal((rows, _SIZE))
    if name == "game":  # each player's own curvature outweighs what the other player does
        matrix = 0.1 * matrix + np.eye(_SIZE)
    if name == "equilibrium":
        matrix *= 0.5 / np.linalg.norm(matrix, 2)
    y = generator.standard_normal(rows)
    return {
        "A": matrix,
        "B": generator.standard_normal((_SIZE, _SIZE)) / _SIZE,
        "y": np.sign(y) if name == "logistic" else y,
        "c": generator.standard_normal(_SIZE),
        "u": generator.standard_normal(_SIZE) / 2,
    }


def exact(name: str) -> tuple[float, np.ndarray[Any, Any]]:
    """Return the value and its derivative by u, from dense systems at the solution by Newton's method."""
    arrays = data(name)
    matrix, u, c = arrays["A"], arrays["u"], arrays["c"]
    x = np.zeros(_SIZE)
    for _ in range(100):
        residual, by_x, by_u = _condition(name, x, u, arrays)
        x = x - np.linalg.solve(by_x, residual)
    residual, by_x, by_u = _condition(name, x, u, arrays)
    assert np.linalg.norm(residual) < 1e-10 * max(1.0, float(np.linalg.norm(matrix)))
    return float(c @ x), -by_u.T @ np.linalg.solve(by_x.T, c)


def _condition(name: str, x: Any, u: Any, arrays: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return the condition F(x, u) = 0 with dF/dx and dF/du."""
    matrix, y, mixed = arrays["A"], arrays["y"], arrays["B"]
    if name == "game":
        return matrix @ x + mixed @ u + y, matrix, mixed
    if name == "equilibrium":
        image = np.tanh(matrix @ x + mixed @ u + y)
        slope = np.diag(1 - image**2)
        return x - image, np.eye(len(x)) - slope @ matrix, -slope @ mixed
    decay = np.exp(u)
    by_u = np.diag(2 * decay * x)
    if name == "ridge":
        residual = 2 * matrix.T @ (matrix @ x - y) + 2 * decay * x
        return residual, 2 * matrix.T @ matrix + 2 * np.diag(decay), by_u
    wrong = 1 / (1 + np.exp(y * (matrix @ x)))
    residual = -matrix.T @ (y * wrong) + 2 * decay * x
    return residual, matrix.T @ ((wrong * (1 - wrong))[:, None] * matrix) + 2 * np.diag(decay), by_u
