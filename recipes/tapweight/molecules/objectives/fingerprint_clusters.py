"""Fingerprint clusters: predict a molecule's cluster at several granularities."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mlopt.errors import ArgumentError

from ...files import DataError
from ...objective import Objective, prepared
from ..graphs import import_extra
from .targets import attach, by_molecule, kept

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch_geometric.data import Batch, Data

    from ...encoder import Encoder

_BITS = 1024
_MOLECULES_PER_CLUSTER = 10


def morgan_fingerprints(corpus: Sequence[Data]) -> Any:
    """Return the Morgan fingerprints (radius 2, 1,024 bits) of a corpus, a scipy sparse float32 matrix (M, 1024)."""
    sparse = import_extra("scipy.sparse")
    parts = by_molecule(_bits, corpus, "fingerprints")
    return sparse.vstack([sparse.csr_matrix(bits.numpy(), dtype="float32") for bits in parts])


def _bits(molecules: Sequence[Any]) -> Tensor:
    generator = import_extra("rdkit.Chem.rdFingerprintGenerator").GetMorganGenerator(radius=2, fpSize=_BITS)
    return torch.stack([torch.from_numpy(generator.GetFingerprintAsNumPy(molecule)) for molecule in molecules])


@kept
def clusters_of(corpus: Sequence[Data], numbers: tuple[int, ...], seed: int) -> Tensor:
    """Return the k-means clusters of each fingerprint, long (M, numbers), for each number of clusters."""
    fingerprints = morgan_fingerprints(corpus)
    return torch.stack([cluster(fingerprints, number, seed) for number in numbers], 1)


def cluster(fingerprints: Any, clusters: int, seed: int) -> Tensor:
    """Return the k-means cluster of each fingerprint, long (M,)."""
    kmeans = import_extra("sklearn.cluster").MiniBatchKMeans(clusters, random_state=seed, n_init=1)
    return torch.from_numpy(kmeans.fit_predict(fingerprints)).long()


class FingerprintClusters(Objective):
    """Cross entropy of a molecule's k-means clusters of Morgan fingerprints, a mean over numbers of clusters.

    A corpus of M molecules gets at most M / 10 clusters; `remarks` reports a reduction. Clusters that the graphs already have
    are used as they are, whatever the seed.

    Args:
        clusters: the numbers of clusters, one head each.

    Source: Zeng et al., "Accurate prediction of molecular properties and drug targets using a self-supervised image
    representation learning framework" (ImageMol), Nature Machine Intelligence 2022: multi-granularity chemical clusters
    classification, with (100, 1000, 10000).
    """

    name = "fingerprint_clusters"

    def __init__(self, clusters: Sequence[int] = (100, 1000)) -> None:
        if not clusters or min(clusters) < 2 or len(set(clusters)) < len(clusters):
            raise ArgumentError(f"clusters must be different numbers of at least 2; got {clusters!r}")
        self.clusters = tuple(clusters)
        self.classes: list[int] | None = None
        self.remarks: list[str] = []

    def prepare(self, corpus: Sequence[Data], seed: int) -> None:
        """Attach `clusters_K` (1,) to each graph, for each number of clusters K.

        Raises:
            ValueError: the corpus has fewer than 20 molecules.
        """
        self.classes, self.remarks = [], []
        most = len(corpus) // _MOLECULES_PER_CLUSTER
        numbers = tuple(min(number, most) for number in self.clusters)
        clusters = functools.cache(lambda: clusters_of(corpus, numbers, seed))
        for column, number in enumerate(self.clusters):

            def compute(column: int = column, number: int = number) -> Tensor:
                if most < 2:
                    raise DataError(
                        f"{self.name} needs at least 20 molecules, but the corpus has {len(corpus)}; give a larger corpus"
                    )
                if number > most:
                    self.remarks.append(f"{number} clusters reduced to {most}: the corpus has {len(corpus)} molecules")
                return clusters()[:, column]

            self.classes.append(int(attach(corpus, f"clusters_{number}", compute).max()) + 1)

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to clusters for each number of clusters."""
        return nn.ModuleList(nn.Linear(encoder.width, classes) for classes in prepared(self.classes, self))

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over numbers of clusters and molecules."""
        pooled = encoder.pool(view)
        losses = [
            cross_entropy(linear(pooled), view[f"clusters_{number}"])
            for number, linear in zip(self.clusters, head.children(), strict=True)
        ]
        return torch.stack(losses).mean()
