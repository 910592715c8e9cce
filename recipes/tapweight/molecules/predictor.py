"""The predictor of a run on molecules: properties of new molecules, from their SMILES."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import predictor
from ..examples import UnusableError
from .data import read_smiles
from .encoder import GINE
from .graphs import graph_of
from .joining import join

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch_geometric.data import Batch, Data

    from ..encoder import Encoder
    from ..predictions import Target

__all__ = ["Predictor", "linear_head"]

_HEAD = "head.safetensors"


def linear_head(width: int, outputs: int, dropout: float = 0.0) -> nn.Module:
    """Return a linear layer from the representation of a molecule (B, width) to outputs (B, outputs)."""
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(width, outputs))


class Predictor(predictor.Predictor):
    """Finetuned graph networks that predict properties of molecules.

    An encoder that is not a `GINE` is saved as its tensors; `load` reads a `GINE`.

    Example:
        >>> import csv
        >>> from mlopt.recipes import TapWeight
        >>> from mlopt.recipes.tapweight.molecules import GINE, MoleculeTask, Predictor, make_objective, read_corpus
        >>> from mlopt.recipes.tapweight.settings import Settings
        >>> rows = [("C" * length + end, length) for length in range(1, 13) for end in ("", "O", "N")]
        >>> with open("chains.csv", "w", newline="") as file:
        ...     csv.writer(file).writerows([("smiles", "length"), *rows])
        >>> task, corpus = MoleculeTask.from_csv("chains.csv", split="random"), read_corpus("chains.csv")
        >>> objectives, settings = [make_objective("masked_atoms"), make_objective("contrastive")], Settings(batch_size=8)
        >>> recipe = TapWeight(GINE(width=8, layers=1), objectives, task, corpus, settings=settings)
        >>> result = recipe.fit(steps=1, methods=["direct", "equal"], progress=False)
        >>> result.save("chains")
        >>> predictions = Predictor.load("chains").predict(["CCCO", "C1CC"])
        >>> predictions.header, predictions.reasons
        (['length_predicted'], ('', 'not valid SMILES'))
        >>> bool((predictions.values[0] == result.predict(["CCCO", "C1CC"]).values[0]).all())
        True
    """

    modality = "molecules"

    def __init__(
        self,
        members: Sequence[predictor.Member],
        target: Target,
        columns: Sequence[str] = ("smiles",),
        file_columns: Sequence[str] = (),
    ) -> None:
        super().__init__(members, target, columns, file_columns)

    def example(self, content: Any) -> Data:
        """Return the graph of a SMILES."""
        if isinstance(content, UnusableError):
            raise content
        if not isinstance(content, str):
            raise UnusableError(f"{content!r} is not text")
        return graph_of(content.strip())

    def collate(self, examples: list[Data]) -> Batch:
        """Join graphs into one disconnected graph."""
        return join(examples)

    def outputs(self, encoder: Encoder, head: nn.Module, batch: Batch) -> Tensor:
        """Return logits, or standardised predictions, (B, T)."""
        outputs: Tensor = head(encoder.pool(batch))
        return outputs

    def contents(self, example: Data) -> tuple[str, ...]:
        """Return the SMILES of a graph, if it has one."""
        return (example.smiles if "smiles" in example else "",)

    def read(self, file: str | os.PathLike[str], columns: Sequence[str] | None = None) -> list[Any]:
        """Return the SMILES of all rows of a file; see `read_corpus` for the kinds of files."""
        return read_smiles(file, columns[0] if columns else None, self.file_columns)

    def options(self) -> dict[str, Any]:
        """Return nothing: the encoder writes its own configuration."""
        return {}

    def save_member(self, encoder: Encoder, head: nn.Module, folder: Path) -> None:
        """Write the encoder, and the tensors of the head."""
        encoder.save(folder)
        save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, folder / _HEAD)

    @classmethod
    def load_member(cls, folder: Path, target: Target, options: dict[str, Any]) -> predictor.Member:
        """Return the encoder and the head."""
        encoder = GINE.load(folder)
        head = linear_head(encoder.width, len(target.names))
        head.load_state_dict(load_file(folder / _HEAD), assign=True)
        return encoder, head
