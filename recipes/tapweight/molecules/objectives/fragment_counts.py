"""Fragment counts: regress how often each of RDKit's fragments occurs in a molecule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..graphs import import_extra
from .regression import Regression
from .targets import by_molecule, kept

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch_geometric.data import Data


@kept
def fragment_counts(corpus: Sequence[Data]) -> Tensor:
    """Return the counts of RDKit's fragments (`fr_*`, in alphabetical order) in each molecule, uint8 (M, F), at most 255."""
    return torch.cat(by_molecule(_rows, corpus, "fragments"))


def _rows(molecules: Sequence[Any]) -> Tensor:
    fragments = import_extra("rdkit.Chem.Fragments")
    counts = [getattr(fragments, name) for name in sorted(vars(fragments)) if name.startswith("fr_")]
    return torch.tensor([[min(count(molecule), 255) for count in counts] for molecule in molecules]).byte()


class FragmentCounts(Regression):
    """Mean squared error of log(1 + count) of RDKit's fragments, standardised over the corpus.

    `FunctionalGroups` predicts which fragments are present, from the same counts.
    """

    name, key, noun = "fragment_counts", "fragment_counts", "fragment counts"

    def table(self, corpus: Sequence[Data]) -> Tensor:
        """Return the counts."""
        return fragment_counts(corpus)

    def scaled(self, table: Tensor) -> Tensor:
        """Return log(1 + count)."""
        return table.log1p()
