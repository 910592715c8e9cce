"""Files of molecules are read as they are; an unreadable one is refused with its row and a remedy."""

from __future__ import annotations

import contextlib
import csv
import gzip
import math
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch
from torch_geometric.utils import from_smiles

from mlopt.recipes.tapweight.examples import Skipped
from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.molecules.data import Molecules, molecule_net, read_corpus, read_table

BAD = "C[N](C)(C)(C)C"  # five bonds at a nitrogen


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "A.CSV"])
def test_corpus_of_a_table(tmp_path: Path, name: str) -> None:
    molecules = read_corpus(write(tmp_path, name, "id,SMILES\n1,CCO\n2,[Na+]\n"))
    assert molecules.smiles == ("CCO", "[Na+]")
    assert (molecules.rows, molecules.label_names, molecules.skipped) == ((2, 3), (), ())


@pytest.mark.parametrize("name", ["a.smi", "a.smi.gz", "a.txt", "a.txt.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_corpus_of_lines(tmp_path: Path, name: str, end: str) -> None:
    molecules = read_corpus(write(tmp_path, name, end.join(["CCO ethanol", "", "  [Na+]\ta name ", "C"])))
    assert molecules.smiles == ("CCO", "[Na+]", "C")
    assert molecules.rows == (1, 3, 4)


@pytest.mark.parametrize("smiles", ["CCO", "C/C=C/[C@H](N)c1ccccc1", "[Na+].[Cl-]", "[He]"])
def test_graphs_are_those_of_torch_geometric(tmp_path: Path, smiles: str) -> None:
    graph = read_corpus(write(tmp_path, "a.smi", f"{smiles}\nC\n"))[0]
    reference = from_smiles(smiles)
    for key in ("x", "edge_index", "edge_attr"):
        assert torch.equal(graph[key], reference[key])
        assert graph[key].dtype == torch.long
    assert (graph.x.shape[1], graph.edge_attr.shape[1]) == (9, 3)


def test_lone_atoms_have_no_bonds_and_join_a_batch(tmp_path: Path) -> None:
    molecules = read_corpus(write(tmp_path, "a.smi", "[Na+]\nCC\n"))
    assert molecules[0].edge_attr.shape == (0, 3)
    assert molecules[0].edge_index.shape == (2, 0)
    assert Batch.from_data_list(list(molecules)).edge_attr.shape == (2, 3)


def test_limit_stops_early(tmp_path: Path) -> None:
    path = write(tmp_path, "a.smi", "C\nCC\nCCC\nnonsense\n")
    assert len(read_corpus(path, limit=2, strict=True)) == 2
    with pytest.raises(ValueError, match="at least 2"):
        read_corpus(path, limit=1)


def test_table_reads_labels_and_missing_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "\ufeffa,smiles, b\n1,CC,\nnan,CCC, -2.5e1 \n")
    molecules = read_table(path)
    assert molecules.label_names == ("a", "b")
    labels = torch.cat([graph.y for graph in molecules])
    assert labels.dtype == torch.float32
    torch.testing.assert_close(labels, torch.tensor([[1, math.nan], [math.nan, -25]]), equal_nan=True)
    assert [graph.y.shape for graph in read_table(path, labels=["b"])] == [(1, 1), (1, 1)]
    assert read_table(path, labels=["B", "A"]).label_names == ("b", "a")


def test_rows_are_the_lines_of_an_editor(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", f'\nname,smiles,y\n"two\nlines",CC,1\n\nx,{BAD},2\ny,CCC,3\n')
    molecules = read_table(path, labels=["y"])
    assert molecules.rows == (3, 7)
    assert [skipped.row for skipped in molecules.skipped] == [6]
    assert molecules.subset([1]).rows == (7,)


def test_molecules_are_a_sequence(tmp_path: Path) -> None:
    molecules = read_table(write(tmp_path, "a.csv", f"smiles,y\nC,1\n{BAD},0\nCC,2\nCCC,3\n"))
    assert (len(molecules), molecules[-1].smiles) == (3, "CCC")
    part = molecules[1:]
    assert isinstance(part, Molecules)
    assert (part.smiles, part.rows, part.skipped) == (("CC", "CCC"), (4, 5), ())
    assert molecules.subset([2, 0]).smiles == ("CCC", "C")
    assert pickle.loads(pickle.dumps(molecules)).smiles == molecules.smiles
    with pytest.raises(IndexError):
        molecules.subset([3])


def test_summary_names_what_was_left_out(tmp_path: Path) -> None:
    molecules = read_table(write(tmp_path, "a.csv", f"smiles,y\nC,1\n{BAD},0\n"))
    reason = "Explicit valence for atom # 1 N, 5, is greater than permitted"
    assert molecules.skipped == (Skipped(3, reason),)
    assert molecules.summary() == f"1 molecules of a.csv; 1 skipped: row 3 ({reason})"
    assert repr(molecules) == f"Molecules({molecules.summary()}, labels y)"
    many = read_corpus(write(tmp_path, "b.smi", "C\nCC\n" + "zzz\n" * 5))
    named = ", ".join(f"row {row} (not valid SMILES)" for row in (3, 4, 5))
    assert many.summary() == f"2 molecules of b.smi; 5 skipped: {named} and 2 more"


@pytest.mark.parametrize(
    ("smiles", "reason"),
    [("", "the SMILES is empty"), ("C1CC", "not valid SMILES"), ("c1cccc1", "Can't kekulize"), ("[C-7]", "no code")],
)
def test_reasons(tmp_path: Path, smiles: str, reason: str) -> None:
    path = write(tmp_path, "a.csv", f"smiles,y\nC,1\n{smiles},0\n")
    (skipped,) = read_table(path).skipped
    assert skipped.row == 3
    assert reason in skipped.reason
    with pytest.raises(DataError, match=r"a\.csv, row 3: .* is not a molecule: .*leave out --strict"):
        read_table(path, strict=True)


def test_real_unparsable_rows(data_folder: Path, tmp_path: Path) -> None:
    content = (data_folder / "mol" / "unparsable_smiles.csv").read_text()
    molecules = read_corpus(write(tmp_path, "a.csv", f"{content.rstrip()}\nCC,x\nCO,x\n"))
    assert len(molecules) == 2
    assert [skipped.row for skipped in molecules.skipped] == list(range(2, 17))
    assert all("valence" in skipped.reason or "kekulize" in skipped.reason for skipped in molecules.skipped)
    with pytest.raises(DataError, match="no row is a molecule; row 2: "):
        read_corpus(data_folder / "mol" / "unparsable_smiles.csv")


def test_real_tables(data_folder: Path) -> None:
    clintox = read_table(data_folder / "mol" / "clintox.csv")
    assert clintox.label_names == ("FDA_APPROVED", "CT_TOX")
    assert torch.cat([graph.y for graph in clintox]).nansum(dim=0).tolist() == [1386, 112]
    zinc = read_corpus(data_folder / "mol" / "zinc_50k.csv.gz", limit=300)
    assert (len(zinc), zinc.skipped) == (300, ())


TABLE_ERRORS: dict[str, tuple[str | bytes, str]] = {
    "missing column": ("smile,y\nzzz,1\n", r"no column 'smiles'; available: 'smile', 'y' \(did you mean 'smile'\?\)"),
    "two columns of SMILES": (
        "a,b,y\nCC,CO,1\n",
        r"SMILES are in the columns 'a', 'b'; name one of them with --smiles-column",
    ),
    "no header": ("CCO,1\nCC,2\n", r"row 1: 'CCO' is a molecule, so the names of the columns are missing"),
    "no label column": (
        "smiles\nC\n",
        r"no column other than 'smiles' has labels; name the columns to predict with --labels",
    ),
    "text label": ("smiles,y\nC,1\nCC,high\n", r"row 3, column 'y': 'high' is not a number"),
    "grouped digits": ("smiles,y\nC,1_000\nCC,2\n", r"row 2, column 'y': '1_000' is not a number"),
    "infinite label": ("smiles,y\nC,-inf\n", r"row 2, column 'y': '-inf' is not finite"),
    "label beyond float32": ("smiles,y\nC,1e39\n", r"row 2, column 'y': '1e39' is too large for float32"),
    "empty file": ("", "the file is empty"),
    "blank file": ("\n \n", "the file is empty"),
    "only commas": (",,\n", "the header names no column"),
    "header only": ("smiles,y\n", "no row below the header"),
    "no molecule": ("smiles,y\nzzz,1\n", "no row is a molecule; row 2: 'zzz' is not a molecule: not valid SMILES"),
    "short row": ("smiles,y\nC,1\nCC\n", "row 3: 1 cells, but the header has 2"),
    "long row": ("smiles,y\nC,1\n\nCC,1,2\n", "row 4: 3 cells, but the header has 2"),
    "duplicate columns": ("smiles,y,y\nC,1,1\n", "the header names 'y' more than once"),
    "open quote": ('smiles,y\nC,1\n"CC,1\nC,1\n', "row 3: not valid CSV"),
    "text after a quote": ('smiles,y\n"C"C,1\n', "row 2: not valid CSV"),
    "huge cell": (f"smiles,y\n{'C' * 140_000},1\n", "row 2: not valid CSV"),
    "damaged UTF-8": ("smiles,y\né,1\nC,".encode() + b"\xe9\n", "row 3: byte 0xe9 is not UTF-8"),
    "damaged UTF-16": ("smiles,y\nC,1\n".encode("utf-16")[:-1], "byte 0x0a is not UTF-16"),
    "nul": ("smiles,y\nC,1\nC\0,1\n", "row 3: the row holds a NUL byte"),
}


@pytest.mark.parametrize("case", TABLE_ERRORS)
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_table_errors(tmp_path: Path, case: str, suffix: str) -> None:
    content, message = TABLE_ERRORS[case]
    path = write(tmp_path, f"a{suffix}", content)
    with pytest.raises(DataError, match=message) as error:
        read_table(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_label_arguments_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "smiles,logS,y\nC,1,2\n")
    with pytest.raises(DataError, match=r"no column 'logs_'; available: .* \(did you mean 'logS'\?\)"):
        read_table(path, labels=["logs_"])
    for labels in (["y", "Y"], ["smiles"]):
        with pytest.raises(DataError, match="must be different columns, not the SMILES column"):
            read_table(path, labels=labels)
    with pytest.raises(DataError, match="labels='y' names no label column"):
        read_table(path, labels="y")


def test_file_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"a\.parquet is not a Parquet file"):
        read_corpus(write(tmp_path, "a.parquet", "C\n"))
    with pytest.raises(
        DataError, match=r"suffix '\.txt' is not one of \.csv, \.tsv, \.jsonl, \.json, \.parquet, \.sdf, \.smi, also"
    ):
        read_table(write(tmp_path, "a.txt", "C\n"))
    with pytest.raises(DataError, match="a corpus of one molecule is too small"):
        read_corpus(write(tmp_path, "one.smi", "C\n"))
    whole = gzip.compress(b"smiles,y\nC,1\n" * 100)
    for content in (b"smiles,y\nC,1\n", whole[:-12], whole[:10] + b"\xff" * 20, b"\x1f\x8b"):
        (tmp_path / "b.csv.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"b\.csv\.gz is not a complete gzip file"):
            read_table(tmp_path / "b.csv.gz")


def is_missing_or_number(cell: str) -> float | None:
    """Return the number of a label cell: NaN if it is missing, None if it must be refused."""
    cell = cell.strip()
    if not cell:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        return None
    return None if "_" in cell or abs(value) > torch.finfo(torch.float32).max else value


numbers = st.floats().map(repr) | st.integers().map(str) | st.sampled_from(["", " ", "nan", "-NaN", "Infinity", "1_0"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cells=st.lists(numbers | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1))
def test_any_label_is_read_or_refused(tmp_path: Path, cells: list[str]) -> None:
    path = tmp_path / "fuzz.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["smiles", "y"], *(["C", cell] for cell in cells)])
    values = [is_missing_or_number(cell) for cell in cells]
    if all(value is not None and math.isnan(value) for value in values):
        with pytest.raises(DataError, match="column 'y': no row has a label"):
            read_table(path, labels=["y"], kind="regression")
    elif None in values:
        with pytest.raises(DataError, match="column 'y'") as error:
            read_table(path, labels=["y"], kind="regression")
        refused = [cell for cell, value in zip(cells, values, strict=True) if value is None]
        assert any(repr(cell)[:200] in str(error.value) for cell in refused)
    else:
        labels = torch.cat([graph.y for graph in read_table(path, labels=["y"], kind="regression")])
        torch.testing.assert_close(labels, torch.tensor(values).view(-1, 1), equal_nan=True, rtol=0, atol=0)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text('smiles,y\n\r"\0C1() \t').map(str.encode), name=st.sampled_from("ab"))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes, name: str) -> None:
    for suffix in (".csv", ".csv.gz", ".smi"):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        for read in (read_corpus, read_table):
            with contextlib.suppress(DataError):  # anything else is a bare traceback for the user
                assert len(read(path)) > 0


def raw_file(root: Path, name: str, file: str, content: str) -> None:
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    (folder / file).write_text(content)


def test_molecule_net_reads_a_file_in_place(tmp_path: Path) -> None:
    header = "Compound ID,ESOL predicted log solubility in mols per litre,Minimum Degree,Molecular Weight,"
    header += "Number of H-Bond Donors,Number of Rings,Number of Rotatable Bonds,Polar Surface Area,"
    header += "measured log solubility in mols per litre,smiles"
    rows = ['"1,2-ethanediol",-0.9,1,62.1,2,0,1,40.5,-0.77,OCCO', "Ethane,-1,1,30.1,0,0,0,0,-1.5,CC"]
    raw_file(tmp_path, "esol", "delaney-processed.csv", "\n".join([header, *rows]))  # no newline at the end
    molecules = molecule_net("ESOL", tmp_path)
    assert molecules.smiles == ("OCCO", "CC")
    assert molecules.label_names == ("measured log solubility in mols per litre",)
    torch.testing.assert_close(torch.cat([graph.y for graph in molecules]), torch.tensor([[-0.77], [-1.5]]))
    assert not (tmp_path / "esol" / "processed").exists()


def test_molecule_net_accounts_for_skipped_rows(tmp_path: Path) -> None:
    raw_file(tmp_path, "bbbp", "BBBP.csv", f"num,name,p_np,smiles\n1,Propanolol,1,CCO\n2,bad,0,{BAD}\n3,x,0,CC\n")
    molecules = molecule_net("bbbp", tmp_path)
    assert (molecules.smiles, molecules.rows, molecules.label_names) == (("CCO", "CC"), (2, 4), ("p_np",))
    assert [skipped.row for skipped in molecules.skipped] == [3]


def test_molecule_net_of_several_tasks(tmp_path: Path) -> None:
    raw_file(tmp_path, "clintox", "clintox.csv", "smiles,FDA_APPROVED,CT_TOX\nCCO,1,0\nCC,,1\n")
    assert molecule_net("ClinTox", tmp_path).label_names == ("FDA_APPROVED", "CT_TOX")


def test_molecule_net_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"name='BBPB' is not a MoleculeNet data set; .* \(did you mean 'bbbp'\?\)"):
        molecule_net("BBPB", tmp_path)

    def offline(*_: Any, **__: Any) -> None:
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    with pytest.raises(DataError, match=r"cannot be fetched .* put its raw file at .*bbbp/raw/BBBP\.csv"):
        molecule_net("BBBP", tmp_path)


def test_without_rdkit_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rdkit"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"rdkit, which is not installed: pip install 'mlopt-torch\[molecules\]'"
    ):
        read_corpus(write(tmp_path, "a.smi", "C\nCC\n"))


def run(code: str, *arguments: str) -> tuple[str, str]:
    """Return the output and the errors of a new interpreter."""
    root = Path(__file__).resolve().parents[4]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=root
    )
    return result.stdout.strip(), result.stderr


def test_importing_the_reader_imports_neither_rdkit_nor_torch_geometric() -> None:
    code = (
        "import sys, mlopt.recipes.tapweight.molecules.splits; print({'rdkit', 'torch_geometric'} & set(sys.modules))"
    )
    assert run(code) == ("set()", "")


def test_rdkit_is_silent(tmp_path: Path) -> None:
    # In a new interpreter, since `from_smiles` switches RDKit's log off for good.
    path = write(tmp_path, "a.smi", f"C\nCC\nC1CC\n{BAD}\n")
    code = (
        "import sys, mlopt.recipes.tapweight.molecules.data as data; print(len(data.read_corpus(sys.argv[1]).skipped))"
    )
    assert run(code, str(path)) == ("2", "")


def test_a_changed_molecule_changes_the_checksum_and_targets_do_not(tmp_path: Path) -> None:
    (tmp_path / "a.smi").write_text("C\nCC\n")
    (tmp_path / "b.smi").write_text("C\nCO\n")
    first, second = read_corpus(tmp_path / "a.smi"), read_corpus(tmp_path / "b.smi")
    before = first.checksum()
    first[0].charges = torch.ones(1)
    assert first.checksum() == before != second.checksum()
