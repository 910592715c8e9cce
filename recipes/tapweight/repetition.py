"""Report examples that are listed more than once, with different labels, or in two splits."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from .examples import Examples
    from .task import Split

__all__ = ["repetitions", "shared"]

_NAMED = 3
_LONGEST = 40


def repetitions(
    examples: Examples[Any], keys: Sequence[Hashable], labels: Sequence[Sequence[str | None]], names: Sequence[str]
) -> list[str]:
    """Return a sentence on examples that are listed more than once, and on those of them with different labels.

    Args:
        examples: the examples of one file.
        keys: the identity of each example.
        labels: the labels of each example as text, one for each name; None if missing.
        names: the names of the labels.
    """
    places: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        places[key].append(index)
    repeated = {key: indices for key, indices in places.items() if len(indices) > 1}
    if not repeated:
        return []
    differ = []
    for key, indices in repeated.items():
        for column, name in enumerate(names):
            values = [labels[i][column] for i in indices]
            if len({value for value in values if value is not None}) > 1:
                rows = ", ".join(str(examples.rows[i]) for i in indices)
                shown = str(key) if len(str(key)) <= _LONGEST else f"{str(key)[:_LONGEST]}..."
                differ.append(f"{shown} in rows {rows} ({name}: {', '.join(value or 'none' for value in values)})")
                break
    sentences = [f"{examples.noun} of {examples.name} listed more than once: {len(repeated)}"]
    if differ:
        more = f" and {len(differ) - _NAMED} more" if len(differ) > _NAMED else ""
        sentences.append(f"of these, with different labels: {len(differ)}; {'; '.join(differ[:_NAMED])}{more}")
    return sentences


def shared(splits: Mapping[Split, Examples[Any]], key: Callable[[Any], Hashable]) -> list[str]:
    """Return a sentence for each other split that shares examples with the training split.

    Args:
        splits: the examples of each split.
        key: returns the identity of an example.
    """
    train = set(map(key, splits["train"]))
    sentences = []
    for split in ("valid", "test"):
        examples = splits[split]
        if count := sum(key(example) in train for example in examples):
            noun = examples.noun
            sentences.append(f"{count} of {len(examples)} {split} {noun} are also among the training {noun}")
    return sentences
