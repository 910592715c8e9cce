"""Read molecules: SMILES files and labelled tables become graphs; every row left out is reported."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from mlopt.validation import shown

from ..cells import is_empty
from ..examples import Examples, UnusableError, check_limit, gather
from ..files import DataError, suffix_of
from ..labels import meanings_of
from ..names import suggestion
from ..tables import SUFFIXES, is_folder, table_of
from .columns import ROWS_PER_CLASS, columns_of, smiles_column_of
from .graphs import import_extra
from .packed import graphs_of
from .sdf import sdf_table
from .smi import smi_list, smi_table

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch_geometric.data import Data

    from ..labels import Kind, Labels
    from ..tables import Table
    from .columns import Columns

__all__ = ["Molecules", "molecule_net", "molecule_table", "read_corpus", "read_smiles", "read_table"]

_SMI = ".smi"
_LISTS = (_SMI, ".txt")
_STRUCTURES = ".sdf"
#: Characters of the longest cell: a longer one has an open quote.
_LONGEST = 2**17


@attrs.frozen(eq=False, repr=False, kw_only=True)
class Molecules(Examples["Data"]):
    """Molecular graphs of one file, in the order of the file.

    Each graph has `x` (atoms, 9) and `edge_attr` (bonds counted in both directions, 3) of integers, the features of
    `torch_geometric.utils.from_rdmol`, `edge_index` (2, bonds counted in both directions), `smiles`, and, if there are labels,
    `y` (1, tasks) in float32 with NaN for a missing label.

    Args:
        examples: the graphs.
        rows: 1-based line of each graph in the file, the header counted.
        label_names: the columns of `y`; empty for an unlabelled corpus.
        meanings: the meaning of each column of labels of the file.
        skipped: the rows left out.
        source: the file.
    """

    label_names: tuple[str, ...] = ()
    meanings: tuple[Labels, ...] = ()

    noun = "molecules"

    @property
    def smiles(self) -> tuple[str, ...]:
        """The SMILES of each graph, as in the file, but without atom maps."""
        return tuple(graph.smiles for graph in self.examples)

    def contents(self) -> tuple[str, ...]:
        """Return the SMILES."""
        return self.smiles

    def copy(self) -> Molecules:
        """Return the same molecules in graphs of their own, to which objectives may attach targets."""
        return attrs.evolve(self, examples=tuple(copy.copy(graph) for graph in self.examples))

    def __repr__(self) -> str:
        labels = f", labels {', '.join(self.label_names)}" if self.label_names else ""
        return f"Molecules({self.summary()}{labels})"


def read_corpus(
    path: str | os.PathLike[str],
    *,
    smiles_column: str | None = None,
    optional: bool = True,
    strict: bool = False,
    limit: int | None = None,
) -> Molecules:
    """Read an unlabelled corpus.

    Args:
        path: a table with a column of SMILES, see `mlopt.recipes.tapweight.tables.table_of`; `.sdf`; or `.smi` or `.txt` with a
            SMILES a line, with or without a blank and a name after it. Each may be compressed (.gz, .xz, .bz2, .zip).
        smiles_column: the column of the SMILES of a table; by default "smiles" in any case, else the only one that holds SMILES.
        optional: take the default column of a table that does not have `smiles_column`.
        strict: refuse a SMILES that RDKit cannot parse, instead of leaving it out.
        limit: the most molecules; at least 2.

    Returns:
        At least two molecules, without labels.

    Raises:
        DataError: the file cannot be used; the message names the file, the row, its content and the remedy.
        FileNotFoundError: there is no such file.
    """
    check_limit(limit, "molecules")
    table = molecule_table(path, _LISTS)
    column, chosen = smiles_column_of(table, smiles_column if smiles_column in table.header or not optional else None)
    rows = ((row, (cells[column], ())) for row, cells in table.records())
    notes = (*table.notes, *chosen)
    options: dict[str, Any] = {"columns": (table.header[column],), "strict": strict, "limit": limit, "least": 2}
    return _molecules(table.source, rows, (), notes=notes, **options)


def read_smiles(path: str | os.PathLike[str], column: str | None = None, preferred: Sequence[str] = ()) -> list[Any]:
    """Return the SMILES of all rows of a file, also of rows that are not molecules; an `UnusableError` for an unread block.

    Args:
        path: as for `read_corpus`.
        column: the column of the SMILES of a table.
        preferred: the column to take when `column` is None, if the table has it; otherwise as for `read_corpus`.

    Raises:
        DataError: as `read_corpus`.
    """
    table = molecule_table(path, _LISTS)
    if column is None:
        column = next((name for name in preferred if name in table.header), None)
    index = smiles_column_of(table, column, "--columns")[0]
    return [cells[index] for _, cells in table.records()]


def read_table(
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    smiles_column: str | None = None,
    ignore: Sequence[str] = (),
    kind: Kind | None = None,
    missing: Sequence[str] = (),
    like: Molecules | None = None,
    strict: bool = False,
) -> Molecules:
    """Read a labelled table of molecules.

    Two classes become 0 and 1, by the order of `Labels.classes`. A column of more classes becomes a column of 0 and 1 for each.

    Args:
        path: a table, see `mlopt.recipes.tapweight.tables.table_of`, `.sdf`, or `.smi` with columns after the SMILES. An empty
            cell, or `nan`, is a missing label.
        labels: the label columns; by default all but the SMILES and those recognised as an index, an identifier, a molecular
            weight, the name of a split, or text.
        smiles_column: the column of the SMILES; by default "smiles" in any case, else the only column that holds SMILES.
        ignore: columns that are not labels.
        kind: "classification" or "regression" to decide between classes and numbers.
        missing: further cells that stand for a missing label, such as "-1".
        like: molecules of another file, whose columns and meaning of labels are taken.
        strict: refuse a SMILES that RDKit cannot parse, instead of leaving it out.

    Returns:
        Molecules with labels `y` (1, tasks).

    Raises:
        DataError: the file cannot be used; the message names the file, the row, its content and the remedy.
        FileNotFoundError: there is no such file.
    """
    table = molecule_table(path)
    if like is not None:
        labels, ignore = [each.name for each in like.meanings], ()
    columns = columns_of(table, smiles_column=smiles_column, labels=labels, ignore=ignore)
    meanings = like.meanings if like is not None else _meanings(table, columns, kind, missing)
    rows = ((row, (cells[columns.smiles], [cells[k] for k in columns.labels])) for row, cells in table.records())
    own = (table.header[columns.smiles],)
    return _molecules(table.source, rows, meanings, notes=(*table.notes, *columns.notes), columns=own, strict=strict)


def molecule_table(source: str | os.PathLike[str] | Any, lists: Sequence[str] = ()) -> Table:
    """Read a table, an SD or a .smi file as a table, or, if its suffix is among `lists`, a file with a SMILES a line."""
    if hasattr(source, "column_names") or is_folder(source):
        return table_of(source)
    suffix = suffix_of(Path(source), (*SUFFIXES, _STRUCTURES, _SMI, *lists))
    if suffix == _STRUCTURES:
        return sdf_table(Path(source))
    if suffix in lists:
        return smi_list(Path(source))
    if suffix == _SMI:
        return smi_table(Path(source))
    return table_of(source, longest=_LONGEST)


def _meanings(table: Table, columns: Columns, kind: Kind | None, missing: Sequence[str]) -> tuple[Labels, ...]:
    """Return the meaning of the columns of labels."""
    chosen = [(table.header[k], table.column(k)) for k in columns.labels]
    meanings = meanings_of(table.source, chosen, kind=kind, missing=missing, rows_per_class=ROWS_PER_CLASS)
    for each in meanings:
        if fault := _fault(each):
            raise DataError(f"{table.source}, column {shown(each.name)}: {fault}")
    return meanings


def molecule_net(name: str, root: str | os.PathLike[str]) -> Molecules:
    """Read a MoleculeNet data set (Wu et al., 2018), fetched by `torch_geometric.datasets.MoleculeNet`.

    `read_table` reads the raw file, so rows left out are reported and quoted cells are read correctly.

    Args:
        name: "ESOL", "FreeSolv", "Lipo", "PCBA", "MUV", "HIV", "BACE", "BBBP", "Tox21", "ToxCast", "SIDER" or
            "ClinTox", in any case.
        root: the folder of the data sets. Nothing is downloaded if `root/<name in lower case>/raw/` has the file.

    Returns:
        Molecules with the labels of the data set.

    Raises:
        DataError: the name is unknown, or the file cannot be fetched or read.
    """
    dataset_class: Any = import_extra("torch_geometric.datasets").MoleculeNet

    class RawFile(dataset_class):  # type: ignore[misc]
        """The download of the data set only: its own parser drops rows silently."""

        has_process = False

        def load(self, path: str) -> None:
            """Load nothing: nothing was processed."""

    key = name.lower()
    if key not in dataset_class.names and is_folder(name):
        raise DataError(f"name={name!r} is a folder, not a MoleculeNet data set; give it with --train")
    if key not in dataset_class.names:
        raise DataError(f"name={name!r} is not a MoleculeNet data set{suggestion(key, dataset_class.names)}")
    try:
        raw = Path(RawFile(str(root), key).raw_paths[0])
    except OSError as error:
        place = Path(root) / key / "raw" / f"{dataset_class.names[key][2]}.csv"
        raise DataError(f"MoleculeNet {name} cannot be fetched ({error}); put its raw file at {place}") from error
    smiles, labels = dataset_class.names[key][3:]
    header = list(table_of(raw, longest=_LONGEST).header)
    chosen = header[labels] if isinstance(labels, slice) else [header[labels]]
    return read_table(raw, labels=chosen, smiles_column=header[smiles])


def _fault(meaning: Labels) -> str:
    """Return the reason why a column alone cannot be predicted, empty if it can."""
    if meaning.form == "several":
        return "the cells are lists of classes; write a column of 0 and 1 for each class"
    if len(meaning.classes) == 1:
        return f"the only class is {shown(meaning.classes[0])}, so nothing can be learned; name another column with --labels"
    return ""


def _molecules(
    source: str,
    records: Iterable[tuple[int, tuple[Any, Sequence[Any]]]],
    meanings: tuple[Labels, ...],
    *,
    notes: tuple[str, ...],
    columns: tuple[str, ...],
    limit: int | None = None,
    **options: Any,
) -> Molecules:
    """Turn records (line, SMILES and label cells) into molecules; `limit` and `options` are those of `gather`."""

    def example(row: int, record: tuple[Data | UnusableError, Sequence[Any]]) -> Data:
        graph, cells = record
        if isinstance(graph, UnusableError):
            raise graph
        if meanings:
            labels = [y for each, cell in zip(meanings, cells, strict=True) for y in _label(source, row, each, cell)]
            graph.y = torch.tensor([labels], dtype=torch.float32)
        return graph

    listed = list(records)
    smiles = ["" if is_empty(cell) else str(cell).strip() for _, (cell, _) in listed]
    # Rows beyond the limit take the places of those that are left out.
    graphs = itertools.chain(graphs_of(smiles[:limit]), graphs_of(smiles[limit:]) if limit is not None else ())
    rows = (
        (row, (cell if isinstance(cell, UnusableError) else graph, cells))
        for (row, (cell, cells)), graph in zip(listed, graphs, strict=True)
    )
    gathered = gather(rows, example, source, noun="molecule", limit=limit, **options)
    return Molecules(**gathered, meanings=meanings, label_names=_names(meanings), notes=notes, columns=columns)


def _names(meanings: Sequence[Labels]) -> tuple[str, ...]:
    """Return the names of the columns of `y`."""
    return tuple(name for each in meanings for name in (each.classes if each.form == "classes" else (each.name,)))


def _label(source: str, row: int, meaning: Labels, cell: Any) -> list[float]:
    """Return the columns of `y` of a cell, NaN if it is missing."""
    width = len(meaning.classes) if meaning.form == "classes" else 1
    try:
        value = meaning.value(cell)
    except DataError as error:
        raise DataError(
            f"{source}, row {row}, column {shown(meaning.name)}: {error}; correct it, leave the cell empty for a missing label, "
            "or choose the label columns with --labels"
        ) from None
    if width == 1 or math.isnan(value):
        return [value] * width
    return [float(k == value) for k in range(width)]
