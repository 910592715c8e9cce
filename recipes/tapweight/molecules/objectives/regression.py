"""The regression of numbers that are computed from molecules: standardised, and known or not."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...objective import Objective, prepared
from .targets import attach, varying_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch_geometric.data import Batch, Data

    from ...encoder import Encoder

# The standardised value of a number that differs in one molecule of 20,000 is 141, and its square rules the batch.
_RARE = 0.01


class Regression(Objective):
    """Mean squared error of the numbers t_ij of each molecule or atom i, standardised over the corpus.

    With mu_j and sigma_j the mean and the deviation of number j, h_i the embedding, and the mean over known numbers,

        loss = mean_ij (head(h_i)_j - (t_ij - mu_j) / sigma_j)^2

    NaN marks an unknown number. Numbers that are the same for more than 99% of the corpus are left out. A batch without
    known numbers has loss zero, with zero gradients.

    Attributes:
        key: the attribute of a graph that holds its numbers.
        noun: the plural of the numbers, for errors.
    """

    key: str
    noun: str
    #: The numbers that vary; None before `prepare`.
    columns: list[int] | None = None

    @abstractmethod
    def table(self, corpus: Sequence[Data]) -> Tensor | list[Tensor]:
        """Return the numbers of the corpus as `targets.attach` takes them."""

    def scaled(self, table: Tensor) -> Tensor:
        """Return the numbers to predict, from those attached to graphs."""
        return table

    def embed(self, encoder: Encoder, view: Batch) -> Tensor:
        """Return the embeddings from which the numbers are predicted, one for each row of the table."""
        return encoder.pool(view)

    def prepare(self, corpus: Sequence[Data], seed: int) -> None:
        """Attach the numbers to each graph, and measure their means and deviations.

        Raises:
            ValueError: no number varies over the corpus.
        """
        table = self.scaled(attach(corpus, self.key, lambda: self.table(corpus)).double())
        self.columns = varying_columns(table, self.noun, _RARE)
        varying = table[:, self.columns]
        self.mean = varying.nanmean(0)
        self.deviation = (varying - self.mean).square().nanmean(0).sqrt()

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to the numbers that vary."""
        return nn.Linear(encoder.width, len(prepared(self.columns, self)))

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the known numbers, zero if there are none."""
        predicted: Tensor = head(self.embed(encoder, view))
        # Under autocast, predictions have fewer bits than the numbers need.
        working = torch.promote_types(predicted.dtype, torch.float32)
        numbers = self.scaled(view[self.key][:, self.columns].to(working))
        expected = (numbers - self.mean.to(numbers)) / self.deviation.to(numbers)
        known = ~expected.isnan()
        # Not mse_loss: torch 2.13 cannot take a forward-mode derivative of the gradient of its mean.
        errors = torch.where(known, predicted - expected.nan_to_num(), 0.0)
        return errors.square().sum() / known.sum().clamp(min=1)
