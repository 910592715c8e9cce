"""The molecular objectives on computed numbers: counts, charges, families of descriptors; and contexts of atoms."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.utils import from_smiles

from mlopt.recipes.tapweight.molecules.encoder import GINE
from mlopt.recipes.tapweight.molecules.modality import MoleculeConfiguration
from mlopt.recipes.tapweight.molecules.objectives import (
    FAMILIES,
    OBJECTIVES,
    Charges,
    ContextPrediction,
    Descriptors,
    FingerprintCounts,
    FragmentCounts,
    FunctionalGroups,
    make_objective,
)
from mlopt.recipes.tapweight.molecules.objectives.descriptors import PROPERTIES
from mlopt.recipes.tapweight.molecules.objectives.targets import varying_columns
from mlopt.recipes.tapweight.molecules.sample import drugs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlopt.recipes.tapweight.objective import Objective

REGRESSIONS = ("descriptors", "fingerprint_counts", "fragment_counts", "charges", *FAMILIES)
SELENOPHENE = "[Se]1C=CC=C1"


def graphs(*smiles: str) -> list[Data]:
    return [from_smiles(text) for text in smiles]


def attached(objective: Any, *smiles: str) -> list[Tensor]:
    """Return the numbers that the objective attaches to each molecule."""
    corpus = graphs(*smiles)
    objective.prepare(corpus, seed=0)
    return [graph[objective.key] for graph in corpus]


def at_zero(objective: Objective, corpus: Sequence[Data]) -> Tensor:
    """Return the loss of a head that predicts zero, as its parameters can be differentiated."""
    torch.manual_seed(0)
    encoder = GINE(width=8, layers=1)
    head = objective.head(encoder)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return objective.loss(encoder, head, objective.view(Batch.from_data_list(list(corpus))))


def test_each_objective_is_known_by_its_name_and_the_command_line_uses_six_by_default() -> None:
    assert [make_objective(name).name for name in OBJECTIVES] == list(OBJECTIVES)
    assert [*OBJECTIVES][-1] == "random_labels"
    default = (
        "masked_atoms",
        "masked_bonds",
        "contrastive",
        "functional_groups",
        "fingerprint_clusters",
        "descriptors",
    )
    assert MoleculeConfiguration.__attrs_attrs__.objectives.default == default  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", REGRESSIONS)
def test_the_loss_of_predicting_the_means_is_one(name: str, precision: torch.dtype) -> None:
    corpus = graphs(*drugs())
    objective = make_objective(name)
    objective.prepare(corpus, seed=0)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        torch.testing.assert_close(at_zero(objective, corpus).detach(), torch.tensor(1.0))


def test_no_property_is_in_two_families() -> None:
    names = Counter(itertools.chain(*FAMILIES.values()))
    assert set(names.values()) == {1}
    assert set(PROPERTIES) <= set(names)


def test_descriptors_are_those_of_rdkit_in_c() -> None:
    from rdkit import Chem
    from rdkit.Chem.rdMolDescriptors import Properties

    names = ["amw", "CrippenClogP", "CrippenMR", "tpsa", "NumHBD", "NumHBA", "NumRotatableBonds", "NumRings"]
    properties = Properties([*names, "NumAromaticRings", "FractionCSP3"])
    expected = [torch.tensor([*properties.ComputeProperties(Chem.MolFromSmiles(smiles))]) for smiles in drugs()]
    assert torch.equal(torch.cat(attached(Descriptors(), *drugs())), torch.stack(expected))


def test_the_families_of_butane_are_those_of_their_formulas() -> None:
    def values(family: str) -> dict[str, float]:
        row = attached(make_objective(family), "CCCC", "OCC=O", "c1ccccc1")[0][0].tolist()
        return dict(zip(FAMILIES[family], row, strict=True))

    size, topology = values("size"), values("topology")
    assert (size["HeavyAtomCount"], size["NumValenceElectrons"]) == (4, 26)
    assert size["MolWt"] == pytest.approx(4 * 12.011 + 10 * 1.008)
    # A chain a-b-c-d: sums of distances 6 4 4 6, degrees 1 2 2 1, two paths of two bonds, one of three.
    assert topology["BalabanJ"] == pytest.approx(3 * (2 / math.sqrt(24) + 1 / 4))
    assert topology["Chi1"] == pytest.approx(2 / math.sqrt(2) + 1 / 2)
    assert topology["Chi3v"] == pytest.approx(1 / 2)
    assert topology["Kappa2"] == pytest.approx(3 * 2**2 / 2**2)
    assert topology["Kappa3"] == pytest.approx(math.log1p((4 - 2) * (4 - 3) ** 2 / 1))  # RDKit's form for even numbers
    assert topology["BertzCT"] == pytest.approx(math.log1p(2 * math.log2(2)))  # two pairs of bonds, of one kind
    assert (topology["NumRotatableBonds"], topology["FractionCSP3"], topology["RingCount"]) == (1, 1, 0)
    electronics = values("electronics")
    assert electronics["NumHeteroatoms"] == electronics["NumRadicalElectrons"] == 0
    surface = sum(electronics[f"EState_VSA{bin}"] for bin in range(1, 12))
    assert surface == pytest.approx(sum(_surface("CCCC")), rel=1e-5)
    assert values("polarity") == pytest.approx({"TPSA": 0, "NumHDonors": 0, "NumHAcceptors": 0, "MolLogP": 1.8064})


def _surface(smiles: str) -> list[float]:
    """Return the surface areas of the atoms."""
    from rdkit import Chem
    from rdkit.Chem.rdMolDescriptors import _CalcLabuteASAContribs

    return list(_CalcLabuteASAContribs(Chem.MolFromSmiles(smiles))[0])


def test_a_negative_heavy_tailed_descriptor_keeps_its_sign() -> None:
    from rdkit import Chem
    from rdkit.Chem.Descriptors import Kappa3

    raw = Kappa3(Chem.MolFromSmiles("C#C"))
    assert raw < -1
    assert float(attached(Descriptors(("Kappa3",), "k"), "C#C", "CCCC")[0]) == pytest.approx(-math.log1p(-raw))


def test_a_descriptor_that_is_not_finite_names_the_molecule() -> None:
    chain = "C" * 200
    with pytest.raises(ValueError, match=rf"Ipc of molecule 1 of the corpus, '{chain}', is not finite in float32"):
        Descriptors(("MolWt", "Ipc"), "large").prepare(graphs("CC", chain), seed=0)
    with pytest.raises(ValueError, match="RDKit has no descriptor 'amw'"):
        Descriptors(("amw",), "old").prepare(graphs("CC", "CCC"), seed=0)


def test_an_unknown_descriptor_is_left_out_of_the_mean_and_the_loss() -> None:
    corpus = graphs("CCO", SELENOPHENE, "CC(=O)N", "CCF")
    objective = Descriptors(("MaxPartialCharge",), "charge")
    objective.prepare(corpus, seed=0)
    numbers = torch.cat([graph.descriptors_charge for graph in corpus]).squeeze(1)
    assert numbers.isnan().tolist() == [False, True, False, False]
    known = numbers[[0, 2, 3]].double()
    torch.testing.assert_close(objective.mean, known.mean()[None])
    torch.testing.assert_close(objective.deviation, known.std(correction=0)[None])
    torch.testing.assert_close(at_zero(objective, corpus).detach(), torch.tensor(1.0))


def test_charges_of_molecules_without_hydrogens_add_up_to_the_formal_charge() -> None:
    rows = attached(Charges(), "FC(F)(F)F", "O=C=O", "[O-][Cl+3]([O-])([O-])[O-]")
    for row, total in zip(rows, (0, 0, -1), strict=True):
        assert float(row.sum()) == pytest.approx(total, abs=1e-6)
        assert row.abs().max() > 0.03
    tetrafluoride = attached(Charges(), "FC(F)(F)F", "CO")[0].squeeze(1)
    torch.testing.assert_close(tetrafluoride[[0, 2, 3, 4]], -tetrafluoride[1].expand(4) / 4)


def test_unknown_charges_are_left_out_of_the_mean_and_the_loss() -> None:
    corpus = graphs("CCO", SELENOPHENE, "CC(=O)N")
    objective = Charges()
    objective.prepare(corpus, seed=0)
    assert corpus[1].charges.isnan().all()
    known = torch.cat([corpus[0].charges, corpus[2].charges]).double()
    torch.testing.assert_close(objective.mean, known.mean(0))
    encoder = GINE(width=8, layers=2, norm="layer")
    head = objective.head(encoder)
    losses = [objective.loss(encoder, head, Batch.from_data_list(some)) for some in (corpus, [corpus[0], corpus[2]])]
    torch.testing.assert_close(losses[0], losses[1])
    gradients = [torch.autograd.grad(loss, [*encoder.parameters(), *head.parameters()]) for loss in losses]
    torch.testing.assert_close(gradients[0], gradients[1])
    nothing = objective.loss(encoder, head, Batch.from_data_list([corpus[1]]))
    assert nothing == 0
    assert not any(part.any() for part in torch.autograd.grad(nothing, [*head.parameters()]))


def test_a_graph_with_other_atoms_than_its_smiles_is_refused() -> None:
    corpus = [from_smiles("CC"), from_smiles("CO", with_hydrogen=True)]
    with pytest.raises(
        ValueError, match="molecule 1 of the corpus has 6 atoms, but RDKit reads 2 from its SMILES, 'CO'"
    ):
        Charges().prepare(corpus, seed=0)


def test_fragments_are_counted_once_for_counts_and_presence() -> None:
    from rdkit.Chem import Fragments

    names = sorted(name for name in vars(Fragments) if name.startswith("fr_"))
    corpus = graphs("OCC(O)CO", "CC(=O)Oc1ccccc1C(=O)O", "CC")
    objective = FragmentCounts()
    objective.prepare(corpus, seed=0)
    glycerol, aspirin, ethane = (dict(zip(names, g.fragment_counts[0].tolist(), strict=True)) for g in corpus)
    assert {name: count for name, count in glycerol.items() if count} == {"fr_Al_OH": 3, "fr_Al_OH_noTert": 3}
    assert (aspirin["fr_ester"], aspirin["fr_COO"], aspirin["fr_C_O"], aspirin["fr_benzene"]) == (1, 1, 2, 1)
    assert not any(ethane.values())
    column = objective.columns.index(names.index("fr_Al_OH"))  # type: ignore[union-attr]
    logarithm = math.log1p(3)
    assert float(objective.mean[column]) == pytest.approx(logarithm / 3)
    assert float(objective.deviation[column]) == pytest.approx(logarithm * math.sqrt(2) / 3)


def test_presence_is_read_from_the_counts_on_the_graphs() -> None:
    corpus = [Data(smiles="C", fragment_counts=torch.tensor([[0, 3, 1, 2]])), *graphs("C")]
    corpus[1].fragment_counts = torch.tensor([[1, 1, 1, 0]])
    groups = FunctionalGroups()
    groups.prepare(corpus, seed=0)
    assert groups.columns == [0, 3]
    encoder = GINE(width=8, layers=1)
    head = groups.head(encoder)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    (gradient,) = torch.autograd.grad(groups.loss(encoder, head, Batch.from_data_list(corpus[1:])), [head.bias])
    torch.testing.assert_close(gradient, torch.tensor([0.5 - 1, 0.5 - 0]) / 2)


def test_environments_are_counted_in_the_order_of_the_molecules_that_have_them() -> None:
    rows = attached(FingerprintCounts(), "CC", "CCC", "CCCC", "CCCCC")
    # Methyl groups are in all, methylene groups in three; their numbers are those of the chain.
    assert [row[0, 0].item() for row in rows] == [2, 2, 2, 2]
    assert sorted(row[0, 1].item() for row in rows) == [0, 1, 2, 3]
    molecules = (torch.cat(rows) > 0).sum(0)
    assert (molecules[:-1] >= molecules[1:]).all()
    assert torch.equal(torch.cat(attached(FingerprintCounts(2), "CC", "CCC", "CCCC", "CCCCC")), torch.cat(rows)[:, :2])


def test_all_environments_are_the_sparse_fingerprint() -> None:
    from rdkit import Chem
    from rdkit.Chem import rdFingerprintGenerator

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2)
    for smiles, row in zip(drugs()[:20], attached(FingerprintCounts(5000), *drugs()[:20]), strict=True):
        expected = generator.GetSparseCountFingerprint(Chem.MolFromSmiles(smiles)).GetNonzeroElements().values()
        assert sorted(row[row > 0].tolist()) == sorted(expected)


def test_rare_numbers_are_left_out() -> None:
    common, rare = torch.zeros(2, 200)
    common[:100], rare[0] = 1, 1
    constant, unknown = torch.ones(200), torch.full((200,), math.nan)
    table = torch.stack([rare, common, constant, unknown], 1)
    table[1:150:2] = math.nan
    assert varying_columns(table, "numbers", 0.01) == [1]
    assert varying_columns(table, "numbers") == [0, 1]
    with pytest.raises(ValueError, match="all numbers are the same in all but 1% of the corpus"):
        varying_columns(table[:, :1], "numbers", 0.01)
    corpus = graphs(*["CC", "CCO"] * 60, "NCC")
    objective = FragmentCounts()
    objective.prepare(corpus, seed=0)
    assert {row.fragment_counts[0, objective.columns].sum().item() for row in corpus[::2]} == {0}


def ring(graph: Data, start: int, inner: int, outer: int) -> tuple[list[int], list[int]]:
    """Return the elements, and the types of the bonds, of the context of an atom, by a search in the graph."""
    distance, queue = {start: 0}, [start]
    edges = list(zip(graph.edge_index.T.tolist(), graph.edge_attr[:, 0].tolist(), strict=True))
    for atom in queue:
        for (begin, end), _ in edges:
            if begin == atom and end not in distance:
                distance[end] = distance[atom] + 1
                queue.append(end)
    atoms = {atom for atom, bonds in distance.items() if inner <= bonds <= outer}
    types = sorted(kind for (begin, end), kind in edges if begin < end and begin in atoms and end in atoms)
    return sorted(graph.x[list(atoms), 0].tolist()), types


@pytest.mark.parametrize(("inner", "outer", "classes"), [(2, 3, 512), (1, 2, 5), (3, 3, 2)])
def test_classes_of_contexts_are_the_most_frequent_surroundings(inner: int, outer: int, classes: int) -> None:
    smiles = ("CCCC", "CC(=O)Oc1ccccc1C(=O)O", "OCC1CC1C#N", "C[N+](C)(C)C.[Cl-]", "c1ccc2ccccc2c1", "C")
    corpus = graphs(*smiles)
    objective = ContextPrediction(inner, outer, classes)
    objective.prepare(corpus, seed=0)
    surroundings = [str(ring(graph, atom, inner, outer)) for graph in corpus for atom in range(graph.num_nodes)]
    labels = torch.cat([graph[objective.key] for graph in corpus]).tolist()
    assert [len(graph[objective.key]) for graph in corpus] == [graph.num_nodes for graph in corpus]
    frequency = Counter(surroundings)
    pairs = set(zip(labels, surroundings, strict=True))
    kept = [(label, around) for label, around in sorted(pairs) if label < classes]
    assert len(kept) == min(classes, len(frequency))
    assert len({around for _, around in kept}) == len({label for label, _ in kept}) == len(kept)
    assert [frequency[around] for _, around in kept] == sorted(frequency.values(), reverse=True)[: len(kept)]
    assert objective.classes == max(labels) + 1 == min(classes + 1, len(frequency))


def test_the_contexts_of_butane() -> None:
    # The ends see two atoms and their bond, the middle atoms see one atom: a tie, which the smaller context wins.
    assert attached(ContextPrediction(), "CCCC")[0].tolist() == [1, 0, 0, 1]
    objective = ContextPrediction(classes=1)
    assert attached(objective, "CCCC", "CCC")[1].tolist() == [0, 1, 0]
    assert objective.classes == 2
    with pytest.raises(ValueError, match="all contexts are the same in the corpus"):
        ContextPrediction().prepare(graphs("CC", "C"), seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContextPrediction(inner=0), "1 <= inner <= outer; got 0, 3"),
        (lambda: ContextPrediction(inner=4), "1 <= inner <= outer; got 4, 3"),
        (lambda: ContextPrediction(classes=0), "classes must be a whole number of at least 1; got 0"),
        (lambda: FingerprintCounts(0), "environments must be a whole number of at least 1; got 0"),
    ],
)
def test_wrong_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
