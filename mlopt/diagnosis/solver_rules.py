"""Rules for linear solvers that are safe for a Hessian, given the ends of its spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import linear
from ..linear import AssumedInverse, LinearSolver
from .finding import Finding
from .spectrum import Spectrum

__all__ = ["SOLVERS", "iterations_for", "neumann_iterations_for", "rate_solver"]

#: The relative error of a linear solve for which counts are stated.
_ACCURACY = 0.01


def iterations_for(condition: float, accuracy: float = _ACCURACY) -> int:
    """Return the number of conjugate-gradient iterations for an error of `accuracy`: sqrt(kappa) / 2 ln(2 / accuracy)."""
    return math.ceil(math.sqrt(condition) / 2 * math.log(2 / accuracy))


def neumann_iterations_for(condition: float, accuracy: float = _ACCURACY) -> int:
    """Return a number K of Neumann iterations that suffices at step size 1 / lambda_max: (1 - 1 / kappa)^(K + 1) <= accuracy."""
    return 1 if condition <= 1.0 else max(1, math.ceil(math.log(accuracy) / math.log1p(-1 / condition)) - 1)


def rate_solver(solver: LinearSolver, spectrum: Spectrum | None) -> Finding | None:
    """Return a finding on the safety of a solver for a spectrum, if it is known; None for a solver without a rule."""
    if isinstance(solver, AssumedInverse) and solver.vanishes:
        return Finding(
            "warning", "cannot fail, but leaves the response of the level out", "another scale, if it matters"
        )
    rule = _RULES.get(type(solver).__name__)
    return None if rule is None or spectrum is None else rule(solver, spectrum.damped(float(solver.damping)))


def _indefinite(spectrum: Spectrum) -> Finding:
    amount = 1.1 * abs(spectrum.low)
    return Finding(
        "error",
        f"unsafe: negative curvature {spectrum.low:.2g}, and it needs a positive definite Hessian",
        f"MINRES, or damping={amount:.2g} or more",
    )


def _identity(solver: Any, spectrum: Spectrum) -> Finding:
    spread = f"curvature from {spectrum.low:.2g} to {spectrum.high:.2g} is assumed to be {1 / solver.scale:.3g}"
    if spectrum.condition <= 3.0:
        return Finding("ok", f"safe: {spread}, so the direction is nearly right")
    return Finding("warning", f"cannot fail, but biased: {spread}", "a solver, if the direction matters")


def _neumann(solver: Any, spectrum: Spectrum) -> Finding:
    if spectrum.negative:
        return _indefinite(spectrum)
    bound = 2 / spectrum.high if spectrum.high > 0 else math.inf
    if solver.step_size is not None and solver.step_size >= bound:
        return Finding(
            "error",
            f"unsafe: step_size={solver.step_size:.3g} is above 2 / lambda_max = {bound:.3g}: the series diverges",
            f"step_size={bound / 2:.2g}, or None",
        )
    alpha = 1 / (1.2 * spectrum.high) if solver.step_size is None else solver.step_size
    if spectrum.singular:
        return Finding("warning", "never converges along directions without curvature", "damping")
    rate = 1 / (alpha * spectrum.low)
    needed = neumann_iterations_for(max(rate, 1.0))
    cost = f"1% needs about {needed} iterations at a step size below {bound:.2g}"
    if solver.iterations < needed:
        return Finding("warning", f"converges, but {cost}", f"iterations={needed}, conjugate gradients, or warm starts")
    return Finding("ok", f"safe: {cost}")


def _conjugate_gradient(solver: Any, spectrum: Spectrum) -> Finding:
    if spectrum.negative:
        return _indefinite(spectrum)
    if spectrum.singular:
        return Finding(
            "warning",
            "safe only if the cotangent has no part along directions without curvature",
            "damping, or freeze parameters that the loss does not use",
        )
    needed = min(iterations_for(spectrum.condition), spectrum.size)
    cost = f"1% needs about {needed} iterations (condition number {spectrum.condition:.2g} at least)"
    if solver.iterations < needed:
        return Finding("warning", f"converges, but {cost}", f"iterations={needed}, a preconditioner, or warm starts")
    return Finding("ok", f"safe: {cost}")


def _minres(solver: Any, spectrum: Spectrum) -> Finding:
    kind = "indefinite" if spectrum.negative else "positive definite"
    return Finding("ok", f"safe: needs only a symmetric Hessian, and this one is {kind}")


def _nystrom(solver: Any, spectrum: Spectrum) -> Finding:
    if spectrum.negative:
        return _indefinite(spectrum)
    return Finding("ok", "safe: assumes that the curvature outside its sketch equals its damping")


def _dense(solver: Any, spectrum: Spectrum) -> Finding:
    if spectrum.size > solver.limit:
        return Finding("error", f"unsafe: {spectrum.size:,} unknowns, and limit={solver.limit:,}", "ConjugateGradient")
    if spectrum.negative:
        return Finding(
            "warning", "solves, but the curvature is negative: the level is not near a minimum", "more steps"
        )
    return Finding("ok", f"safe: {spectrum.size:,} products a solve")


_RULES: dict[str, Callable[[Any, Spectrum], Finding]] = {
    "Identity": _identity,
    "Neumann": _neumann,
    "ConjugateGradient": _conjugate_gradient,
    "MINRES": _minres,
    "Nystrom": _nystrom,
    "Dense": _dense,
}

#: All solvers, with their default settings.
SOLVERS: dict[str, LinearSolver] = {name: getattr(linear, name)() for name in _RULES if hasattr(linear, name)}
