"""Read molecules and their properties from an SD file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from ..examples import UnusableError
from ..files import DataError, text_of
from ..tables import Table
from .graphs import import_extra

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["sdf_table"]

_UNREAD = "RDKit cannot read this block of the SD file"


def sdf_table(path: Path) -> Table:
    """Return the molecules of an SD file as SMILES in the column "smiles", and their properties as text in further columns.

    The cell of a molecule that RDKit cannot read is an `UnusableError`. The row of a molecule is its 1-based number.

    Raises:
        DataError: the file holds no molecule.
        FileNotFoundError: there is no such file.
    """
    chem, base = import_extra("rdkit.Chem"), import_extra("rdkit.rdBase")
    content = text_of(path)
    with base.BlockLogs():
        # RDKit reads properties as UTF-8, and blank lines at the end as a block.
        molecules: list[Any] = list(chem.ForwardSDMolSupplier(io.BytesIO(f"{content.text.rstrip()}\n".encode())))
    if not any(molecules):
        raise DataError(
            f"{path}: RDKit reads no molecule from {len(molecules)} blocks; give an SD file, or a table of SMILES"
        )
    names = list(dict.fromkeys(name for molecule in molecules if molecule for name in molecule.GetPropNames()))
    columns = [name for name in names if name.casefold() != "smiles"]
    cells = [
        [
            chem.MolToSmiles(molecule) if molecule else UnusableError(_UNREAD),
            *(molecule.GetProp(name) if molecule and molecule.HasProp(name) else "" for name in columns),
        ]
        for molecule in molecules
    ]
    rows = tuple(range(1, len(cells) + 1))
    return Table(source=str(path), header=("smiles", *columns), rows=rows, cells=tuple(cells), notes=content.notes)
