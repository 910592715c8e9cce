"""The draws of the study: no group on both sides, labels by seed."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
from study_cases import plan

from benchmarks.tapweight.draws import half_of_the_groups, train_and_valid
from benchmarks.tapweight.molecules import MoleculeStudy
from mlopt.recipes.tapweight.files import DataError

GROUPS = [k // 3 for k in range(60)] + ["large"] * 70


@pytest.mark.parametrize("seed", range(5))
def test_the_held_out_part_is_whole_groups_of_at_most_half(seed: int) -> None:
    rest, held_out = half_of_the_groups(GROUPS, seed)
    assert sorted([*rest, *held_out]) == list(range(130))
    assert not {GROUPS[index] for index in rest} & {GROUPS[index] for index in held_out}
    # All the small groups fit, and the large one does not.
    assert held_out == list(range(60))


def test_the_held_out_part_fills_half_and_follows_the_seed() -> None:
    draws = [half_of_the_groups(GROUPS[:60], seed)[1] for seed in range(5)]
    assert {len(held_out) for held_out in draws} == {30}
    assert len({tuple(held_out) for held_out in draws}) == 5
    assert draws[3] == half_of_the_groups(GROUPS[:60], 3)[1]


def test_a_fifth_of_the_labels_are_for_validation() -> None:
    pool = list(range(100, 200))
    train, valid = train_and_valid(pool, 50, seed=0)
    assert (len(train), len(valid)) == (40, 10)
    assert not set(train) & set(valid)
    assert {*train, *valid} < set(pool)
    assert train_and_valid(pool, 50, seed=1)[0] != train != train_and_valid(pool, 50, seed=0, attempt=1)[0]
    train, valid = train_and_valid(pool, "all", seed=0)
    assert sorted([*train, *valid]) == pool


def test_more_labels_than_there_are_are_refused() -> None:
    with pytest.raises(DataError, match="has 3 examples"):
        train_and_valid([1, 2, 3], 4, seed=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_scaffold_is_in_the_test_set_and_among_the_labels(tmp_path: Path, seed: int) -> None:
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

    task = MoleculeStudy(plan(tmp_path)).task("bbbp", seed, 20)
    scaffolds = {
        split: {MurckoScaffoldSmiles(graph.smiles) for graph in examples} for split, examples in task.splits.items()
    }
    assert [len(task.splits[split]) for split in ("train", "valid", "test")] == [16, 4, 36]
    assert not scaffolds["test"] & (scaffolds["train"] | scaffolds["valid"])
    assert task.kind == "classification"


def test_molecules_without_a_ring_are_groups_of_their_own(tmp_path: Path) -> None:
    own = plan(tmp_path)
    chains = ["C" * length + end for length in range(2, 22) for end in ("O", "N")]
    table = tmp_path / "mol" / "esol.csv"
    table.write_text("smiles,y\n" + "".join(f"{smiles},{len(smiles)}\n" for smiles in chains))
    task = MoleculeStudy(own).task("esol", 0, 20)
    assert [len(task.splits[split]) for split in ("train", "valid", "test")] == [16, 4, 20]


def test_the_texts_of_a_task_in_two_files_are_numbered_across_them(tmp_path: Path) -> None:
    from benchmarks.tapweight.text import _read

    for name, count in {"dev.jsonl": 3, "test.jsonl": 4}.items():
        lines = [json.dumps({"text": f"{name} {row}", "label": row % 2}) for row in range(count)]
        (tmp_path / name).write_text("\n".join(lines))
    texts = _read(tmp_path, ("dev.jsonl", "test.jsonl"))
    assert texts.record_numbers() == tuple(range(7))
    chosen = texts.subset([6, 0])
    assert [example["text"] for example in chosen] == ["test.jsonl 3", "dev.jsonl 0"]
    assert chosen.record_numbers() == (6, 0)


def test_an_objective_is_left_out_on_corpora_without_what_it_needs() -> None:
    from benchmarks.tapweight.text import STANDARD, TextStudy

    objectives = ("masked_tokens", "sentence_position", "sections")
    study = TextStudy(attrs.evolve(STANDARD, objectives=objectives))
    for corpus, count in (
        ("biomed_abstracts", 3),
        ("corpus", 3),
        ("cs_abstracts", 2),
        ("movie_reviews", 1),
        ("cola", 1),
    ):
        assert study.objectives(corpus) == objectives[:count], corpus
