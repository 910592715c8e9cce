"""Fingerprint counts: regress how often the common environments of atoms occur in a molecule."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from mlopt.errors import ArgumentError
from mlopt.validation import is_whole

from ..graphs import import_extra
from .regression import Regression
from .targets import by_molecule, kept

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch_geometric.data import Data


@kept
def common_environments(corpus: Sequence[Data], most: int) -> Tensor:
    """Return how often each molecule has the environments that the most molecules have, uint8 (M, at most `most`).

    An environment is an identifier of the Morgan fingerprint of radius 2, not folded, so no two share a column. Columns are
    in the order of the number of molecules, then of the identifier. Counts are at most 255.

    Args:
        corpus: the molecules.
        most: the largest number of environments.
    """
    counts: list[dict[int, int]] = [dict(rows.tolist()) for rows in by_molecule(_environments, corpus, "environments")]
    molecules = Counter(environment for row in counts for environment in row)
    chosen = sorted(molecules, key=lambda environment: (-molecules[environment], environment))[:most]
    return torch.tensor([[min(row.get(environment, 0), 255) for environment in chosen] for row in counts]).byte()


def _environments(molecules: Sequence[Any]) -> list[Tensor]:
    """Return the identifier and the count of each environment of each molecule, long (environments, 2)."""
    generator = import_extra("rdkit.Chem.rdFingerprintGenerator").GetMorganGenerator(radius=2)
    counts = [generator.GetSparseCountFingerprint(molecule).GetNonzeroElements() for molecule in molecules]
    return [torch.tensor(list(row.items()), dtype=torch.long).reshape(-1, 2) for row in counts]


class FingerprintCounts(Regression):
    """Mean squared error of log(1 + count) of the common ECFP environments, standardised over the corpus.

    Args:
        environments: the number of environments, those that the most molecules of the corpus have.

    Source: Rogers and Hahn, "Extended-Connectivity Fingerprints", Journal of Chemical Information and Modeling 2010, the
    count form with diameter 4.
    """

    name, noun = "fingerprint_counts", "environments"

    def __init__(self, environments: int = 256) -> None:
        if not is_whole(environments, 1):
            raise ArgumentError(f"environments must be a whole number of at least 1; got {environments!r}")
        self.environments = environments
        self.key = f"fingerprint_counts_{environments}"

    def table(self, corpus: Sequence[Data]) -> Tensor:
        """Return the counts."""
        return common_environments(corpus, self.environments)

    def scaled(self, table: Tensor) -> Tensor:
        """Return log(1 + count)."""
        return table.log1p()
