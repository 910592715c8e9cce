"""The named estimators: each a linear solver paired with a kind of products."""

# These are functions that read as the classes they stand for.
# ruff: noqa: N802

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypedDict, Unpack

from .. import linear
from .implicit import Implicit

__all__ = ["MINRES", "SAMA", "ConjugateGradient", "Dense", "FiniteDifference", "Identity", "Neumann", "Nystrom"]


class Options(TypedDict, total=False):
    """What every estimator that solves with the Hessian takes besides its solver's arguments; see `Implicit`."""

    products: str
    compile: bool
    curvature_data: Iterable[Any] | None


def Identity(*, products: str = "autograd", streamed: bool = False) -> Implicit:
    """Take the inverse Hessian to be the identity: u_bar = -(d2f / du dx) v.

    Args:
        products: "autograd", "forward" or "finite_difference".
        streamed: for a level whose loss is a `Mixture`: inside `solve`, form the gradient of its weights from the
            gradients that its training step computes, with the cotangent of the outer step before. It costs no pass.

    Source: Luketina et al. 2016 (arXiv 1511.06727); Liu et al. 2019 (arXiv 1806.09055).

    Example:
        >>> mlopt.Level("classifier", network, loss, estimator=mlopt.Identity(products="forward"))
    """
    return Implicit(solver=linear.Identity(), products=products, streamed=streamed)


def FiniteDifference() -> Implicit:
    """Take the inverse Hessian to be the identity and the mixed product by central differences: two gradients of u.

    u_bar = -(f_u(x + e v, u) - f_u(x - e v, u)) / 2e, with e from the norms of x and v and the dtype. First derivatives
    only: it works with fused attention and activation checkpointing.

    Source: Liu et al. 2019 (arXiv 1806.09055), equation 8.

    Example:
        >>> mlopt.Level("classifier", network, loss, estimator=mlopt.FiniteDifference())
    """
    return Implicit(solver=linear.Identity(), products="finite_difference")


def Neumann(
    *,
    terms: int = 10,
    step_size: float | None = None,
    rtol: float = 0.0,
    damping: float = 0.0,
    warm_start: bool = False,
    **options: Unpack[Options],
) -> Implicit:
    """Take the inverse Hessian as a truncated Neumann series: q = alpha sum_{j=0}^{K} (I - alpha H)^j v.

    Args:
        terms: K, the number of products with H.
        step_size: alpha, below 2 / lambda_max(H); when None, ten power iterations find a safe one, at ten products.
        rtol: stop when ||v - H q|| <= rtol ||v||.
        damping: added to the diagonal of H.
        warm_start: start from the q of the outer step before, inside `solve`.
        options: `products`, `compile` and `curvature_data`, as `Implicit` has them.

    Source: Lorraine et al. 2020 (arXiv 1911.02590). One term with a warm start is the q update of SOBA (Dagreou et al.
    2022, arXiv 2201.13409).

    Example:
        >>> mlopt.Level("classifier", network, loss, estimator=mlopt.Neumann(terms=20, step_size=0.1))
    """
    solver = linear.Neumann(terms=terms, step_size=step_size, rtol=rtol, damping=damping)
    return Implicit(solver=solver, warm_start=warm_start, **options)


def ConjugateGradient(
    *,
    iterations: int = 10,
    rtol: float = 1e-10,
    damping: float = 0.0,
    preconditioner: linear.Preconditioner | None = None,
    negative_curvature: str = "stop",
    warm_start: bool = False,
    **options: Unpack[Options],
) -> Implicit:
    """Solve H q = v by conjugate gradients, for a positive definite Hessian H.

    Args:
        iterations: the most iterations, one product with H each.
        rtol: stop when ||v - H q|| <= rtol ||v||.
        damping: added to the diagonal of H.
        preconditioner: such as `mlopt.linear.NystromPreconditioner(rank=5)`.
        negative_curvature: what to do where H is met not to be positive definite: "stop", "raise" or "continue".
        warm_start: start from the q of the outer step before, inside `solve`.
        options: `products`, `compile` and `curvature_data`, as `Implicit` has them.

    Source: Pedregosa 2016 (arXiv 1602.02355); Rajeswaran et al. 2019 (arXiv 1909.04630).

    Example:
        >>> mlopt.Level("classifier", network, loss, estimator=mlopt.ConjugateGradient(iterations=10))
    """
    solver = linear.ConjugateGradient(
        iterations=iterations,
        rtol=rtol,
        damping=damping,
        preconditioner=preconditioner,
        negative_curvature=negative_curvature,
    )
    return Implicit(solver=solver, warm_start=warm_start, **options)


def MINRES(
    *,
    iterations: int = 10,
    rtol: float = 1e-10,
    damping: float = 0.0,
    warm_start: bool = False,
    **options: Unpack[Options],
) -> Implicit:
    """Solve H q = v by minimal residuals, for a Hessian H that may be indefinite.

    Args:
        iterations: the most iterations, one product with H each.
        rtol: stop when ||v - H q|| <= rtol ||v||.
        damping: added to the diagonal of H.
        warm_start: start from the q of the outer step before, inside `solve`.
        options: `products`, `compile` and `curvature_data`, as `Implicit` has them.

    Source: Paige & Saunders 1975, SIAM Journal on Numerical Analysis 12(4).

    Example:
        >>> mlopt.Level("classifier", network, loss, estimator=mlopt.MINRES(iterations=20))
    """
    solver = linear.MINRES(iterations=iterations, rtol=rtol, damping=damping)
    return Implicit(solver=solver, warm_start=warm_start, **options)


def Nystrom(
    *, rank: int = 10, damping: float = 1e-2, rtol: float = 1e-3, seed: int = 0, **options: Unpack[Options]
) -> Implicit:
    """Solve (H + damping I) q = v with a low-rank approximation of H, from products with random probes.

    Args:
        rank: the number of probes, one product with H each.
        damping: added to the diagonal of H; above zero.
        rtol: the solution counts as converged when ||v - (H + damping I) q|| <= rtol ||v||.
        seed: of the probes.
        options: `products`, `compile` and `curvature_data`, as `Implicit` has them.

    Source: Hataya & Yamada 2023 (arXiv 2302.09726).

    Example:
        >>> mlopt.Level("classifier", network, loss, estimator=mlopt.Nystrom(rank=20, damping=0.1))
    """
    return Implicit(solver=linear.Nystrom(rank=rank, damping=damping, rtol=rtol, seed=seed), **options)


def Dense(*, damping: float = 0.0, limit: int = 5_000, **options: Unpack[Options]) -> Implicit:
    """Write H out and factorise it: exact, for levels of few variables; the oracle that others are held against.

    Args:
        damping: added to the diagonal of H.
        limit: the most variables of the level.
        options: `products`, `compile` and `curvature_data`, as `Implicit` has them.

    Example:
        >>> mlopt.Level("classifier", network, loss, estimator=mlopt.Dense())
    """
    return Implicit(solver=linear.Dense(damping=damping, limit=limit), **options)


def SAMA(*, products: str = "finite_difference") -> Implicit:
    """Take the inverse Hessian to be what the level's optimiser makes of a gradient: u_bar = -(d2f / du dx) D v.

    D is the diagonal of d step / d gradient at the optimiser's latest step, Adam's correction of its moments' bias included. For
    SGD it is the learning rate. Outside `solve` it is that of a fresh optimiser's first step, which for Adam is next to nothing:
    that step is lr sign(g), whatever the size of g.

    Args:
        products: "autograd", "forward" or "finite_difference".

    Source: Choe et al. 2023 (arXiv 2310.05674), section 3.2.

    Example:
        >>> mlopt.Level("classifier", network, loss, optimizer=partial(Adam, lr=1e-3), estimator=mlopt.SAMA())
    """
    return Implicit(solver=linear.Identity(), products=products, adapted=True)
