"""The reference: hypergradients by a dense solve, or by converged conjugate gradients, in float64 and plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cases import Case

__all__ = ["hypergradient", "largest_eigenvalue", "minimise", "unrolled"]

#: Most variables for which the Hessian is formed as a matrix.
DENSE_LIMIT = 800


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _products(case: Case) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the flat gradient f_x with its graph, and the product with f_xx."""
    slope = _flat(torch.autograd.grad(case.f(), case.x, create_graph=True))

    def product(vector: Tensor) -> Tensor:
        return _flat(torch.autograd.grad(slope, case.x, grad_outputs=vector, retain_graph=True))

    return slope, product


def hypergradient(
    case: Case, *, identity: bool = False, start: Tensor | None = None, rtol: float = 1e-11
) -> tuple[Tensor, Tensor]:
    """Return F_u - f_ux q and q, with f_xx q = F_x, flat.

    Args:
        case: in float64.
        identity: take q = F_x.
        start: the initial q of conjugate gradients, for example that of a point nearby.
        rtol: relative residual, if the Hessian is too large for a matrix.

    Raises:
        ArithmeticError: f_xx is not positive definite, or conjugate gradients do not converge.
    """
    value = case.F()
    cotangent = _flat(torch.autograd.grad(value, case.x, retain_graph=True))
    direct = torch.autograd.grad(value, case.u, allow_unused=True, materialize_grads=True)
    slope, product = _products(case)
    if identity:
        solved = cotangent
    elif len(cotangent) <= DENSE_LIMIT:
        solved = torch.linalg.solve(
            torch.stack([product(row) for row in torch.eye(len(cotangent)).to(cotangent)]), cotangent
        )
    else:
        solved = _conjugate_gradients(product, cotangent, start, rtol)
    mixed = torch.autograd.grad(slope, case.u, grad_outputs=solved)
    return _flat(direct) - _flat(mixed), solved


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], rhs: Tensor, start: Tensor | None, rtol: float, limit: int = 5_000
) -> Tensor:
    solution = torch.zeros_like(rhs) if start is None else start
    residual = rhs - product(solution)
    direction, square = residual, residual @ residual
    for _ in range(limit):
        if square.sqrt() <= rtol * rhs.norm():
            return solution
        image = product(direction)
        curvature = direction @ image
        if curvature <= 0:
            raise ArithmeticError(
                f"f_xx is not positive definite here (curvature {float(curvature):.2g}): raise the ridge"
            )
        alpha = square / curvature
        solution, residual = solution + alpha * direction, residual - alpha * image
        before, square = square, residual @ residual
        direction = residual + (square / before) * direction
    raise ArithmeticError(f"conjugate gradients did not converge in {limit} iterations")


def largest_eigenvalue(case: Case, iterations: int = 60) -> float:
    """Return the largest eigenvalue of f_xx by power iterations."""
    _, product = _products(case)
    vector = torch.randn(sum(p.numel() for p in case.x), dtype=torch.float64)
    for _ in range(iterations):
        vector = product(vector / vector.norm())
    return float(vector.norm())


def minimise(case: Case, iterations: int) -> None:
    """Take L-BFGS iterations on f over x."""
    optimizer = torch.optim.LBFGS(
        case.x, max_iter=iterations, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = case.f()
        loss.backward(inputs=case.x)
        return loss

    optimizer.step(closure)


def unrolled(case: Case, steps: int, step_size: float) -> Tensor:
    """Return the derivative of F by u through gradient steps on f from the case's point, flat."""
    u = [variable.detach().clone().requires_grad_() for variable in case.u]
    x = [variable.detach().clone().requires_grad_() for variable in case.x]
    for _ in range(steps):
        slopes = torch.autograd.grad(case.f_of(x, u), x, create_graph=True)
        x = [variable - step_size * slope for variable, slope in zip(x, slopes, strict=True)]
    return _flat(torch.autograd.grad(case.F_of(x, u), u))
