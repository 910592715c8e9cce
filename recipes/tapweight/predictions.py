"""Predictions, and the meaning of the outputs that they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

import attrs
import numpy as np
import torch

from mlopt.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Predictions", "Target"]


def _pairs(pairs: Sequence[Sequence[str]]) -> tuple[tuple[str, str], ...]:
    """Return pairs as tuples: JSON holds lists."""
    return tuple((negative, positive) for negative, positive in pairs)


@attrs.frozen(kw_only=True)
class Target:
    """The labels that a predictor predicts, and the meaning of its outputs.

    Attributes:
        form: "numbers"; "binary": two classes of each label; "classes": one of several classes.
        labels: the names of the labels; a single one for "classes".
        classes: the names of the classes of "classes", in the order of the outputs.
        pairs: the names of the negative and the positive class of each label of "binary".
        thresholds: the probability above which the positive class of "binary" is predicted, one for each label.
        mean: the mean that standardised outputs of "numbers" are relative to, in the unit of each label.
        std: the unit of standardised outputs of "numbers", in the unit of each label.
    """

    form: Literal["numbers", "binary", "classes"]
    labels: tuple[str, ...]
    classes: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = attrs.field(default=(), converter=_pairs)
    thresholds: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __attrs_post_init__(self) -> None:
        for name in {"numbers": ("mean", "std"), "binary": ("pairs", "thresholds")}.get(self.form, ()):
            if (count := len(getattr(self, name))) != len(self.labels):
                raise ArgumentError(f"{name} must have one entry for each of {len(self.labels)} labels; got {count}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the K outputs: the classes of "classes", else the labels."""
        return self.classes or self.labels

    def values(self, outputs: Tensor) -> Tensor:
        """Return numbers in the unit of the labels, or probabilities, in float64, of the outputs (N, K) of a head."""
        outputs = outputs.double()
        if self.form == "numbers":
            return outputs * outputs.new_tensor(self.std) + outputs.new_tensor(self.mean)
        return outputs.sigmoid() if self.form == "binary" else outputs.softmax(1)

    def scored(self, values: Tensor) -> Tensor:
        """Return the outputs (N, K) that metrics take for predicted values (N, K): the sign, or the largest, is the class."""
        if self.form == "numbers":
            return (values - values.new_tensor(self.mean)) / values.new_tensor(self.std)
        if self.form == "binary":
            return values - values.new_tensor(self.thresholds)
        return values.clamp(min=torch.finfo(values.dtype).tiny).log()

    def decided(self, values: NDArray[np.float64]) -> tuple[str, ...]:
        """Return the predicted classes for the probabilities (K,) of one example."""
        if self.form == "classes":
            return (self.classes[int(values.argmax())],)
        return tuple(
            pair[value > threshold]
            for pair, value, threshold in zip(self.pairs, values.tolist(), self.thresholds, strict=True)
        )

    @classmethod
    def binary(cls, labels: Sequence[str], pairs: Sequence[Sequence[str]] = ()) -> Self:
        """Return the target of two classes of each label, "0" and "1" if no names are given, with thresholds of 0.5."""
        count = len(labels)
        return cls(form="binary", labels=tuple(labels), pairs=pairs or [("0", "1")] * count, thresholds=(0.5,) * count)

    @classmethod
    def read(cls, content: dict[str, Any]) -> Self:
        """Return the target whose attributes a JSON file holds."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        return cls(**values)


@attrs.frozen(kw_only=True, eq=False)
class Predictions:
    """Predictions for N examples, in their order.

    Attributes:
        target: the labels.
        values: (N, K) numbers in the unit of the labels, or probabilities; means over the ensemble; NaN for an example that
            cannot be used.
        spread: (N, K) the sample standard deviation over the ensemble; None for a single model.
        reasons: the reason why an example cannot be used, for each example; empty if it can.
    """

    target: Target
    values: NDArray[np.float64]
    spread: NDArray[np.float64] | None
    reasons: tuple[str, ...]

    @property
    def decisions(self) -> list[tuple[str, ...]]:
        """The predicted classes of each example: a name for each label; none for numbers.

        They are empty texts for an example that cannot be used.
        """
        if self.target.form == "numbers":
            return [()] * len(self.values)
        unusable = ("",) * len(self.target.labels)
        return [
            unusable if reason else self.target.decided(row)
            for reason, row in zip(self.reasons, self.values, strict=True)
        ]

    @property
    def header(self) -> list[str]:
        """The names of the columns of `cells`."""
        numbers = self.target.form == "numbers"
        own, decided = ("predicted", ()) if numbers else ("probability", self.target.labels)
        names = [f"{name}_predicted" for name in decided] + [f"{name}_{own}" for name in self.target.names]
        return names + ([f"{name}_spread" for name in self.target.names] if self.spread is not None else [])

    @property
    def cells(self) -> list[list[str]]:
        """The predictions of each example as text: classes, numbers, spreads; empty cells for an example that cannot be used."""
        numbers = self.values if self.spread is None else np.concatenate([self.values, self.spread], axis=1)
        return [
            [""] * len(self.header) if reason else [*decided, *map(repr, row)]
            for reason, decided, row in zip(self.reasons, self.decisions, numbers.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.values)
