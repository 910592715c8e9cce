"""The cache of features, and their computation in several processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import Descriptors as RDKitDescriptors
from torch import Tensor

from mlopt.recipes.tapweight.examples import UnusableError
from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.molecules import cache, packed, read_corpus, workers
from mlopt.recipes.tapweight.molecules.graphs import graph_of
from mlopt.recipes.tapweight.molecules.objectives.charges import partial_charges
from mlopt.recipes.tapweight.molecules.objectives.descriptors import descriptors
from mlopt.recipes.tapweight.molecules.sample import drugs
from mlopt.recipes.tapweight.molecules.splits import scaffold_split

SMILES = tuple(drugs()[:40])
TENSORS = {"a": torch.tensor([[1.5, float("nan")], [-0.0, 3.0]]), "b": torch.zeros(0, 3, dtype=torch.uint8)}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a cache that takes a few molecules."""
    monkeypatch.setenv("MLOPT_CACHE", str(tmp_path))
    for module in (cache, packed):
        monkeypatch.setattr(module, "FEWEST", 5)
    return tmp_path / "molecules"


class Counted:
    """A computation that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, Tensor]:
        self.calls += 1
        return TENSORS


def assert_same(found: object, expected: object) -> None:
    """Compare tensors bit for bit: their dtypes, shapes and bytes."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.numpy().tobytes() == expected.numpy().tobytes()
    else:
        assert found == expected


def test_a_second_call_reads_the_same_bits(place: Path) -> None:
    compute = Counted()
    for _ in range(2):
        tensors = cache.cached("feature", SMILES, compute)
        assert set(tensors) == set(TENSORS)
        for name, expected in TENSORS.items():
            assert_same(tensors[name], expected)
    assert compute.calls == 1
    assert [file.suffix for file in place.iterdir()] == [".safetensors"]


def changed_code(monkeypatch: pytest.MonkeyPatch) -> tuple[str, tuple[str, ...]]:
    monkeypatch.setattr(cache, "_code", lambda: "another version")
    return "feature", SMILES


def changed_rdkit(monkeypatch: pytest.MonkeyPatch) -> tuple[str, tuple[str, ...]]:
    monkeypatch.setattr("rdkit.__version__", "1999.01.1")
    return "feature", SMILES


@pytest.mark.parametrize(
    "change",
    [
        lambda _: ("feature (1,)", SMILES),
        lambda _: ("feature", (*SMILES[:-1], SMILES[-1] + "C")),
        lambda _: ("feature", SMILES[:-1]),
        lambda _: ("feature", SMILES[::-1]),
        lambda _: ("feature", (SMILES[0] + SMILES[1], *SMILES[2:])),
        changed_code,
        changed_rdkit,
    ],
)
def test_a_change_of_the_content_or_of_a_version_is_another_key(
    change: Callable[[pytest.MonkeyPatch], tuple[str, tuple[str, ...]]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Counted()
    cache.cached("feature", SMILES, compute)
    feature, smiles = change(monkeypatch)
    cache.cached(feature, smiles, compute)
    assert compute.calls == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-3],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content.replace(b'"digest"', b'"dugest"'),
    ],
)
def test_a_damaged_file_is_computed_again(damage: Callable[[bytes], bytes], place: Path) -> None:
    compute = Counted()
    cache.cached("feature", SMILES, compute)
    (file,) = place.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match=r"not a complete cache file .* computed again"):
        assert_same(cache.cached("feature", SMILES, compute)["a"], TENSORS["a"])
    assert compute.calls == 2
    cache.cached("feature", SMILES, compute)
    assert compute.calls == 2


def test_a_folder_that_cannot_be_written_is_a_remark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLOPT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set MLOPT_CACHE to a folder that can be written to, or to 'none'"):
        tensors = cache.cached("feature", SMILES, Counted())
    assert_same(tensors["a"], TENSORS["a"])


def test_few_molecules_and_none_leave_no_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.cached("feature", SMILES[:4], Counted())
    monkeypatch.setenv("MLOPT_CACHE", "none")
    cache.cached("feature", SMILES, Counted())
    assert not place.exists()


def test_runs_at_once_do_not_break_each_other(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All compute the same feature, and each has written its file when the first one moves its own."""
    barrier = threading.Barrier(8)
    tensors = {"a": torch.arange(200_000.0)}
    save_file = cache.save_file

    def compute() -> dict[str, Tensor]:
        barrier.wait(timeout=300)
        return tensors

    def save(*arguments: Any, **options: Any) -> None:
        save_file(*arguments, **options)
        barrier.wait(timeout=300)

    monkeypatch.setattr(cache, "save_file", save)
    results: list[object] = []
    own = [threading.Thread(target=lambda: results.append(cache.cached("feature", SMILES, compute))) for _ in range(8)]
    for thread in own:
        thread.start()
    for thread in own:
        thread.join(timeout=300)
    assert len(results) == 8
    assert [file.suffix for file in place.iterdir()] == [".safetensors"]
    assert_same(cache.cached("feature", SMILES, Counted())["a"], tensors["a"])


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in two processes, five molecules at a time."""
    monkeypatch.setattr(workers, "_CHUNK", 5)
    monkeypatch.setattr(workers, "_SHARE", 5)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)


@pytest.mark.usefixtures("two_processes")
def test_processes_return_what_one_computes_and_name_a_faulty_row(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = [graph_of(smiles) for smiles in SMILES]
    properties = ("MolWt", "TPSA", "MolLogP")
    table, charges, splits = descriptors(corpus, properties), partial_charges(corpus), scaffold_split(SMILES)
    known = dict(RDKitDescriptors.descList)
    molecules = [Chem.MolFromSmiles(smiles) for smiles in SMILES]
    assert_same(table, torch.tensor([[known[name](molecule) for name in properties] for molecule in molecules]))
    corpus[17].smiles = "C(C"
    with pytest.raises(
        DataError, match=r"molecule 17 of the corpus, 'C\(C', is not a SMILES that RDKit reads; leave it out"
    ):
        descriptors(corpus, properties)
    corpus[17].smiles = SMILES[17]
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)
    assert_same(table, descriptors(corpus, properties))
    for own, expected in zip(charges, partial_charges(corpus), strict=True):
        assert_same(own, expected)
    assert splits == scaffold_split(SMILES)


def test_packed_graphs_are_those_of_single_molecules(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a single atom, of a molecule with atom maps, and of rows that are not molecules."""
    smiles = [*SMILES, "[Na+]", "[CH3:1][OH:2]", "C(C", "", "[Cu+9]", SMILES[0], "C/C=C/[C@H](F)Cl"]

    def check() -> None:
        for text, own in zip(smiles, packed.graphs_of(smiles), strict=True):
            if isinstance(own, UnusableError):
                with pytest.raises(UnusableError) as raised:
                    graph_of(text)
                assert (own.reason, own.subject) == (raised.value.reason, raised.value.subject)
                continue
            expected = graph_of(text)
            assert set(own.keys()) == set(expected.keys())
            for key in expected.keys():  # noqa: SIM118 (not a mapping)
                assert_same(own[key], expected[key])

    check()
    monkeypatch.setattr(packed, "by_chunks", None)  # nothing is computed again
    check()
    first, *_, last = packed.graphs_of([*smiles[:-1], smiles[-1]])
    assert first.x.untyped_storage().nbytes() == first.x.nbytes
    assert last.edge_index.untyped_storage().nbytes() == last.edge_index.nbytes


def test_a_limited_corpus_takes_the_places_of_rows_left_out(place: Path, tmp_path: Path) -> None:
    lines = [*SMILES[:6], "C(C", *SMILES[6:]]
    (tmp_path / "corpus.smi").write_text("\n".join(lines))
    for _ in range(2):
        corpus = read_corpus(tmp_path / "corpus.smi", limit=10)
        assert corpus.smiles == SMILES[:10]
        assert corpus.rows == (1, 2, 3, 4, 5, 6, 8, 9, 10, 11)
        assert [skipped.row for skipped in corpus.skipped] == [7]


def test_a_long_computation_prints_a_line_at_its_begin_and_at_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "_CHUNK", 10)
    assert workers.by_chunks(lambda first, smiles: (first, len(smiles)), SMILES[:25], "graphs") == [
        (0, 10), (10, 10), (20, 5)
    ]  # fmt: skip
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(workers, "_PATIENCE", 0.0)
    workers.by_chunks(lambda first, smiles: None, SMILES[:25], "graphs")
    assert capsys.readouterr().err.splitlines() == [
        "graphs of 25 molecules: about 0 seconds left",
        "graphs of 25 molecules: done in 0 seconds",
    ]
