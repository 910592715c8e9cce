"""Joined graphs are those of torch_geometric."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.utils import from_smiles

from mlopt.recipes.tapweight.molecules.joining import join


def molecules(*smiles: str, **attributes: Any) -> list[Data]:
    graphs = [from_smiles(string) for string in smiles]
    for row, graph in enumerate(graphs):
        for name, value in attributes.items():
            graph[name] = value(row)
    return graphs


def assert_same(joined: Batch, expected: Batch) -> None:
    assert type(joined) is type(expected)
    assert joined.num_graphs == expected.num_graphs
    for own, other in (
        (joined.to_dict(), expected.to_dict()),
        (joined._slice_dict, expected._slice_dict),
        (joined._inc_dict, expected._inc_dict),
    ):
        assert own.keys() == other.keys()
        for key, value in other.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(own[key], value, rtol=0, atol=0, equal_nan=True)
            else:
                assert own[key] == value


@pytest.mark.parametrize(
    "graphs",
    [
        molecules(
            "CCO",
            "C",
            "c1ccccc1",
            y=lambda row: torch.tensor([[row, torch.nan]]),
            clusters=lambda row: torch.tensor([row]),
        ),
        molecules("C", "[Na+]"),
        molecules("", "CO", ""),
        molecules("CO"),
        molecules("CO", "C", number=float),
        molecules("CO", "C", scalar=torch.tensor),
        molecules("CO", "CN", atom_index=lambda row: torch.tensor([row, 1])),
        molecules("CO", "CN", parts=lambda row: {"one": torch.tensor([row])}),
    ],
    ids=["targets", "no bonds", "no atoms", "one", "numbers", "scalars", "indices", "dictionaries"],
)
def test_join_equals_torch_geometric(graphs: list[Data]) -> None:
    joined = join(graphs)
    if isinstance(joined.get("parts"), dict):
        assert joined.parts["one"].tolist() == [0, 1]
    else:
        assert_same(joined, Batch.from_data_list(graphs))
    for own, graph in zip(joined.to_data_list(), graphs, strict=True):
        assert torch.equal(own.edge_index, graph.edge_index)
        assert torch.equal(own.x, graph.x)


def test_join_leaves_the_graphs_as_they_are() -> None:
    graphs = molecules("CCO", "CN")
    before = [graph.clone() for graph in graphs]
    join(graphs).edge_index.fill_(7)
    assert all(torch.equal(graph.edge_index, own.edge_index) for graph, own in zip(graphs, before, strict=True))
