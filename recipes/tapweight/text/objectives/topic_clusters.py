"""Topic clusters: predict the cluster of a text among clusters of the corpus by words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import cross_entropy

from mlopt.errors import ArgumentError

from ...files import DataError
from ...objective import Objective, prepared
from ..heads import LinearHead
from .targets import attach, import_extra, tfidf

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from ...encoder import Encoder
    from ..batches import Batch, Example

_WORDS = 20_000
_DIMENSIONS = 64
_TEXTS_PER_CLUSTER = 10


class TopicClusters(Objective):
    """Cross entropy of a text's k-means cluster in the space of latent semantic analysis.

    The TF-IDF weights of the corpus are projected on their first 64 singular vectors, and scaled to unit length. A corpus of M
    texts gets at most M / 10 clusters; `remarks` reports a reduction.

    Args:
        clusters: the number of clusters.

    Raises:
        ArgumentError: fewer than two clusters.

    Source: Deerwester et al., "Indexing by latent semantic analysis", JASIS 1990, for the space.
    """

    name = "topic_clusters"

    def __init__(self, clusters: int = 50) -> None:
        if clusters < 2:
            raise ArgumentError(f"clusters must be at least 2; got {clusters!r}")
        self.clusters = clusters
        self.key = f"topic_clusters_{clusters}"
        self.classes: int | None = None
        self.remarks: list[str] = []

    def prepare(self, corpus: Sequence[Example], seed: int) -> None:
        """Attach its cluster to each text.

        Raises:
            DataError: the corpus has fewer than 20 texts, or too few words.
        """
        most = len(corpus) // _TEXTS_PER_CLUSTER
        if most < 2:
            raise DataError(
                f"{self.name} needs at least {2 * _TEXTS_PER_CLUSTER} texts, but the corpus has {len(corpus)}; give a larger "
                "corpus"
            )
        self.classes = min(self.clusters, most)
        self.remarks = []
        if self.classes < self.clusters:
            self.remarks = [f"{self.clusters} clusters reduced to {most}: the corpus has {len(corpus)} texts"]
        attach(corpus, self.key, topics(corpus, self.classes, seed, self.name), self.name)

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to clusters."""
        return LinearHead(encoder.width, prepared(self.classes, self))

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the texts."""
        return cross_entropy(head(encoder.pool(view)), view[self.key])


def topics(corpus: Sequence[Example], clusters: int, seed: int, objective: str) -> list[int]:
    """Return the cluster of each text."""
    weights = tfidf(corpus, _WORDS, objective)
    seed %= 2**32  # the largest that scikit-learn takes
    dimensions = min(_DIMENSIONS, *weights.shape)
    space = import_extra("sklearn.decomposition").TruncatedSVD(dimensions, random_state=seed)
    points = import_extra("sklearn.preprocessing").normalize(space.fit_transform(weights))
    kmeans = import_extra("sklearn.cluster").MiniBatchKMeans(clusters, random_state=seed, n_init=3)
    numbers: list[int] = kmeans.fit_predict(points).tolist()
    return numbers
