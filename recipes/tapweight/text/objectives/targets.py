"""Helpers of the objectives with targets: attach targets to examples, check places in documents, weigh words by TF-IDF."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mlopt.errors import ArgumentError
from mlopt.imports import import_optional

from ...files import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..batches import Example

__all__ = ["attach", "import_extra", "require_places", "tfidf"]


def import_extra(module: str) -> Any:
    """Import a module that the extra `text` installs."""
    return import_optional(module, "TapWeight on text", "'mlopt-torch[text]'")


def attach(corpus: Sequence[Example], key: str, targets: Iterable[Any], objective: str) -> None:
    """Set the entry `key` of each example to its target, a number or a tensor.

    Raises:
        ArgumentError: the corpus does not keep the entries that are attached to its examples.
    """
    for example, target in zip(corpus, targets, strict=True):
        example[key] = target
    if key not in corpus[0]:
        raise ArgumentError(
            f"{objective} attaches a target to each example, but this corpus, a {type(corpus).__name__}, creates its examples "
            "at each access; give a list of examples; for a datasets.Dataset, use from_dataset(dataset, label=None)"
        )


def require_places(corpus: Sequence[Example], objective: str) -> None:
    """Check that the examples are sentences with their places in documents.

    Raises:
        ArgumentError: an example lacks its place.
        DataError: every document is a single sentence.
    """
    if not all(example.keys() >= {"document", "position", "count"} for example in corpus):
        raise ArgumentError(
            f"{objective} needs sentences with their places in documents, but the corpus has none; pass "
            "read_corpus(path).sentences(), or --sentences on the command line"
        )
    if all(example["count"] < 2 for example in corpus):
        raise DataError(
            f"{objective}: every document of the corpus is a single sentence; give documents of several sentences with "
            "punctuation and capital letters, one a line"
        )


def tfidf(corpus: Sequence[Example], words: int, objective: str) -> Any:
    """Return the TF-IDF weights of the texts, a scipy sparse float32 matrix (M, at most `words`) with rows of length 1.

    The words are the most frequent ones that at least two texts have, without English stop words.

    Raises:
        DataError: there are fewer than two such words.
    """
    vectorizer = import_extra("sklearn.feature_extraction.text").TfidfVectorizer(
        max_features=words, min_df=2, stop_words="english", dtype=np.float32
    )
    try:
        weights = vectorizer.fit_transform([example["text"] for example in corpus])
    except ValueError:  # of scikit-learn, if no word is left
        weights = None
    if weights is None or weights.shape[1] < 2:
        raise DataError(
            f"{objective}: fewer than two words, not counting stop words, are in two texts of the corpus; give a larger corpus"
        )
    weights.sort_indices()
    return weights
