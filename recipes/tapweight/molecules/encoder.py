"""A graph network for molecules: GINE on torch_geometric's atom and bond features."""

from __future__ import annotations

import itertools
import json
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch_geometric.nn import BatchNorm, GINEConv, global_add_pool, global_mean_pool
from torch_geometric.utils.smiles import e_map, x_map

from mlopt.errors import ArgumentError
from mlopt.files import replacing, saving
from mlopt.validation import is_whole

from ..encoder import Encoder
from ..files import DataError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch_geometric.data import Batch

#: The number of values of each of the 9 atom features, and of each of the 3 bond features, of `from_smiles`.
ATOM_SIZES: dict[str, int] = {name: len(values) for name, values in x_map.items()}
BOND_SIZES: dict[str, int] = {name: len(values) for name, values in e_map.items()}
#: The mask token of each feature: the index after its last value.
ATOM_MASK = torch.tensor(list(ATOM_SIZES.values()))
BOND_MASK = torch.tensor(list(BOND_SIZES.values()))

#: The most rows of a table of combinations.
_COMBINATIONS = 512

_FORMAT, _VERSION = "mlopt-gine", 1
_TENSORS, _CONFIG = "model.safetensors", "config.json"


class FeatureEmbedding(nn.Module):
    """Sum of the embeddings of several categorical features, each with a mask token after its last value.

    Features next to each other are looked up together, in a table of the sums of all their combinations, as long as there are
    few combinations: a lookup, and even more its derivative, costs more than such a table.

    Args:
        sizes: the number of values of each feature, without the mask token.
        width: the size of an embedding.
    """

    def __init__(self, sizes: Mapping[str, int], width: int) -> None:
        super().__init__()
        self.sizes = dict(sizes)
        self.tables = nn.ModuleList(nn.Embedding(size + 1, width) for size in sizes.values())
        self._groups = _group([size + 1 for size in sizes.values()])

    def forward(self, features: Tensor) -> Tensor:
        """Embed `features` (N, F) as (N, width).

        Raises:
            ValueError: a wrong shape, or a value outside a feature's vocabulary. Values are checked on the CPU only:
                elsewhere the check would wait for the device, whose own assertion stops the run.
        """
        return self.look_up(self.encode(features))

    def encode(self, features: Tensor) -> list[Tensor]:
        """Return the number of the combination in each group of features, (N,); the same for all embeddings of these features.

        Raises:
            ValueError: as `forward`.
        """
        if features.dim() != 2 or features.shape[1] != len(self.sizes):
            raise ArgumentError(
                f"features must be (N, {len(self.sizes)}): {[*self.sizes]}; got {tuple(features.shape)}"
            )
        columns, rows = features.unbind(1), [size + 1 for size in self.sizes.values()]
        try:
            return [_number(columns[group], rows[group]) for group in self._groups]
        except IndexError as error:
            raise self._refusal(features) from error

    def look_up(self, codes: Sequence[Tensor]) -> Tensor:
        """Embed what `encode` returned as (N, width)."""
        tables: list[Any] = [table.weight for table in self.tables]
        # The derivative of index_select costs a third of that of nn.functional.embedding.
        rows = [
            reduce(_cross, tables[group]).index_select(0, code) for group, code in zip(self._groups, codes, strict=True)
        ]
        total: Tensor = reduce(torch.add, rows)
        return total

    def _refusal(self, features: Tensor) -> ArgumentError:
        """Name the feature and its values: the message of the lookup itself does not."""
        lowest, highest = features.amin(0).tolist(), features.amax(0).tolist()
        name, size, low, high = next(
            (name, size, low, high)
            for (name, size), low, high in zip(self.sizes.items(), lowest, highest, strict=True)
            if low < 0 or high > size
        )
        return ArgumentError(
            f"feature {name!r} has values from {low} to {high}, but its vocabulary is 0 to {size - 1} "
            f"({size} is the mask token): build graphs with torch_geometric.utils.from_smiles"
        )


def _group(rows: Sequence[int]) -> list[slice]:
    """Return the fewest runs of features with at most `_COMBINATIONS` combinations each, a feature alone with any number.

    Args:
        rows: the number of rows of each feature's table.
    """
    starts, combinations = [0], rows[0]
    for column, count in enumerate(rows[1:], start=1):
        combinations *= count
        if combinations > _COMBINATIONS:
            starts.append(column)
            combinations = count
    return [slice(start, stop) for start, stop in itertools.pairwise([*starts, len(rows)])]


def _number(columns: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Return the row of each combination in the table that `_cross` builds of tables with `rows` rows."""
    stride, parts = 1, []
    for column, count in zip(reversed(columns), reversed(rows), strict=True):
        # A lookup in place of a product: it fails on every device if the value is outside the vocabulary.
        parts.append(torch.arange(0, count * stride, stride, device=column.device).index_select(0, column))
        stride *= count
    return reduce(torch.add, parts)


def _cross(table: Tensor, other: Tensor) -> Tensor:
    """Return the sums of each row of the first table and each row of the second, (R * S, width)."""
    return (table[:, None] + other).flatten(0, 1)


class Convolution(GINEConv):  # type: ignore[misc]
    """torch_geometric's GINEConv, with the sum computed directly in place of general message passing.

    MLP((1 + eps) h_i + sum_j relu(h_j + e_ij))
    """

    def forward(self, nodes: Tensor, edges: Tensor, bonds: Tensor) -> Tensor:
        """Return the updates of `nodes` (N, width), given `edges` (2, E) and the embeddings of their bonds (E, width)."""
        messages = (nodes.index_select(0, edges[0]) + bonds).relu()
        # eps also promotes nodes that autocast computed in fewer bits to the type of the messages.
        update: Tensor = self.nn(((1 + self.eps) * nodes).index_add(0, edges[1], messages))
        return update


class GINE(Encoder):
    """Graph isomorphism network with edge features, over the atoms and bonds of `torch_geometric.utils.from_smiles`.

    Each layer computes

        h_i <- norm(MLP(h_i + sum_j relu(h_j + e_ij)))

    with a ReLU between layers. h starts as the sum of an atom's feature embeddings; e_ij is the sum of a bond's feature
    embeddings, from tables of each layer's own.

    `norm="batch"` in training mode moves running statistics, which bare torch.func transforms refuse. It
    normalises a batch of a single atom by its running statistics, since such a batch has no variance.

    Args:
        width: the size of node and graph embeddings.
        layers: the number of message-passing layers.
        dropout: the probability of dropping a feature after each layer.
        norm: "batch" or "layer".
        pooling: "mean" or "sum" of the node embeddings of a molecule.
        residual: add each layer's input to its output.

    Raises:
        ValueError: an argument out of its range.

    Source: Hu et al., "Strategies for Pre-training Graph Neural Networks", ICLR 2020.
    """

    def __init__(
        self,
        width: int = 128,
        layers: int = 4,
        dropout: float = 0.0,
        norm: Literal["batch", "layer"] = "batch",
        pooling: Literal["mean", "sum"] = "mean",
        residual: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("layers", layers)):
            if not is_whole(value, 1):
                raise ArgumentError(f"{name} must be a whole number of at least 1; got {value!r}")
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ArgumentError(f"dropout must be at least 0 and below 1; got {dropout!r}")
        self.config: dict[str, Any] = {
            "width": width,
            "layers": layers,
            "dropout": dropout,
            "norm": norm,
            "pooling": pooling,
            "residual": residual,
        }
        self.width = width
        self.residual = residual
        self._pooling = _choose("pooling", pooling, {"mean": global_mean_pool, "sum": global_add_pool})
        normalise = _choose("norm", norm, {"batch": _batch_norm, "layer": nn.LayerNorm})
        self.atoms = FeatureEmbedding(ATOM_SIZES, width)
        self.bonds: Any = nn.ModuleList(FeatureEmbedding(BOND_SIZES, width) for _ in range(layers))
        self.convolutions = nn.ModuleList(Convolution(_mlp(width)) for _ in range(layers))
        self.norms = nn.ModuleList(normalise(width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: Batch) -> Tensor:
        """Return the embeddings of all atoms of a batch, (N, width)."""
        nodes: Tensor = self.atoms(batch.x)
        codes = self.bonds[0].encode(batch.edge_attr)
        last = len(self.convolutions) - 1
        for layer, (bonds, convolve, norm) in enumerate(zip(self.bonds, self.convolutions, self.norms, strict=True)):
            update = norm(convolve(nodes, batch.edge_index, bonds.look_up(codes)))
            update = self.dropout(update if layer == last else update.relu())
            nodes = nodes + update if self.residual else update
        return nodes

    def pool(self, batch: Batch) -> Tensor:
        """Return the representations of all molecules of a batch, (B, width)."""
        pooled: Tensor = self._pooling(self(batch), batch.batch, size=batch.num_graphs)
        return pooled

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `model.safetensors` and `config.json`, which `GINE.load` reads, into `folder` (made if missing)."""
        folder = Path(folder)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        config = json.dumps({"format": _FORMAT, "version": _VERSION, **self.config}, indent=2) + "\n"
        with saving(folder), replacing(folder / _TENSORS) as staged:
            save_file(tensors, staged)
        with replacing(folder / _CONFIG) as staged:
            staged.write_text(config, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> GINE:
        """Return the network that `save` wrote, bit for bit, on the CPU and in training mode.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: the config is not one of this class and version, or the tensors do not fit it.
        """
        folder = Path(folder)
        for name in (_CONFIG, _TENSORS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}; give a folder that GINE.save wrote")
        network = cls(**_read_config(folder / _CONFIG))
        # Copies, since the loaded tensors may be views of the file.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / _TENSORS).items()}
        try:
            network.load_state_dict(tensors, assign=True)  # keeps the dtype of the file
        except RuntimeError as error:
            raise DataError(
                f"{folder / _TENSORS} does not fit {folder / _CONFIG} ({error}); save the encoder again"
            ) from error
        return network


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


def _batch_norm(width: int) -> BatchNorm:
    return BatchNorm(width, allow_single_element=True)


def _choose(argument: str, key: str, choices: Mapping[str, Any]) -> Any:
    if key not in choices:
        raise ArgumentError(f"{argument} must be one of {', '.join(map(repr, choices))}; got {key!r}")
    return choices[key]


def _read_config(file: Path) -> dict[str, Any]:
    """Return the constructor's arguments, after checking that the file is one that `GINE.save` wrote."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}); save the encoder again") from error
    if not isinstance(config, dict) or config.pop("format", None) != _FORMAT:
        raise DataError(
            f'{file} is not the config of a GINE: it lacks "format": "{_FORMAT}"; give a folder that GINE.save wrote'
        )
    version = config.pop("version", None)
    if version != _VERSION:
        raise DataError(
            f"{file} has version {version!r}; this release reads version {_VERSION}; install the release that wrote it"
        )
    expected = ("width", "layers", "dropout", "norm", "pooling", "residual")
    _compare_keys(file, config, expected)
    return config


def _compare_keys(file: Path, config: Mapping[str, Any], expected: Sequence[str]) -> None:
    unknown, missing = sorted(config.keys() - set(expected)), sorted(set(expected) - config.keys())
    if unknown or missing:
        raise DataError(f"{file} has unknown keys {unknown} and lacks keys {missing}; it needs {[*expected]}")
