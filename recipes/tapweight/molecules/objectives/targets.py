"""Targets that are computed once for a corpus and attached to its graphs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from mlopt.errors import ArgumentError

from ...files import DataError
from ..cache import cached
from ..graphs import import_extra
from ..workers import by_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch_geometric.data import Data

F = TypeVar("F", bound="Callable[..., Any]")


def attach(corpus: Sequence[Data], name: str, compute: Callable[[], Tensor | list[Tensor]]) -> Tensor:
    """Attach the targets of each graph to it as attribute `name`, unless all graphs have it already.

    Args:
        corpus: the graphs, M of them.
        name: the attribute. torch_geometric joins attributes by their names: none may hold "edge", "index" or "face".
        compute: returns a table with a row for each graph, (M,) or (M, F), or, for targets of atoms, a list of M tensors
            with a row for each atom.

    Returns:
        The table of all rows, freshly computed or gathered from the graphs.

    Raises:
        ValueError: the corpus is empty, or a graph has other atoms than its SMILES.
        ArgumentError: the corpus creates its graphs at each access, so nothing can be attached.
    """
    if not len(corpus):
        raise DataError("the corpus is empty; give at least two molecules")
    graphs = list(corpus)
    if all(name in graph for graph in graphs):
        return torch.cat([graph[name] for graph in graphs])
    computed = compute()
    if isinstance(computed, list):
        _check_atoms(graphs, computed)
    for graph, row in zip(graphs, computed if isinstance(computed, list) else torch.split(computed, 1), strict=True):
        graph[name] = row.clone()  # a row of its own: a slice would carry the whole table when it is pickled
    if name not in corpus[0]:
        raise ArgumentError(f"{type(corpus).__name__} creates its graphs at each access; give a list of graphs")
    return torch.cat(computed) if isinstance(computed, list) else computed


def _check_atoms(graphs: Sequence[Data], rows: Sequence[Tensor]) -> None:
    for number, (graph, row) in enumerate(zip(graphs, rows, strict=True)):
        if graph.num_nodes != len(row):
            raise DataError(
                f"molecule {number} of the corpus has {graph.num_nodes} atoms, but RDKit reads {len(row)} from its SMILES, "
                f"{graph.smiles!r}: build graphs with torch_geometric.utils.from_smiles, without hydrogens"
            )


def kept(function: F) -> F:
    """Decorate a function of a corpus and settings: its table, as `attach` takes it, is kept in the cache.

    The name of the function, the settings and the SMILES must determine the table.
    """

    @functools.wraps(function)
    def wrapped(corpus: Sequence[Data], *settings: Any) -> Tensor | list[Tensor]:
        def compute() -> dict[str, Tensor]:
            table = function(corpus, *settings)
            if isinstance(table, list):
                return {"rows": torch.cat(table), "lengths": torch.tensor([len(rows) for rows in table])}
            return {"table": table}

        tensors = cached(f"{function.__name__} {settings}", [graph.smiles for graph in corpus], compute)
        if "table" in tensors:
            return tensors["table"]
        return list(torch.split(tensors["rows"], tensors["lengths"].tolist()))

    return cast("F", wrapped)


def by_molecule(
    function: Callable[[list[Any]], Tensor | list[Tensor]], corpus: Sequence[Data], noun: str
) -> list[Tensor]:
    """Return the tables of consecutive parts of a corpus, computed in several processes.

    Args:
        function: takes molecules of RDKit, and returns a table with a row for each, or a list with a tensor for each.
        corpus: the molecules.
        noun: the plural of what is computed, for the progress bar.

    Raises:
        ValueError: a SMILES that RDKit refuses; the message gives its row.
    """
    chunks = by_chunks(functools.partial(_chunk, function), [graph.smiles for graph in corpus], noun)
    return [torch.from_numpy(table) for tables in chunks for table in tables]


def _chunk(function: Callable[[list[Any]], Tensor | list[Tensor]], first: int, smiles: Sequence[str]) -> list[Any]:
    result = function(parse(smiles, first))
    return [table.numpy() for table in (result if isinstance(result, list) else [result])]


def parse(smiles: Sequence[str], first: int = 0) -> list[Any]:
    """Return the molecules of some SMILES, the first of which is the corpus's molecule `first`.

    Raises:
        ImportError: RDKit is not installed.
        ValueError: a SMILES that RDKit refuses; the message gives its row.
    """
    chem = import_extra("rdkit.Chem")
    molecules = [chem.MolFromSmiles(text) for text in smiles]
    for row, molecule in enumerate(molecules):
        if molecule is None:
            raise DataError(
                f"molecule {first + row} of the corpus, {smiles[row]!r}, is not a SMILES that RDKit reads; leave it out"
            )
    return molecules


def varying_columns(table: Tensor, noun: str, rare: float = 0.0) -> list[int]:
    """Return the columns of `table` (M, F) that vary.

    Args:
        table: numbers; NaN counts as the median of its column.
        noun: the plural of what a column holds, for the error.
        rare: the least share of the rows that must differ from the most frequent value of the column; more than none.

    Raises:
        ValueError: no column varies.
    """
    if table.is_floating_point():
        table = torch.where(table.isnan(), table.nanmedian(0).values, table).nan_to_num()
    share = (table != table.mode(0).values).double().mean(0)
    columns: list[int] = ((share > 0) & (share >= rare)).nonzero().squeeze(1).tolist()
    if not columns:
        nearly = f"all but {rare:.0%} of " if rare else ""
        raise DataError(
            f"all {noun} are the same in {nearly}the corpus, so there is nothing to predict; leave the objective out"
        )
    return columns
