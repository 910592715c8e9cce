"""Targets that are computed once for a corpus and attached to its graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mlopt.errors import ArgumentError

from ...files import DataError
from ..data import import_extra

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch_geometric.data import Data


def attach(corpus: Sequence[Data], name: str, compute: Callable[[], Tensor]) -> Tensor:
    """Attach one row of `compute()` to each graph as attribute `name`, unless all graphs have it already.

    Args:
        corpus: the graphs, M of them.
        name: the attribute. torch_geometric joins attributes by their names: none may hold "edge", "index" or "face".
        compute: returns the table, (M,) or (M, F).

    Returns:
        The table, freshly computed or gathered from the graphs.

    Raises:
        ValueError: the corpus is empty.
        ArgumentError: the corpus creates its graphs at each access, so nothing can be attached.
    """
    if not len(corpus):
        raise DataError("the corpus is empty")
    graphs = list(corpus)
    if all(name in graph for graph in graphs):
        return torch.cat([graph[name] for graph in graphs])
    table = compute()
    for graph, row in zip(graphs, torch.split(table, 1), strict=True):
        graph[name] = row.clone()  # a row of its own: a slice would carry the whole table when it is pickled
    if name not in corpus[0]:
        raise ArgumentError(f"{type(corpus).__name__} creates its graphs at each access; give a list of graphs")
    return table


def parse(corpus: Sequence[Data]) -> list[Any]:
    """Return the RDKit molecules of a corpus, from each graph's `smiles`.

    Raises:
        ImportError: RDKit is not installed.
        ValueError: a SMILES that RDKit refuses; the message gives its row.
    """
    chem = import_extra("rdkit.Chem")
    molecules = [chem.MolFromSmiles(graph.smiles) for graph in corpus]
    for row, molecule in enumerate(molecules):
        if molecule is None:
            raise DataError(f"molecule {row} of the corpus is not a SMILES that RDKit reads: {corpus[row].smiles!r}")
    return molecules


def varying_columns(table: Tensor, noun: str) -> list[int]:
    """Return the columns of `table` (M, F) that are not constant.

    Raises:
        ValueError: all are constant.
    """
    columns = (table != table[0]).any(0).nonzero().squeeze(1).tolist()
    if not columns:
        raise DataError(f"all {noun} are the same for the {len(table)} molecules of the corpus: nothing to predict")
    return columns
