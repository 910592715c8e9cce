"""The methods that a run can compare, by name."""

from __future__ import annotations

from mlopt.errors import ArgumentError
from mlopt.validation import shown

from ..names import suggestion
from .alignment import Alignment
from .bilevel import Bilevel
from .fixed import Direct, Equal, FixedWeights, Given, Single
from .frozen import Frozen
from .method import Adapted, Method
from .random_search import RandomSearch
from .rehearsal import Rehearsal
from .surgery import Surgery
from .tapweight import ThreeLevels
from .uncertainty import Uncertainty

__all__ = [
    "DEFAULT",
    "METHODS",
    "Adapted",
    "Alignment",
    "Bilevel",
    "Direct",
    "Equal",
    "FixedWeights",
    "Frozen",
    "Given",
    "Method",
    "RandomSearch",
    "Rehearsal",
    "Single",
    "Surgery",
    "ThreeLevels",
    "Uncertainty",
    "make_method",
]

METHODS: dict[str, type[Method]] = {
    "direct": Direct,
    "equal": Equal,
    "uncertainty": Uncertainty,
    "pcgrad": Surgery,
    "alignment": Alignment,
    "bilevel": Bilevel,
    "random_search": RandomSearch,
    "rehearsal": Rehearsal,
    "tapweight": ThreeLevels,
    "frozen": Frozen,
}
#: The methods that a run compares by default; the result holds the encoder and the weights of the last.
DEFAULT = ("direct", "equal", "rehearsal")


def make_method(name: str) -> Method:
    """Return the method of a name: one of `METHODS`, or "single:OBJECTIVE" for pretraining on one objective.

    Raises:
        ValueError: there is no method of that name.
    """
    kind, _, objective = name.partition(":")
    if kind == "single" and objective:
        return Single(objective)
    if name not in METHODS:
        raise ArgumentError(f"there is no method {shown(name)}{suggestion(name, (*METHODS, 'single:OBJECTIVE'))}")
    return METHODS[name]()
