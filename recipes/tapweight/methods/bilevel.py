"""TapWeight with pretraining and finetuning merged into one level."""

from __future__ import annotations

from .two_levels import TwoLevels

__all__ = ["Bilevel"]


class Bilevel(TwoLevels):
    """Weights that are learned by two levels: one encoder is trained on sum_k lambda_k L_k + L_train.

    It is the ablation of the three levels. Pretraining and finetuning share one encoder, so nothing is coupled, and the
    training labels also train the encoder that is adapted.

    Source: Zhang, Somayajula & Xie, TMLR 2025 (arXiv 2410.10006), ablation.
    """

    name, title = "bilevel", "two levels"
    summary = (
        "Pretrained further with several objectives and the training loss of a task; the weights of the objectives were learned "
        "from its validation loss (the two-level ablation of Zhang, Somayajula & Xie, TMLR 2025, arXiv 2410.10006)."
    )
    trains_encoder = True
