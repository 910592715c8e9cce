"""Compiled code held against live products: errors that name the level, and comparisons now and then."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...errors import EstimatorError
from ...problem import LevelTerm, Vectors
from ...tensors import Tensors, norm, subtract

__all__ = ["compiler_named", "differs", "is_due"]

#: Distances beyond which compiled and live products differ by more than rounding; compiled code may skip that of autocast.
_ROUNDING = {torch.float64: 1e-4, torch.float32: 5e-2}
_COARSE = 0.25


@contextmanager
def compiler_named(term: LevelTerm) -> Iterator[None]:
    """Turn an error of torch.compile into one that names the level and the remedy."""
    # Imported here since the import takes as long as the rest of torch.
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise EstimatorError(
            f"level {term.name!r}: torch.compile cannot compile its {term.part} "
            f"({str(error).strip().splitlines()[0]}); use compile=False"
        ) from error


def is_due(term: LevelTerm, code: str) -> bool:
    """Return whether a compiled product should be compared: at the first, tenth and hundredth use, and every thousandth.

    Args:
        term: the term.
        code: a name of the code, with the shapes of its arguments; uses are counted for each.
    """
    uses, key = term.workspace.uses, (*term.label, code)
    count = uses[key] = uses.get(key, 0) + 1
    return count in (1, 10, 100) or count % 1000 == 0


def differs(product: Vectors, live: Vectors) -> float | None:
    """Return the relative distance between two products, of the block where it is largest, if it is more than rounding.

    It is infinite if only the first is not finite.
    """
    worst = None
    for block, vectors in live.items():
        gap = _gap(tuple(product[block]), tuple(vectors))
        if vectors and gap > max(_ROUNDING.get(x.dtype, _COARSE) for x in vectors):
            worst = gap if worst is None else max(gap, worst)
    return worst


def _gap(product: Tensors, live: Tensors) -> float:
    """Return the relative distance between two products; infinite if only the first is not finite."""
    size, gap = float(norm(live)), float(norm(subtract(product, live)))
    if not math.isfinite(size) or gap == 0.0:
        return 0.0
    return gap / size if math.isfinite(gap) and size else math.inf
