"""Draw the examples of a seed: a test set of whole groups, and labels among the rest."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from mlopt.recipes.tapweight.files import DataError
from mlopt.rng import derive_seed

from .plan import Labels

__all__ = ["half_of_the_groups", "permutation", "train_and_valid"]

_VALID = 0.2


def permutation(n: int, *seeds: object) -> list[int]:
    """Return the numbers below n in an order that depends on the seeds."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed(0, *map(str, seeds)))).tolist()


def half_of_the_groups(groups: Sequence[Hashable], seed: int) -> tuple[list[int], list[int]]:
    """Divide examples so that no group is on both sides: half of them are held out, group by group in a random order.

    A group that would take the held-out part above half of the examples is passed over.

    Args:
        groups: the group of each example.
        seed: the seed of the order.

    Returns:
        The 0-based indices of the rest, and of the part held out.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    ordered, held_out = list(members.values()), list[int]()
    for place in permutation(len(ordered), "groups", seed):
        if len(held_out) + len(ordered[place]) <= len(groups) / 2:
            held_out += ordered[place]
    test = set(held_out)
    return [index for index in range(len(groups)) if index not in test], sorted(held_out)


def train_and_valid(pool: Sequence[int], labels: Labels, seed: int, attempt: int = 0) -> tuple[list[int], list[int]]:
    """Draw labelled examples, four fifths for training and one fifth for validation.

    Args:
        pool: the examples to draw from.
        labels: how many; "all" takes all of them.
        seed: the seed of the draw.
        attempt: the number of an earlier draw that could not be used, such as one without a class.

    Raises:
        DataError: there are fewer examples than labels.
    """
    count = len(pool) if labels == "all" else labels
    if count > len(pool):
        raise DataError(f"--labels {labels}: the task has {len(pool)} examples besides the test set; ask for fewer")
    drawn = [pool[place] for place in permutation(len(pool), "labels", seed, attempt)[:count]]
    valid = max(2, round(_VALID * count))
    return sorted(drawn[valid:]), sorted(drawn[:valid])
