"""Self-supervised objectives for text, by name: a view of the batch, a head and a loss each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...names import chosen
from .contrastive import Contrastive
from .masked_tokens import MaskedTokens
from .random_labels import RandomLabels
from .replaced_tokens import ReplacedTokens
from .sentence_order import SentenceOrder

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from ...objective import Objective

__all__ = [
    "OBJECTIVES",
    "Contrastive",
    "MaskedTokens",
    "RandomLabels",
    "ReplacedTokens",
    "SentenceOrder",
    "make_objective",
]

OBJECTIVES: dict[str, Callable[[PreTrainedTokenizerBase], Objective]] = {
    MaskedTokens.name: MaskedTokens,
    Contrastive.name: lambda _: Contrastive(),
    SentenceOrder.name: lambda _: SentenceOrder(),
    ReplacedTokens.name: ReplacedTokens,
    RandomLabels.name: lambda _: RandomLabels(),
}


def make_objective(name: str, tokenizer: PreTrainedTokenizerBase) -> Objective:
    """Return the objective of that name, with its default settings.

    Args:
        name: one of `OBJECTIVES`.
        tokenizer: the tokenizer of the encoder.

    Raises:
        ValueError: no objective has that name (the message lists the names), or the objective does not support this tokenizer.
    """
    return chosen("objective", name, OBJECTIVES)(tokenizer)
