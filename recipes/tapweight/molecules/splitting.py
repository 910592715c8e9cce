"""Divide labelled molecules into the splits of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch

from ..cells import label_text
from ..files import DataError
from ..labels import check_varied
from ..splits import EIGHT_ONE_ONE, about, random_split, stratified_split
from .graphs import canonical
from .splits import balanced_scaffold_split, scaffold_split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..task import Split
    from .data import Molecules

__all__ = ["Method", "divided"]

Method = Literal["scaffold", "balanced", "random", "stratified"]


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
    if len(molecules.label_names) == 1:
        labels = (label_text(float(graph.y)) for graph in molecules)
        check_varied(molecules.source, molecules.label_names[0], filter(None, labels))
    with about(molecules.source):
        return _divided(molecules, method, fractions, chirality=chirality, seed=seed)


def _divided(
    molecules: Molecules, method: Method, fractions: Sequence[float], *, chirality: bool, seed: int
) -> dict[Split, list[int]]:
    """Divide labelled molecules by a known method, see `divided`."""
    if method == "scaffold":
        return scaffold_split(molecules.smiles, fractions, chirality=chirality)
    if method == "balanced":
        labels = torch.cat([graph.y for graph in molecules])
        return balanced_scaffold_split(molecules.smiles, labels, fractions, chirality=chirality, seed=seed)
    groups = [canonical(smiles) for smiles in molecules.smiles]
    if method == "random":
        return random_split(len(molecules), fractions, seed, groups)
    if any(each.form == "numbers" for each in molecules.meanings):
        raise DataError("split='stratified' needs classes, but the labels are numbers; give --split random")
    classes = [str(graph.y.tolist()) for graph in molecules]
    return stratified_split(classes, fractions, seed, groups, combined=len(molecules.meanings) > 1)
