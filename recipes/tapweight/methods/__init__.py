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
    "USED_BY",
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

_THREE_LEVELS = ("tapweight", "frozen")
_LEARNED = (*_THREE_LEVELS, "bilevel", "alignment")
_REHEARSED = ("rehearsal", "random_search")
_PRETRAINED = (*(name for name in METHODS if name != "direct"), "single")
#: The keys of a configuration that only some methods use, with the names of these methods.
USED_BY: dict[tuple[str, ...], tuple[str, ...]] = {
    ("gamma", "finetuning_lr", "measurements"): _THREE_LEVELS,
    ("warmup", "every", "valid_batch_size"): _LEARNED,
    ("weights_lr",): (*_LEARNED, "uncertainty"),
    ("rehearsal_steps", "rehearsals"): _REHEARSED,
    ("steps", "batch_size", "pretraining_lr", "weight_decay", "lr_schedule", "scale", "corpus_limit"): _PRETRAINED,
}


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
