"""Context prediction: predict what surrounds an atom at a distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mlopt.errors import ArgumentError
from mlopt.validation import is_whole

from ...objective import Objective, prepared
from ..graphs import import_extra
from .targets import attach, kept, parse, varying_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch_geometric.data import Batch, Data

    from ...encoder import Encoder

Context = tuple[tuple[int, ...], tuple[float, ...]]


def contexts(molecule: Any, inner: int, outer: int) -> list[Context]:
    """Return the context of each atom: the atoms from `inner` to `outer` bonds away, and the bonds between them.

    A context is the sorted atomic numbers of its atoms, and the sorted orders of its bonds (1.5 if aromatic).
    """
    distances = import_extra("rdkit.Chem").GetDistanceMatrix(molecule)
    elements = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx(), b.GetBondTypeAsDouble()) for b in molecule.GetBonds()]
    return [
        (
            tuple(sorted(elements[atom] for atom in within.nonzero()[0])),
            tuple(sorted(order for begin, end, order in bonds if within[begin] and within[end])),
        )
        for within in (distances >= inner) & (distances <= outer)
    ]


@kept
def context_classes(corpus: Sequence[Data], inner: int, outer: int, classes: int) -> list[Tensor]:
    """Return the class of each atom's context, long (atoms,) for each molecule.

    Classes are the `classes` most frequent contexts of the corpus, by frequency; all other contexts are one class more.
    """
    numbers: dict[Context, int] = {}
    rows = [
        torch.tensor([numbers.setdefault(context, len(numbers)) for context in contexts(molecule, inner, outer)])
        for molecule in parse([graph.smiles for graph in corpus])
    ]
    counts = torch.cat(rows).bincount().tolist()
    ranked = sorted(numbers, key=lambda context: (-counts[numbers[context]], context))[:classes]
    class_of = torch.full((len(numbers),), len(ranked))
    class_of[[numbers[context] for context in ranked]] = torch.arange(len(ranked))
    return [class_of[row] for row in rows]


class ContextPrediction(Objective):
    """Cross entropy of the context of each atom, a mean over atoms.

    The context of an atom is the part of the molecule from `inner` to `outer` bonds away: the multisets of its elements and
    of its bond orders. The most frequent contexts of the corpus are the classes, and the rest is one class more. Nothing is
    hidden.

    The source contrasts the embedding of an atom's neighbourhood with the embedding of a context by a second network, with
    contexts of other molecules as negatives. Classes in place of the second network need neither its parameters nor
    negatives; GROVER (Rong et al., NeurIPS 2020) predicts classes of contexts, too.

    Args:
        inner: the shortest distance of the context, in bonds.
        outer: the longest.
        classes: the number of frequent contexts.

    Source: Hu et al., "Strategies for Pre-training Graph Neural Networks", ICLR 2020, section 3.1.1.
    """

    name = "context_prediction"

    def __init__(self, inner: int = 2, outer: int = 3, classes: int = 512) -> None:
        if not (is_whole(inner, 1) and is_whole(outer, 1) and inner <= outer):
            raise ArgumentError(
                f"inner and outer must be whole numbers with 1 <= inner <= outer; got {inner!r}, {outer!r}"
            )
        if not is_whole(classes, 1):
            raise ArgumentError(f"classes must be a whole number of at least 1; got {classes!r}")
        self.inner, self.outer, self.frequent = inner, outer, classes
        self.key = f"context_{inner}_{outer}_{classes}"
        self.classes: int | None = None

    def prepare(self, corpus: Sequence[Data], seed: int) -> None:
        """Attach the classes (atoms,) to each graph.

        Raises:
            ValueError: all atoms have the same context.
        """
        table = attach(corpus, self.key, lambda: context_classes(corpus, self.inner, self.outer, self.frequent))
        varying_columns(table[:, None], "contexts")
        self.classes = int(table.max()) + 1

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map from an atom's embedding to contexts."""
        return nn.Linear(encoder.width, prepared(self.classes, self))

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over all atoms."""
        return cross_entropy(head(encoder(view)), view[self.key])
