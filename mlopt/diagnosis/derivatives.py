"""The command `mlopt derivatives`: compare torch's derivatives of its functions, up to the third, with differences.

Each function f becomes a scalar <w, f> + <w, f^2> / 3 + sum f^3 / 10 of variables x + x^2 / 50, so that its derivatives by
outputs and by inputs both matter. The reference is central differences of eighth order in float64: of values for the first
derivative, and of first derivatives, which are themselves verified, for the second and third.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import platform
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import attrs
import torch
from torch import Tensor
from torch.func import grad, jvp

from ..errors import ArgumentError
from ..problem import Primitives
from ..tensors import Tensors, axpy, dot, flatten, scale
from .functions import Case, Function, cases

__all__ = ["ROUTES", "Measurement", "main", "measure"]

#: The derivatives measured: R is a pass in reverse mode, F in forward mode; the outermost pass comes first.
ROUTES = ("R", "F", "RR", "FR", "RRR", "FRR", "FFR")
#: Coefficients of the central difference of eighth order.
_STENCIL = (4 / 5, -1 / 5, 4 / 105, -1 / 280)
#: Displacement of the largest component.
_STEP = 5e-3
#: A derivative is wrong if its relative error is above this; the reference is good to 1e-9 in float64.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2}

Scalar: TypeAlias = Callable[[Tensors], Tensor]


@attrs.frozen
class Measurement:
    """The derivatives of one function.

    Attributes:
        name: the function.
        kind: its kind.
        errors: the relative error by route; None if torch raises.
        tolerance: the error up to which a derivative counts as right.
    """

    name: str
    kind: str
    errors: dict[str, float | None]
    tolerance: float

    def verdict(self, route: str) -> str:
        """Return "right", "raises", "not finite" or the error in percent."""
        error = self.errors[route]
        if error is None:
            return "raises"
        if not math.isfinite(error):
            return "not finite"
        return "right" if error < self.tolerance else f"{100 * error:{'.0f' if error > 0.1 else '.2g'}}%"

    @property
    def right(self) -> bool:
        """True if all derivatives are right."""
        return all(self.verdict(route) == "right" for route in self.errors)


def measure(
    case: Case, *, device: str = "cpu", dtype: torch.dtype = torch.float64, primitives: bool = False
) -> Measurement:
    """Measure the derivatives of one function.

    Args:
        case: the function.
        device: where it is evaluated.
        dtype: float64, or float32 for the kernels of that type; the reference is taken in float64.
        primitives: True to evaluate it as mlopt does for third derivatives, in primitive operations.

    Returns:
        The errors by route.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(), contextlib.ExitStack() as entered:
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        function, variables = case.make()
        variables = tuple(x.to(device) for x in variables)
        along = [_direction(variables) for _ in range(2)]
        scalar = _scalar(function, variables)
        reference = _reference(scalar, variables, along)
        if primitives:
            entered.enter_context(Primitives(3))
        start, one, other = (tuple(x.to(dtype) for x in vectors) for vectors in (variables, *along))
        errors = {route: _error(route, scalar, start, (one, other), reference[len(route) - 1]) for route in ROUTES}
    return Measurement(case.name, case.kind, errors, _TOLERANCE[dtype])


def _scalar(function: Function, variables: Tensors) -> Scalar:
    """Return a scalar function that is curved in the outputs and in the inputs of a function."""
    with torch.no_grad():
        weights = torch.randn(function(*variables).shape, dtype=torch.float64)

    def scalar(x: Tensors) -> Tensor:
        y = function(*(a + a.square() / 50 for a in x))
        w = weights.to(y)
        return (w * y + w * y.square() / 3 + y**3 / 10).sum()

    return scalar


def _direction(variables: Tensors) -> Tensors:
    drawn = tuple(torch.randn(x.shape, dtype=torch.float64).to(x.device) for x in variables)
    return scale(1 / max(float(d.abs().max()) for d in drawn), drawn)


def _reference(scalar: Scalar, x: Tensors, along: Sequence[Tensors]) -> tuple[Tensors, Tensors, Tensors]:
    """Return F' u as a scalar, F'' u and F''' u v, by differences."""
    one, other = along

    def values(at: Tensors) -> Tensors:
        return (scalar(at).detach(),)

    def slopes(at: Tensors) -> Tensors:
        return tuple(g.detach() for g in _reverse(scalar, at, 1, along))

    return (
        _difference(values, x, one),
        _difference(slopes, x, one),
        _difference(lambda at: _difference(slopes, at, one), x, other),
    )


def _difference(function: Callable[[Tensors], Tensors], x: Tensors, direction: Tensors) -> Tensors:
    """Return the derivative of a function along a direction, by the central difference of eighth order."""
    total: Tensors | None = None
    for k, coefficient in enumerate(_STENCIL, start=1):
        for sign in (1, -1):
            value = scale(sign * coefficient / _STEP, function(axpy(sign * k * _STEP, direction, x)))
            total = value if total is None else axpy(1.0, value, total)
    assert total is not None
    return total


def _error(route: str, scalar: Scalar, x: Tensors, along: Sequence[Tensors], reference: Tensors) -> float | None:
    """Return the relative error of a derivative; None if torch raises."""
    try:
        value = _derivative(route, scalar, x, along)
    except (RuntimeError, NotImplementedError):
        return None
    measured, truth = (flatten(v).detach().to("cpu", torch.float64) for v in (value, reference))
    return float((measured - truth).norm() / truth.norm())


def _derivative(route: str, scalar: Scalar, x: Tensors, along: Sequence[Tensors]) -> Tensors:
    """Return F' u as a scalar, F'' u or F''' u v by a route."""
    one, other = along
    if route == "R":
        return (dot(_reverse(scalar, x, 1, along), one),)
    if "F" not in route:
        return _reverse(scalar, x, len(route), along)
    if route == "F":
        return (jvp(scalar, (x,), (one,))[1],)

    def product(at: Tensors) -> Tensors:
        if route == "FRR":
            twice: Tensors = grad(lambda inner: dot(grad(scalar)(inner), one))(at)
            return twice
        mixed: Tensors = jvp(grad(scalar), (at,), (one,))[1]
        return mixed

    return product(x) if route == "FR" else jvp(product, (x,), (other,))[1]


def _reverse(scalar: Scalar, x: Tensors, order: int, along: Sequence[Tensors]) -> Tensors:
    """Return F', F'' u or F''' u v by reverse mode alone."""
    leaves = tuple(a.detach().clone().requires_grad_() for a in x)
    value, gradient = scalar(leaves), leaves
    for k in range(order):
        gradient = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        if k + 1 < order:
            value = dot(gradient, along[k])
    return gradient


def table(measurements: Iterable[Measurement]) -> str:
    """Return a table in Markdown of the functions with a derivative that is not right, and a list of the others by kind."""
    rows = [f"| function | {' | '.join(ROUTES)} |", "|---" * (1 + len(ROUTES)) + "|"]
    right: dict[str, list[str]] = {}
    for row in measurements:
        if row.right:
            right.setdefault(row.kind, []).append(row.name)
        else:
            rows.append(f"| {row.name} | {' | '.join(row.verdict(route) for route in ROUTES)} |")
    lists = [f"- {kind}: {'; '.join(names)}." for kind, names in right.items()]
    return "\n".join([*rows, "", "Right in all of these:", "", *lists])


def main(arguments: Sequence[str], *, prog: str = "mlopt derivatives") -> None:
    """Run the command.

    Args:
        arguments: the options.
        prog: name of the command, for its help.

    Raises:
        ArgumentError: no function has the name.
        SystemExit: after `--help`, or for options that cannot be parsed.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compare the derivatives of torch's functions, up to the third, with differences in float64; print the "
        "relative errors as a Markdown table. R is a pass in reverse mode, F a pass in forward mode; the outermost pass "
        "comes first.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of the names of the functions (default: all)")
    parser.add_argument("--device", default="cpu", help="device on which the functions are evaluated (default: cpu)")
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32"), help="default: float64")
    parser.add_argument(
        "--primitives", action="store_true", help="evaluate functions in the primitive operations of mlopt"
    )
    options = parser.parse_args(arguments)
    chosen = [c for c in cases() if not options.names or any(name.lower() in c.name.lower() for name in options.names)]
    if not chosen:
        raise ArgumentError(f"derivatives: no function has {' or '.join(map(repr, options.names))} in its name")
    dtype = getattr(torch, options.dtype)
    rows = [measure(c, device=options.device, dtype=dtype, primitives=options.primitives) for c in chosen]
    print(f"torch {torch.__version__}, {options.device}, {options.dtype}, Python {platform.python_version()}\n")
    print(table(rows))
