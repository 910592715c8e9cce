"""One file for each library: its estimators by name, and the call of each on a case.

An adapter has `ESTIMATORS`: for each name, a function of (case, iterations) that returns a function without arguments, which
returns the flat hypergradient at the current point of the case. The first word of a name is its family; libraries are compared
by family. `VERSION` is the name of the distribution. A combination that a library refuses or cannot express raises `Unsupported`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

__all__ = ["LIBRARIES", "Unsupported", "adapter", "alternate", "family", "flat_or_zero", "watched"]

#: The libraries, each with the remedy if it is absent.
LIBRARIES = {
    "mlopt": "",
    "betty": "make peers",
    "betty_head": "--peer betty_head=PYTHON, a Python that can import Betty's repository as `betty`",
    "torchopt": "make peers",
    "higher": "make peers",
    "boat": "make peers",
    "hypertorch": "--peer hypertorch=PYTHON, a Python that can import hypertorch's repository as `hypergrad`",
}

#: Families without a number of iterations.
ONE_SHOT = ("Identity", "FiniteDifference", "Dense", "Converged")


class Unsupported(Exception):  # noqa: N818
    """A library does not offer this combination; the message says why."""


def adapter(library: str) -> ModuleType:
    """Return the adapter of a library, which imports the library."""
    return importlib.import_module(f"{__name__}.{'betty' if library == 'betty_head' else library}")


def family(estimator: str) -> str:
    """Return the first word of an estimator's name."""
    return estimator.split()[0]


def flat_or_zero(gradients: Sequence[Tensor | None], variables: Sequence[Tensor]) -> Tensor:
    """Return gradients as one vector, with zeros in place of None."""
    pairs = zip(gradients, variables, strict=True)
    return torch.cat([(torch.zeros_like(v) if g is None else g).detach().reshape(-1) for g, v in pairs])


def watched(kind: type[Optimizer], watch: Callable[[], None]) -> type[Optimizer]:
    """Return an optimiser class that calls `watch` before each step, with the gradients in place and the variables unchanged."""

    class Watched(kind):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            watch()
            return super().step(closure)

    return Watched


def alternate(case: Any, hypergradient: Callable[[], Tensor], steps: int, watch: Callable[[], None]) -> None:
    """Alternate one full-batch gradient step of x with one Adam step of u on the hypergradient: the `loop` section's loop."""
    inner, outer = SGD(case.x, lr=case.step_size), watched(Adam, watch)(case.u, lr=OUTER_RATE)
    for _ in range(steps):
        inner.zero_grad()
        case.f().backward(inputs=case.x)
        inner.step()
        gradients = hypergradient().split([variable.numel() for variable in case.u])
        for variable, gradient in zip(case.u, gradients, strict=True):
            variable.grad = gradient.view_as(variable)
        outer.step()


#: The outer learning rate of the `loop` section.
OUTER_RATE = 1e-2
