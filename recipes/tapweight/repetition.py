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
    """Return a sentence for each split that shares examples with a split by which the model is chosen.

    Args:
        splits: the examples of each split.
        key: returns the identity of an example.
    """
    keys = {split: [key(example) for example in examples] for split, examples in splits.items()}
    pairs: tuple[tuple[Split, Split, str], ...] = (
        ("valid", "train", "training"),
        ("test", "train", "training"),
        ("test", "valid", "validation"),
    )
    sentences = []
    for split, other, word in pairs:
        if count := sum(map(set(keys[other]).__contains__, keys[split])):
            noun = splits[split].noun
            sentences.append(f"{count} of {len(keys[split])} {split} {noun} are also among the {word} {noun}")
    return sentences
