"""Variants of the recipe's methods, by name: options that an ablation judges before the recipe takes them, and other numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlopt
from mlopt.recipes.tapweight.methods import Method, ThreeLevels, make_method

from .arms import Halving, Mixtures
from .rehearsals import ByVerdict, FromRehearsal, Sequential, WeightedSum
from .tuned import Tuned

__all__ = ["VARIANTS", "method_of"]


def _published(name: str, estimator: mlopt.Estimator | None = None, proximal: str = "l2") -> Callable[[], Method]:
    return partial(ThreeLevels, estimator, proximal=proximal, name=name)


VARIANTS: dict[str, Callable[[], Method]] = {
    "rehearsal-halving": Halving,
    "rehearsal-mixtures": Mixtures,
    "rehearsal-sequential": Sequential,
    "rehearsal-gradient": FromRehearsal,
    "rehearsal-sum": WeightedSum,
    "rehearsal-verdict": ByVerdict,
    # The published form with the identity is `tapweight` itself. The passes of a solver are not counted; its time is.
    "tapweight-differences": _published("tapweight-differences", mlopt.FiniteDifference()),
    "tapweight-neumann": _published("tapweight-neumann", mlopt.Neumann(iterations=5)),
    "tapweight-cg": _published("tapweight-cg", mlopt.ConjugateGradient(iterations=5)),
    "tapweight-l1": _published("tapweight-l1", proximal="l1"),
}


def method_of(name: str) -> Method:
    """Return a variant, a method of the recipe, or either with other settings: "METHOD:SETTING=VALUE,...".

    Raises:
        ArgumentError: there is no such method or setting.
    """
    kind, _, changes = name.partition(":")
    if "=" in changes:
        return Tuned(method_of(kind), changes)
    return VARIANTS[name]() if name in VARIANTS else make_method(name)
