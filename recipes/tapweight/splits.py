"""Divide examples into training, validation and test splits."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from .files import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .task import Split

__all__ = ["EIGHT_ONE_ONE", "NAMES", "check_fractions", "ends_of", "random_split"]

NAMES: tuple[Split, ...] = ("train", "valid", "test")
EIGHT_ONE_ONE = (0.8, 0.1, 0.1)


def random_split(n: int, fractions: Sequence[float] = EIGHT_ONE_ONE, seed: int = 0) -> dict[Split, list[int]]:
    """Split `n` examples at random.

    Args:
        n: number of examples.
        fractions: of train, valid and test; positive, with sum 1.
        seed: the seed of the permutation; torch's global generator is not used.

    Returns:
        0-based indices of train, valid and test, each in ascending order.

    Raises:
        DataError: the fractions are wrong, or a split would be empty.
    """
    check_fractions(fractions)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    ends = ends_of(n, fractions)
    splits = {name: sorted(order[start:end]) for name, start, end in zip(NAMES, [0, *ends], ends, strict=False)}
    for name, indices in splits.items():
        if not indices:
            raise DataError(f"{n} examples are too few for the {name} split at fractions={tuple(fractions)}; give more")
    return splits


def check_fractions(fractions: Sequence[float]) -> None:
    """Check that three positive fractions sum to 1."""
    valid = len(fractions) == 3 and all(fraction > 0 for fraction in fractions)
    if not valid or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise DataError(
            f"fractions={tuple(fractions)!r}: give three positive numbers (train, valid, test) whose sum is 1"
        )


def ends_of(n: int, fractions: Sequence[float]) -> list[int]:
    """Return the largest sizes of train, train and valid, and all; the slack allows for sums such as 0.7 + 0.1."""
    return [*(math.floor(part * n + 1e-6) for part in list(accumulate(fractions))[:2]), n]
