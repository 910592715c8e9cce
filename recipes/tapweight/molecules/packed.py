"""Graphs of many molecules: computed by several processes, and kept in the cache as a few long tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..examples import UnusableError
from .cache import FEWEST, cached
from .graphs import graph_of, import_extra
from .workers import by_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor
    from torch_geometric.data import Data

__all__ = ["graphs_of"]


def graphs_of(smiles: Sequence[str]) -> Iterator[Data | UnusableError]:
    """Yield the graph of each molecule, as `graph_of` returns it; or the error that it raises.

    Args:
        smiles: the molecules; of fewer than `cache.FEWEST`, each graph is computed when it is asked for.
    """
    if len(smiles) < FEWEST:
        yield from map(_graph_or_error, smiles)
        return
    packed = cached("graphs", smiles, lambda: _joined(by_chunks(_chunk, smiles, "graphs")))
    lengths = {"x": "atoms", "edge_index": "bonds", "edge_attr": "bonds"}
    parts = zip(*(torch.split(packed[name], packed[of].tolist()) for name, of in lengths.items()), strict=True)
    data = import_extra("torch_geometric.data").Data
    for text, (x, edge_index, edge_attr) in zip(smiles, parts, strict=True):
        if len(x):
            # A copy of each part: a slice would carry the whole tensor when it is pickled.
            yield data(x=x.long(), edge_index=edge_index.long().T.contiguous(), edge_attr=edge_attr.long(), smiles=text)
        else:
            yield _graph_or_error(text)


def _graph_or_error(smiles: str) -> Data | UnusableError:
    try:
        return graph_of(smiles)
    except UnusableError as error:
        return error


def _chunk(first: int, smiles: Sequence[str]) -> dict[str, Any]:
    """Return the graphs of some molecules, joined; no atoms for a row without a graph, or with an atom map."""
    empty = import_extra("torch_geometric.data").Data(
        x=torch.zeros(0, 9), edge_index=torch.zeros(2, 0), edge_attr=torch.zeros(0, 3)
    )
    graphs = [_graph_or_error(text) for text in smiles]
    kept = [
        empty if isinstance(graph, UnusableError) or graph.smiles != text else graph
        for graph, text in zip(graphs, smiles, strict=True)
    ]
    tables = {
        "atoms": torch.tensor([len(graph.x) for graph in kept]),
        "bonds": torch.tensor([len(graph.edge_attr) for graph in kept]),
        "x": torch.cat([graph.x for graph in kept]),
        "edge_index": torch.cat([graph.edge_index.T for graph in kept]),
        "edge_attr": torch.cat([graph.edge_attr for graph in kept]),
    }
    small = ("x", "edge_attr")  # codes of features, all below 256
    return {name: table.to(torch.uint8 if name in small else torch.int32).numpy() for name, table in tables.items()}


def _joined(chunks: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.cat([torch.from_numpy(chunk[name]) for chunk in chunks]) for name in chunks[0]}
