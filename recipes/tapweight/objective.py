"""The contract of a pretraining objective: a name, a head, a view of the batch, a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from mlopt.errors import ArgumentError, MloptError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from .encoder import Encoder


def check_rate(name: str, rate: float) -> float:
    """Return `rate`.

    Raises:
        ValueError: it is not a probability above 0 and below 1.
    """
    if not 0 < rate < 1:
        raise ArgumentError(f"{name} must be above 0 and below 1; got {rate!r}")
    return rate


class NotPreparedError(MloptError, RuntimeError):
    """An objective is used before its `prepare` has run."""


def prepared(value: Any, objective: object) -> Any:
    """Return a value that `Objective.prepare` set.

    Raises:
        NotPreparedError: `prepare` has not run.
    """
    if value is None:
        raise NotPreparedError(f"{type(objective).__name__}.prepare(corpus, seed) must run first")
    return value


class Objective(ABC):
    """One self-supervised loss L_k(theta) on unlabelled examples.

    The encoder is shared by all objectives; the head belongs to this one. All randomness of a view (masks,
    augmentations) is drawn from torch's global generator, so that it can be replayed.
    """

    #: The key of this objective in weights, history and results.
    name: str
    #: Sentences that a user should read, once the objective is prepared and its head is built.
    remarks: Sequence[str] = ()
    #: The number of evaluations of the encoder by `loss`, in batches.
    passes: int = 1

    def prepare(self, corpus: Sequence[Any], seed: int) -> None:  # noqa: B027 (most objectives need no preparation)
        """Read the whole corpus once, before training: attach targets to its examples, fit clusters, and so on."""

    @abstractmethod
    def head(self, encoder: Encoder) -> nn.Module:
        """Build this objective's own head, for an encoder of `encoder.width` features."""

    def view(self, batch: Any) -> Any:
        """Turn a batch of the corpus into the input of this objective, without changing `batch`."""
        return batch

    @abstractmethod
    def loss(self, encoder: Encoder, head: nn.Module, view: Any) -> Tensor:
        """Return the scalar loss of one view, a mean over the batch."""
