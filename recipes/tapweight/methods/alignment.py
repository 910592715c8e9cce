"""Weights from the alignment of each objective's gradient with the gradient of the task's loss."""

from __future__ import annotations

from .two_levels import TwoLevels

__all__ = ["Alignment"]


class Alignment(TwoLevels):
    """Weights that follow <grad L_k, grad L_valid>: the objective whose step lowers the validation loss most gains weight.

    Both gradients are by the encoder at the same theta. The validation loss is measured through a head of its own, which is
    trained on the training labels at the same time and passes no gradient to the encoder. To first order in the learning rate
    eta, -eta <grad L_k, grad L_valid> is the derivative by lambda_k of the validation loss after one step.

    Differences from the source: the training loss of the task is not among the losses of the encoder, since finetuning follows;
    the head takes one step for each step of the encoder, instead of a new head at each step.

    Source: Dery, Michel, Talwalkar & Neubig, ICLR 2022 (arXiv 2109.07437), META-TARTAN.
    """

    name, title = "alignment", "gradient alignment"
    summary = (
        "Pretrained further with several objectives, whose weights follow the alignment of their gradients with that of the "
        "validation loss of a task (Dery et al., ICLR 2022, arXiv 2109.07437)."
    )
    trains_encoder = False
