"""Self-supervised objectives for text, by name: a view of the batch, a head and a loss each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...names import chosen
from .contrastive import Contrastive
from .keywords import Keywords
from .masked_tokens import MaskedTokens
from .random_labels import RandomLabels
from .replaced_tokens import ReplacedTokens
from .same_document import SameDocument
from .sections import Sections
from .sentence_length import SentenceLength
from .sentence_order import SentenceOrder
from .sentence_position import SentencePosition
from .shuffled_words import ShuffledWords
from .topic_clusters import TopicClusters

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from ...objective import Objective

__all__ = [
    "DEFAULT",
    "OBJECTIVES",
    "Contrastive",
    "Keywords",
    "MaskedTokens",
    "RandomLabels",
    "ReplacedTokens",
    "SameDocument",
    "Sections",
    "SentenceLength",
    "SentenceOrder",
    "SentencePosition",
    "ShuffledWords",
    "TopicClusters",
    "make_objective",
]

OBJECTIVES: dict[str, Callable[[PreTrainedTokenizerBase], Objective]] = {
    MaskedTokens.name: MaskedTokens,
    Contrastive.name: lambda _: Contrastive(),
    SentenceOrder.name: lambda _: SentenceOrder(),
    ReplacedTokens.name: ReplacedTokens,
    SentencePosition.name: lambda _: SentencePosition(),
    SameDocument.name: lambda _: SameDocument(),
    Sections.name: lambda _: Sections(),
    Keywords.name: lambda _: Keywords(),
    TopicClusters.name: lambda _: TopicClusters(),
    ShuffledWords.name: lambda _: ShuffledWords(),
    SentenceLength.name: lambda _: SentenceLength(),
    RandomLabels.name: lambda _: RandomLabels(),
}
#: The objectives of a run that names none. They need only the texts of a corpus.
DEFAULT = (MaskedTokens.name, Contrastive.name, SentenceOrder.name, ReplacedTokens.name)


def make_objective(name: str, tokenizer: PreTrainedTokenizerBase) -> Objective:
    """Return the objective of that name, with its default settings.

    Args:
        name: one of `OBJECTIVES`.
        tokenizer: the tokenizer of the encoder.

    Raises:
        ValueError: no objective has that name (the message lists the names), or the objective does not support this tokenizer.
    """
    return chosen("objective", name, OBJECTIVES)(tokenizer)
