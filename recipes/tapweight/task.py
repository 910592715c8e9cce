"""The contract of a downstream task: splits of labelled examples, a head, a loss, a metric."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.utils.data import DataLoader

from mlopt.problem import to_device

from .files import DataError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

    import torchmetrics
    from torch import Tensor, nn

    from .encoder import Encoder
    from .examples import Skipped
    from .labels import Form
    from .predictor import Member, Predictor

Split = Literal["train", "valid", "test"]
ClassWeights = Literal["none", "balanced"]
#: Examples of a split that are scored at once.
SCORED_AT_ONCE = 256


class Task(ABC):
    """A supervised task on top of an encoder.

    Args:
        splits: the labelled examples of "train", "valid" and "test".
    """

    #: Name of the metric that `metric()` computes, as it appears in results ("roc_auc", "rmse", ...).
    metric_name: str
    #: True if a larger metric is better.
    greater_is_better: bool
    #: Sentences on the data that a user should read.
    remarks: Sequence[str] = ()
    #: The rows that were left out of each file.
    skipped: Sequence[tuple[str, Sequence[Skipped]]] = ()
    #: A word for the examples.
    noun: str = "examples"

    def __init__(self, splits: Mapping[Split, Sequence[Any]]) -> None:
        self.splits = splits

    @abstractmethod
    def collate(self, examples: list[Any]) -> Any:
        """Join examples into a batch that the encoder takes."""

    @abstractmethod
    def head(self, encoder: Encoder) -> nn.Module:
        """Build the task's head, for an encoder of `encoder.width` features."""

    @abstractmethod
    def outputs(self, encoder: Encoder, head: nn.Module, batch: Any) -> Tensor:
        """Return the head's outputs, one row an example: logits, or standardised predictions."""

    @abstractmethod
    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the loss of each example (B,); the mean of this is the training loss."""

    @abstractmethod
    def columns(self, batch: Any) -> Tensor:
        """Return the numbers (B, T) that a least-squares head predicts; NaN if missing.

        They are standardised labels, or 1 and 0 for classes.
        """

    @abstractmethod
    def metric(self) -> torchmetrics.Metric:
        """Return a fresh metric whose `update(outputs, targets)` takes the outputs and `targets(batch)`."""

    @abstractmethod
    def targets(self, batch: Any) -> Tensor:
        """Return the labels of a batch, in the shape that the metric takes."""

    def keys(self, split: Split) -> Sequence[Hashable]:
        """Return the identity of each example of a split; by default each example has its own.

        Examples of one key are one example that is listed more than once: it is left out as a whole, and drawn as a whole.
        """
        return [(split, index) for index in range(len(self.splits[split]))]

    def predictor(self, members: Sequence[Member]) -> Predictor | None:
        """Return the predictor of finetuned models; None if the task defines none, then results hold no predictor.

        Args:
            members: encoders with heads that `head` built.
        """
        return None

    def introduction(self) -> str:
        """Return a clause on the target, the metric and the sizes of the splits."""
        sizes = ", ".join(f"{len(examples)} {split}" for split, examples in self.splits.items())
        return f"{self.subject()}, scored by {self.metric_name}; {self.noun}: {sizes}"

    def subject(self) -> str:
        """Return a phrase for the target of the prediction."""
        return type(self).__name__

    def loader(self, split: Split, batch_size: int, *, shuffle: bool = False) -> Iterable[Any]:
        """Return batches of one split; if the order is shuffled, a last batch that is not full is left out."""
        examples: Any = self.splits[split]
        drop = shuffle and len(examples) > batch_size
        return DataLoader(examples, batch_size=batch_size, shuffle=shuffle, drop_last=drop, collate_fn=self.collate)

    def score(self, encoder: Encoder, head: nn.Module, split: Split, batch_size: int = SCORED_AT_ONCE) -> float:
        """Return the metric of one split, in eval mode and without gradients; the modes are restored."""
        metric = self.metric()
        for part in metric.modules():
            # Each process scores whole splits; torchmetrics would join their rows.
            part.distributed_available_fn = lambda: False  # type: ignore[assignment]
        for outputs, targets in self._predicted(encoder, head, split, batch_size):
            metric.to(outputs.device).update(outputs, targets)
        return float(metric.compute())

    def evaluate(
        self, encoder: Encoder, head: nn.Module, split: Split, batch_size: int = SCORED_AT_ONCE
    ) -> dict[str, dict[str, float]]:
        """Return every metric of one split that is defined, by task and by name; as `score` does."""
        outputs, targets = zip(*self._predicted(encoder, head, split, batch_size), strict=True)
        return self.measures(torch.cat(outputs).cpu(), torch.cat(targets).cpu())

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, dict[str, float]]:
        """Return every metric that is defined for the outputs and the targets of a split, by task and by name."""
        return {}

    def _predicted(
        self, encoder: Encoder, head: nn.Module, split: Split, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the outputs and the targets of each batch of a split, in eval mode."""
        parameters = (parameter for module in (encoder, head) for parameter in module.parameters())
        device = next(parameters).device
        with evaluation(encoder), evaluation(head), torch.no_grad():
            for batch in self.loader(split, batch_size):
                batch = to_device(batch, device)
                yield self.outputs(encoder, head, batch), self.targets(batch)


def check_class_weights(class_weights: ClassWeights, form: Form) -> ClassWeights:
    """Return the way of weighing classes, after checking that there are classes if they are to be weighed.

    Raises:
        DataError: there are none, or the way is unknown.
    """
    if class_weights not in get_args(ClassWeights):
        raise DataError(f"class_weights={class_weights!r}; give 'none' or 'balanced'")
    if class_weights == "balanced" and form not in ("binary", "classes"):
        given = "numbers" if form == "numbers" else "several classes at once"
        raise DataError(
            f"class_weights='balanced' needs classes, but the labels are {given}; give --class-weights none"
        )
    return class_weights


def balanced_weights(counts: Tensor) -> Tensor:
    """Return the weight N / (C N_c) of each class, so that all classes count the same; 0 for a class without examples.

    Args:
        counts: the examples N_c of each of C classes, (C, ...); N is their sum.

    Example:
        >>> import torch
        >>> from mlopt.recipes.tapweight.task import balanced_weights
        >>> balanced_weights(torch.tensor([1, 3]))
        tensor([2.0000, 0.6667])
    """
    weights = counts.sum(0) / (len(counts) * counts.clamp(min=1))
    return torch.where(counts > 0, weights, 0)


@contextlib.contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode; on exit, restore the mode of each of its parts."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
