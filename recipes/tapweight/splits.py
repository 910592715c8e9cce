"""Divide examples into training, validation and test splits."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from mlopt.validation import shown

from .files import DataError
from .tables import column_of, parts_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence
    from pathlib import Path

    from .tables import Table
    from .task import Split

__all__ = [
    "EIGHT_ONE_ONE",
    "NAMES",
    "about",
    "check_fractions",
    "ends_of",
    "folder_split",
    "is_name_of_split",
    "listed_split",
    "named_split",
    "random_split",
    "stratified_split",
]

NAMES: tuple[Split, ...] = ("train", "valid", "test")
EIGHT_ONE_ONE = (0.8, 0.1, 0.1)
_SPELLINGS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "dev"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_REMEDY = "change --split-fractions, or give more"


def random_split(
    n: int, fractions: Sequence[float] = EIGHT_ONE_ONE, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> dict[Split, list[int]]:
    """Split `n` examples at random.

    Args:
        n: number of examples.
        fractions: of train, valid and test; positive, with sum 1.
        seed: the seed of the permutation; torch's global generator is not used.
        groups: a key of each example; examples of one key stay together, in the split of the first. Without repeated keys the
            split is that without keys.

    Returns:
        0-based indices of train, valid and test, each in ascending order.

    Raises:
        DataError: the fractions are wrong, or a split would be empty.
    """
    check_fractions(fractions)
    members = _members(range(n), groups)
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    return _cut([members[k] for k in order], ends_of(n, fractions), n, fractions)


def stratified_split(
    classes: Sequence[Hashable],
    fractions: Sequence[float] = EIGHT_ONE_ONE,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
    *,
    combined: bool = False,
) -> dict[Split, list[int]]:
    """Split examples at random so that each class has the same share of each split, as far as its size allows.

    Class by class, each example is given to the split that is furthest behind its fraction of all examples so far; the first of a
    class goes to train, without which the class could not be learned.

    Args:
        classes: the class of each example.
        fractions, seed, groups: as in `random_split`; a group counts as one of the class of its first example.
        combined: True if a class is a combination of the labels of several columns. Most combinations may be rare, and none has
            to be learned, so the first of each does not go to train.

    Raises:
        DataError: the fractions are wrong, or a split would be empty.
    """
    check_fractions(fractions)
    members = _members(range(len(classes)), groups)
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    strata: dict[Hashable, list[list[int]]] = defaultdict(list)
    for k in order:
        strata[classes[members[k][0]]].append(members[k])
    splits: dict[Split, list[int]] = {name: [] for name in NAMES}
    behind = dict.fromkeys(NAMES, 0.0)
    for stratum in strata.values():
        size = sum(map(len, stratum))
        for name, fraction in zip(NAMES, fractions, strict=True):
            behind[name] += fraction * size
        for k, group in enumerate(stratum):
            name = max(NAMES, key=behind.__getitem__) if k or combined else "train"
            behind[name] -= len(group)
            splits[name] += group
    words = f"{len(strata)} classes"
    return _checked(
        {name: sorted(indices) for name, indices in splits.items()}, len(members), len(classes), fractions, words
    )


def named_split(table: Table, column: str, records: Sequence[int]) -> dict[Split, list[int]]:
    """Split examples by a column that names the split of each: train, valid (also val, validation, dev) or test.

    Args:
        table: the table of the examples.
        column: the name of the column.
        records: the 0-based number of each example among the records of the table.

    Raises:
        DataError: there is no such column, a cell names no split, or a split is empty.
    """
    source = table.source
    cells = table.column(column_of(source, table.header, column, "name the column with --split-column"))
    splits: dict[Split, list[int]] = {name: [] for name in NAMES}
    for index, record in enumerate(records):
        row, cell = cells[record]
        if not is_name_of_split(cell):
            raise DataError(
                f"{source}, row {row}, column {shown(column)}: {shown(cell)} is not train, valid or test; correct it, or leave "
                "out --split-column"
            )
        splits[_SPELLINGS[str(cell).strip().casefold()]].append(index)
    for name, indices in splits.items():
        if not indices:
            raise DataError(
                f"{source}, column {shown(column)}: no row is in the {name} split; assign rows to it, or leave out --split-column"
            )
    return splits


def folder_split(folder: Path) -> dict[Split, Path]:
    """Return the data set of each split of a folder that `datasets.DatasetDict.save_to_disk` wrote.

    Raises:
        DataError: the data sets are not one of each split: train, valid (also val, validation, dev) and test.
    """
    parts = parts_of(folder)
    named = [(_SPELLINGS[part.casefold()], folder / part) for part in parts if is_name_of_split(part)]
    if sorted(name for name, _ in named) != sorted(NAMES):
        raise DataError(
            f"{folder} holds the data sets {', '.join(parts)}, not one each of train, valid and test; give three of them by "
            f"--train, --valid and --test, or one with --train, such as {folder / parts[0]}, which is split"
        )
    return {name: dict(named)[name] for name in NAMES}


def is_name_of_split(cell: Any) -> bool:
    """Return True if a cell names a split."""
    return str(cell).strip().casefold() in _SPELLINGS


def listed_split(file: Path, source: str, records: Sequence[int]) -> dict[Split, list[int]]:
    """Split examples as a file of an earlier run says.

    Args:
        file: JSON with the lists "train", "valid" and "test" of 0-based numbers of the records of `source`.
        source: the file of the examples, for errors.
        records: the number of each example among the records of `source`; numbers of records that were left out are passed over.

    Raises:
        DataError: the file cannot be read, lists a record twice or one that does not exist, or leaves a split empty.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; give the path of a splits.json with --splits") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error}); give a splits.json with --splits") from error
    lists: list[Any] = [content.get(name) for name in NAMES] if isinstance(content, dict) else []
    if not lists or not all(isinstance(x, list) and all(type(k) is int for k in x) for x in lists):
        raise DataError(
            f"{file}: give lists of row numbers by the names 'train', 'valid' and 'test', or leave out --splits"
        )
    listed = [number for numbers in lists for number in numbers]
    if len(set(listed)) < len(listed):
        twice = next(number for number in listed if listed.count(number) > 1)
        raise DataError(f"{file}: row {twice} is listed twice; list each row once, or leave out --splits")
    place = {number: index for index, number in enumerate(records)}
    if listed and not 0 <= min(listed) <= max(listed) <= max(records):
        wrong = next(number for number in listed if not 0 <= number <= max(records))
        raise DataError(
            f"{file}: {source} has no row {wrong} (the first is 0); give the splits.json of a run on it with --splits"
        )
    splits = {name: [place[k] for k in numbers if k in place] for name, numbers in zip(NAMES, lists, strict=True)}
    for name, indices in splits.items():
        if not indices:
            raise DataError(f"{file}: no row of {source} is in {name}; list some, or leave out --splits")
    return splits


def check_fractions(fractions: Sequence[float]) -> None:
    """Check that three positive fractions sum to 1."""
    valid = len(fractions) == 3 and all(fraction > 0 for fraction in fractions)
    if not valid or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise DataError(
            f"fractions={tuple(fractions)!r}: give three positive numbers (train, valid, test) whose sum is 1, such as "
            "--split-fractions 0.8 0.1 0.1"
        )


@contextmanager
def about(source: str) -> Iterator[None]:
    """Put the file of the examples before a sentence on their splits."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def ends_of(n: int, fractions: Sequence[float]) -> list[int]:
    """Return the largest sizes of train, train and valid, and all; the slack allows for sums such as 0.7 + 0.1."""
    return [*(math.floor(part * n + 1e-6) for part in list(accumulate(fractions))[:2]), n]


def _members(indices: Sequence[int], groups: Sequence[Hashable] | None) -> list[list[int]]:
    """Return the indices of each group, in the order of the groups' first members."""
    if groups is None:
        return [[index] for index in indices]
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index in indices:
        members[groups[index]].append(index)
    return list(members.values())


def _cut(
    members: Sequence[Sequence[int]], ends: Sequence[int], n: int, fractions: Sequence[float]
) -> dict[Split, list[int]]:
    """Give groups, in their order, to train until it is full, then to valid, then to test."""
    splits: dict[Split, list[int]] = {name: [] for name in NAMES}
    taken = 0
    for group in members:
        name = next(name for name, end in zip(NAMES, ends, strict=True) if taken < end)
        splits[name] += group
        taken += len(group)
    return _checked({name: sorted(indices) for name, indices in splits.items()}, len(members), n, fractions)


def _checked(
    splits: dict[Split, list[int]], distinct: int, n: int, fractions: Sequence[float], classes: str = ""
) -> dict[Split, list[int]]:
    """Refuse an empty split."""
    for name, indices in splits.items():
        if not indices:
            words = [f"{distinct} distinct"] * (distinct < n) + [classes] * bool(classes)
            counted = f"{n} example{'s' * (n > 1)}" + (f" ({', '.join(words)})" if words else "")
            raise DataError(
                f"{counted} {'are' if n > 1 else 'is'} too few for the {name} split at fractions={tuple(fractions)}; {_REMEDY} "
                "examples"
            )
    return splits
