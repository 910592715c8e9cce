"""The contract of an encoder: the network that is pretrained further and shared by the objectives and the task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_model
from torch import nn

from mlopt.files import saving

if TYPE_CHECKING:
    import os

    from torch import Tensor

__all__ = ["Encoder"]


class Encoder(nn.Module):
    """A network from batches to features. A subclass sets `width` and defines `forward(batch)`.

    Attributes:
        width: the number of features.
        card: entries for the head of the card that is saved beside an adapted encoder.

    Example:
        >>> import torch
        >>> from mlopt.recipes.tapweight.encoder import Encoder
        >>> class Linear(Encoder):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.width, self.layer = 4, torch.nn.Linear(3, 4)
        ...
        ...     def forward(self, batch):
        ...         return self.layer(batch)
        >>> Linear().pool(torch.ones(2, 3)).shape
        torch.Size([2, 4])
    """

    width: int

    def __init__(self) -> None:
        super().__init__()
        self.card: dict[str, str] = {}

    def pool(self, batch: Any) -> Tensor:
        """Return the features of each example, (B, width). By default these are what `forward` returns."""
        features: Tensor = self(batch)
        return features

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the encoder into a folder, which is made if it is missing; by default its tensors, to `model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with saving(folder):
            save_model(self, str(folder / "model.safetensors"))
