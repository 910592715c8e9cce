"""Read molecules: SMILES files and labelled tables become graphs; every row left out is reported."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from mlopt.imports import import_optional
from mlopt.validation import shown

from ..examples import Examples, UnusableError, check_limit, gather
from ..files import DataError, column_of, lines_of, suffix_of, table_of
from ..names import suggestion

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from torch_geometric.data import Data

_TABLES = (".csv",)
_LISTS = (".smi", ".txt")


import_extra = partial(import_optional, user="TapWeight on molecules", requirement="'mlopt-torch[molecules]'")


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
        skipped: the rows left out.
        source: the file.
    """

    label_names: tuple[str, ...] = ()

    noun = "molecules"

    @property
    def smiles(self) -> tuple[str, ...]:
        """The SMILES of each graph, as in the file."""
        return tuple(graph.smiles for graph in self.examples)

    def copy(self) -> Molecules:
        """Return the same molecules in graphs of their own, to which objectives may attach targets."""
        return attrs.evolve(self, examples=tuple(copy.copy(graph) for graph in self.examples))

    def __repr__(self) -> str:
        labels = f", labels {', '.join(self.label_names)}" if self.label_names else ""
        return f"Molecules({self.summary()}{labels})"


def read_corpus(path: str | os.PathLike[str], *, strict: bool = False, limit: int | None = None) -> Molecules:
    """Read an unlabelled corpus.

    Args:
        path: `.csv` with a column `smiles` (in any case; other columns are ignored), or `.smi` or `.txt` with one
            SMILES a line, with or without a blank and a name after it; each may be gzipped and end in `.gz`.
        strict: refuse a SMILES that RDKit cannot parse, instead of leaving it out.
        limit: the most molecules; at least 2.

    Returns:
        At least two molecules, without labels.

    Raises:
        DataError: the file cannot be used; the message names the file, the row, its content and the remedy.
        FileNotFoundError: there is no such file.
    """
    check_limit(limit, "molecules")
    path, unlabelled = Path(path), list[str]()
    rows = ((row, (smiles, unlabelled)) for row, smiles in read_smiles(path))
    return _molecules(path, rows, (), strict=strict, limit=limit, least=2)


def read_smiles(path: Path, column: str = "smiles") -> Iterator[tuple[int, str]]:
    """Yield the SMILES of all rows of a file, each with its 1-based line, also of rows that are not molecules.

    Args:
        path: as for `read_corpus`.
        column: the column of the SMILES in a table.

    Raises:
        DataError: as `read_corpus`.
    """
    if suffix_of(path, _TABLES + _LISTS) in _TABLES:
        header, records = table_of(path)
        index = column_of(path, header, column)
        return ((row, cells[index]) for row, cells in records)
    return ((row, (line.split() or [""])[0]) for row, line in enumerate(lines_of(path), start=1) if line.strip())


def read_table(
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    smiles_column: str = "smiles",
    strict: bool = False,
) -> Molecules:
    """Read a labelled table of molecules.

    Args:
        path: `.csv` or `.csv.gz` with a header row. An empty cell, or `nan`, is a missing label.
        labels: the label columns; by default all but the SMILES column.
        smiles_column: the column of the SMILES.
        strict: refuse a SMILES that RDKit cannot parse, instead of leaving it out.

    Returns:
        Molecules with labels `y` (1, tasks).

    Raises:
        DataError: the file cannot be used; the message names the file, the row, its content and the remedy.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    suffix_of(path, _TABLES)
    header, records = table_of(path)
    smiles = column_of(path, header, smiles_column)
    if labels is None:
        labels = [name for index, name in enumerate(header) if index != smiles]
    if isinstance(labels, str) or not labels:
        raise DataError(f"{path}: labels={labels!r} names no label column; there are {', '.join(map(shown, header))}")
    columns = [column_of(path, header, label) for label in labels]
    if smiles in columns or len(set(columns)) < len(columns):
        raise DataError(f"{path}: labels={list(labels)!r} must be different columns, and not the SMILES column")
    names = tuple(header[column] for column in columns)
    rows = ((row, (cells[smiles], [cells[column] for column in columns])) for row, cells in records)
    return _molecules(path, rows, names, strict=strict)


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
    if key not in dataset_class.names:
        raise DataError(f"name={name!r} is not a MoleculeNet data set{suggestion(key, dataset_class.names)}")
    try:
        raw = Path(RawFile(str(root), key).raw_paths[0])
    except OSError as error:
        place = Path(root) / key / "raw" / f"{dataset_class.names[key][2]}.csv"
        raise DataError(f"MoleculeNet {name} cannot be fetched ({error}); put its raw file at {place}") from error
    smiles, labels = dataset_class.names[key][3:]
    header, _ = table_of(raw)
    chosen = header[labels] if isinstance(labels, slice) else [header[labels]]
    return read_table(raw, labels=chosen, smiles_column=header[smiles])


def _molecules(
    path: Path, records: Iterable[tuple[int, tuple[str, list[str]]]], names: tuple[str, ...], **options: Any
) -> Molecules:
    """Turn records (line, SMILES and label cells) into molecules; `options` are those of `gather`."""

    def example(row: int, record: tuple[str, list[str]]) -> Data:
        smiles, cells = record
        graph = graph_of(smiles.strip())
        if names:
            labels = [_label(path, row, name, cell) for name, cell in zip(names, cells, strict=True)]
            graph.y = torch.tensor([labels], dtype=torch.float32)
        return graph

    return Molecules(**gather(records, example, str(path), noun="molecule", **options), label_names=names)


def graph_of(smiles: str) -> Data:
    """Return the graph of a molecule.

    Raises:
        UnusableError: the SMILES is not a molecule, or the molecule does not have a graph.
    """
    subject = f"{shown(smiles)} is not a molecule: "
    chem, base = import_extra("rdkit.Chem"), import_extra("rdkit.rdBase")
    with base.BlockLogs():  # the reason is raised, not printed
        molecule = chem.MolFromSmiles(smiles)
        if molecule is None:
            unchecked = chem.MolFromSmiles(smiles, sanitize=False)
            problems = chem.DetectChemistryProblems(unchecked) if unchecked is not None else ()
            raise UnusableError(" ".join(problems[0].Message().split()) if problems else "not valid SMILES", subject)
    if not molecule.GetNumAtoms():
        raise UnusableError("the SMILES is empty", subject)
    try:
        graph: Data = import_extra("torch_geometric.utils").from_rdmol(molecule)
    except ValueError as error:  # its feature tables are finite: charges from -5 to 6, at most 10 neighbours, ...
        raise UnusableError(f"an atom or bond has no code in the graph features ({error})", subject) from error
    graph.smiles = smiles
    return graph


def _label(path: Path, row: int, column: str, cell: str) -> float:
    """Return a label, NaN if it is missing."""
    text = cell.strip()
    if not text:
        return math.nan
    try:
        if "_" in text:  # float() accepts digits grouped by underscores
            raise ValueError(text)
        value = float(text)
    except ValueError:
        raise DataError(
            f"{path}, row {row}, column {shown(column)}: {shown(cell)} is not a number; correct it, "
            "leave the cell empty for a missing label, or choose the label columns by `labels`"
        ) from None
    if abs(value) > torch.finfo(torch.float32).max:  # an infinity, or a number that becomes one
        raise DataError(f"{path}, row {row}, column {shown(column)}: {shown(cell)} is not finite in float32; rescale")
    return value
