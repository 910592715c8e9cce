"""The coupling of two encoders, by default gamma ||omega - theta||^2, and its products as the regularizer of a level."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import l1_loss, mse_loss

from mlopt.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from ..encoder import Encoder
    from ..models import Finetuning, Pretraining

__all__ = ["DISTANCES", "Coupling", "Proximal"]

#: Distances of two tensors by name: the squared Euclidean distance, and the sum of the absolute differences.
DISTANCES = {"l2": mse_loss, "l1": l1_loss}


class Proximal:
    """gamma ||omega - theta||^2 over the trainable parameters that two encoders share by name.

    Its second derivatives are constants, 2 gamma I and -2 gamma I: as a level's regularizer it lets a cotangent be pulled
    back without a pass through a network. Those of the distance "l1" are zero almost everywhere.

    Args:
        encoder: an encoder of the architecture that both have.
        gamma: strength of the coupling.
        distance: a key of `DISTANCES`.

    Raises:
        ValueError: the encoder has no trainable parameter.
    """

    def __init__(self, encoder: Encoder, gamma: float, distance: str = "l2") -> None:
        self.gamma, self.distance, self._distance = gamma, distance, DISTANCES[distance]
        # Read once: within the transforms of torch.func, `requires_grad` is False for every parameter.
        self.names = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
        if not self.names:
            raise ArgumentError(
                "Proximal: the encoder has no trainable parameter, so nothing couples the two; unfreeze some"
            )

    def __call__(self, encoder: Encoder, anchor: Encoder) -> Tensor:
        """Return the coupling of omega, held by `encoder`, and theta, held by `anchor`; a scalar."""
        own, other = dict(encoder.named_parameters()), dict(anchor.named_parameters())
        distances = [self._distance(own[name], other[name], reduction="sum") for name in self.names]
        return self.gamma * torch.stack(distances).sum()


class Coupling:
    """A `Proximal` as the regularizer of the level "finetuning", with reference to the level "pretraining".

    With the squared distance, its second derivatives are 2 gamma I for each level alone, and -2 gamma I between the two: it
    supplies products with them. With another distance, it has none.

    Args:
        proximal: the coupling of the encoders.
        finetuning: omega and the task's head.
        pretraining: theta and the objectives' heads.
    """

    #: Products with the second derivatives, see `mlopt.Level.regularizer`; None if the distance is not the squared one.
    product: Callable[[Mapping[str, Sequence[Tensor]], Sequence[str]], dict[str, list[Tensor | None]]] | None

    def __init__(self, proximal: Proximal, finetuning: Finetuning, pretraining: Pretraining) -> None:
        self._proximal = proximal
        self._trained = {"finetuning": _trained(finetuning), "pretraining": _trained(pretraining)}
        self._shared = [f"encoder.{name}" for name in proximal.names]
        self.product = self._product if proximal.distance == "l2" else None

    def __call__(self, own: Finetuning, *, pretraining: Pretraining) -> Tensor:
        return self._proximal(own.encoder, pretraining.encoder)

    def _product(
        self, direction: Mapping[str, Sequence[Tensor]], wanted: Sequence[str]
    ) -> dict[str, list[Tensor | None]]:
        factors = {"finetuning": 2 * self._proximal.gamma, "pretraining": -2 * self._proximal.gamma}
        total: list[Tensor] = []
        for level, vectors in direction.items():
            named = dict(zip(self._trained[level], vectors, strict=True))
            scaled = torch._foreach_mul([named[name] for name in self._shared], factors[level])
            total = list(torch._foreach_add(total, scaled)) if total else list(scaled)
        product: dict[str, list[Tensor | None]] = {}
        for level in wanted:
            signed = total if level == "finetuning" else torch._foreach_neg(total)
            shared = dict(zip(self._shared, signed, strict=True))
            product[level] = [shared.get(name) for name in self._trained[level]]
        return product


def _trained(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]
