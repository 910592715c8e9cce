"""Divide labelled molecules into the splits of a task, and report molecules that are listed more than once."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Literal, get_args

import torch

from ..files import DataError
from ..splits import EIGHT_ONE_ONE, random_split, stratified_split
from .graphs import canonical
from .splits import balanced_scaffold_split, scaffold_split

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..task import Split
    from .data import Molecules

__all__ = ["Method", "divided", "repetitions", "shared"]

Method = Literal["scaffold", "balanced", "random", "stratified"]
_NAMED = 3


def divided(
    molecules: Molecules,
    method: Method = "scaffold",
    fractions: Sequence[float] = EIGHT_ONE_ONE,
    *,
    chirality: bool = True,
    seed: int = 0,
) -> dict[Split, list[int]]:
    """Divide labelled molecules into train, valid and test; the rows of one molecule stay together.

    Args:
        molecules: labelled molecules.
        method: "scaffold": no Bemis-Murcko scaffold is in two splits; "balanced": the same, with equal shares of each class;
            "random"; or "stratified": at random, with equal shares of each class.
        fractions: of train, valid and test.
        chirality: distinguish scaffolds that differ in stereochemistry.
        seed: the seed of all but "scaffold".

    Raises:
        DataError: the method is unknown or needs classes, the fractions are wrong, or a split would be empty.
    """
    if method not in get_args(Method):
        raise DataError(f"split={method!r}: give {', '.join(map(repr, get_args(Method)))}")
    if method == "scaffold":
        return scaffold_split(molecules.smiles, fractions, chirality=chirality)
    if method == "balanced":
        labels = torch.cat([graph.y for graph in molecules])
        return balanced_scaffold_split(molecules.smiles, labels, fractions, chirality=chirality, seed=seed)
    groups = [canonical(smiles) for smiles in molecules.smiles]
    if method == "random":
        return random_split(len(molecules), fractions, seed, groups)
    if any(each.form == "numbers" for each in molecules.meanings):
        raise DataError(
            f"{molecules.source}: split='stratified' needs classes, and the labels are numbers; give --split random"
        )
    return stratified_split([str(graph.y.tolist()) for graph in molecules], fractions, seed, groups)


def repetitions(molecules: Molecules) -> list[str]:
    """Return a sentence on molecules that are listed more than once, and on those of them with different labels."""
    places: dict[str, list[int]] = defaultdict(list)
    for index, smiles in enumerate(molecules.smiles):
        places[canonical(smiles)].append(index)
    repeated = {name: indices for name, indices in places.items() if len(indices) > 1}
    if not repeated:
        return []
    sentences = [
        f"{len(repeated)} molecules of {molecules.name} are listed more than once, in one or several spellings"
    ]
    differ = []
    for name, indices in repeated.items():
        labels = torch.cat([molecules[i].y for i in indices])
        spread = torch.where(labels.isnan(), -torch.inf, labels).amax(0) - torch.where(
            labels.isnan(), torch.inf, labels
        ).amin(0)
        if (spread > 0).any():
            task = int((spread > 0).long().argmax())
            values = ", ".join(f"{value:g}" for value in labels[:, task].tolist())
            rows = ", ".join(str(molecules.rows[i]) for i in indices)
            differ.append(f"{name} in rows {rows} ({molecules.label_names[task]}: {values})")
    if differ:
        more = f" and {len(differ) - _NAMED} more" if len(differ) > _NAMED else ""
        sentences.append(f"{len(differ)} of them have different labels: {'; '.join(differ[:_NAMED])}{more}")
    return sentences


def shared(splits: Mapping[Split, Molecules]) -> list[str]:
    """Return a sentence for each other split that shares molecules with the training split."""
    train = {canonical(smiles) for smiles in splits["train"].smiles}
    sentences = []
    for split in ("valid", "test"):
        count = sum(canonical(smiles) in train for smiles in splits[split].smiles)
        if count:
            sentences.append(f"{count} of {len(splits[split])} {split} molecules are among the training molecules too")
    return sentences
