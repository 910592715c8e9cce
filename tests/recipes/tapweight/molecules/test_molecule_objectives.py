"""The molecular objectives: views, targets, losses."""

from __future__ import annotations

import copy
import math
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from second_derivatives import by_double_backward, by_forward_over_reverse, random_tangent
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch_geometric.data import Batch, Data, Dataset
from torch_geometric.utils import from_smiles

import mlopt
from mlopt.recipes.tapweight.molecules.encoder import ATOM_MASK, BOND_MASK, GINE
from mlopt.recipes.tapweight.molecules.objectives import (
    OBJECTIVES,
    ContrastiveViews,
    Descriptors,
    FingerprintClusters,
    FunctionalGroups,
    MaskedAtoms,
    MaskedBonds,
    RandomLabels,
    make_objective,
)
from mlopt.recipes.tapweight.molecules.objectives.contrastive import nt_xent
from mlopt.recipes.tapweight.molecules.objectives.fingerprint_clusters import morgan_fingerprints
from mlopt.recipes.tapweight.objective import NotPreparedError, Objective

if TYPE_CHECKING:
    from collections.abc import Sequence

# Well-known drugs, hormones and sugars, without stereochemistry.
DRUGS = r"""
CC(=O)Oc1ccccc1C(=O)O Cn1cnc2c1c(=O)n(C)c(=O)n2C CC(C)Cc1ccc(cc1)C(C)C(=O)O CC(=O)Nc1ccc(O)cc1 CN1CCCC1c1cccnc1
CN1C2CCC1C(C(=O)OC)C(OC(=O)c1ccccc1)C2 OC(=O)c1ccccc1O CC(N)Cc1ccccc1 NCCc1ccc(O)c(O)c1 CNCC(O)c1ccc(O)c(O)c1
NCCc1c[nH]c2ccc(O)cc12 CN(C)C(=N)NC(=N)N CC(C)NCC(O)COc1cccc2ccccc12 CC(C)NCC(O)COc1ccc(CC(N)=O)cc1
CNCCC(Oc1ccc(cc1)C(F)(F)F)c1ccccc1 CNC1CCC(c2ccc(Cl)c(Cl)c2)c2ccccc12 CN1C(=O)CN=C(c2ccccc2)c2cc(Cl)ccc12
CCN(CC)CC(=O)Nc1c(C)cccc1C CCN(CC)CCOC(=O)c1ccc(N)cc1 Clc1ccccc1C(c1ccccc1)(c1ccccc1)n1ccnc1
OC(Cn1cncn1)(Cn1cncn1)c1ccc(F)cc1F Cc1ncc([N+](=O)[O-])n1CCO NC(=O)c1cnccn1 NNC(=O)c1ccncc1
Nc1ccc(cc1)S(=O)(=O)Nc1ncccn1 Cc1cc(NS(=O)(=O)c2ccc(N)cc2)no1 COc1cc(Cc2cnc(N)nc2N)cc(OC)c1OC
CC1(C)SC2C(NC(=O)Cc3ccccc3)C(=O)N2C1C(=O)O OC(=O)c1cn(C2CC2)c2cc(N3CCNCC3)c(F)cc2c1=O NC(=O)N1c2ccccc2C=Cc2ccccc12
O=C1NC(=O)C(c2ccccc2)(c2ccccc2)N1 CCCC(CCC)C(=O)O NCC1(CC(=O)O)CCCCC1 CC(C)CC(CN)CC(=O)O CCC1(c2ccccc2)C(=O)NC(=O)NC1=O
NC(=O)OCC(COC(N)=O)c1ccccc1 CN(C)CCC=C1c2ccccc2CCc2ccccc12 CN(C)CCCN1c2ccccc2Sc2ccc(Cl)cc12
OCCN1CCN(CCCN2c3ccccc3Sc3ccc(cc23)C(F)(F)F)CC1 CN(C)CCOC(c1ccccc1)c1ccccc1 CCOC(=O)N1CCC(=C2c3ccc(Cl)cc3CCc3cccnc23)CC1
CNC(=C[N+](=O)[O-])NCCSCc1ccc(CN(C)C)o1 COc1ccc2[nH]c(nc2c1)S(=O)Cc1ncc(C)c(OC)c1C
NS(=O)(=O)c1cc(C(=O)O)c(NCc2ccco2)cc1Cl NS(=O)(=O)c1cc2c(cc1Cl)NCNS2(=O)=O CC(CS)C(=O)N1CCCC1C(=O)O
CCOC(=O)C1=C(C)NC(C)=C(C(=O)OC)C1c1cccc(Cl)c1Cl CC(=O)CC(c1ccccc1)c1c(O)c2ccccc2oc1=O
CC12CCC3C(CCC4=CC(=O)CCC34C)C1CCC2O CC12CCC3c4ccc(O)cc4CCC3C1CCC2O CC12CC(O)C3C(CCC4=CC(=O)C=CC34C)C1CCC2(O)C(=O)CO
CC(C)CCCC(C)C1CCC2C3CC=C4CC(O)CCC4(C)C3CCC12C CN1CCC23C4Oc5c2c(CC1C3C=CC4O)ccc5O CCC(=O)N(c1ccccc1)C1CCN(CCc2ccccc2)CC1
CCC(=O)C(CC(C)N(C)C)(c1ccccc1)c1ccccc1 CN(C)CC1CCCCC1(O)c1cccc(OC)c1 O=c1[nH]cc(F)c(=O)[nH]1
Nc1nc2c(ncn2COCCO)c(=O)[nH]1 Cc1cn(C2CC(N=[N+]=[N-])C(CO)O2)c(=O)[nH]c1=O OCC1OC(O)C(O)C(O)C1O OC1C(=O)OC(C(O)CO)C1=O
CC(C)(C)NCC(O)c1ccc(O)c(CO)c1 Cn1c(=O)c2[nH]cnc2n(C)c1=O CCC1OC(=O)C=CC1=O C#CC1(O)CCC2C3CCC4=CC(=O)CCC4C3CCC12C
CS(=O)(=O)c1ccc(cc1)C1=C(c2ccccc2)C(=O)OC1
"""
SMILES = DRUGS.split()
NAMES = list(OBJECTIVES)
RANDOM_VIEWS = ("masked_atoms", "masked_bonds", "contrastive")


@pytest.fixture(scope="module")
def corpus() -> list[Data]:
    """Return the molecules with all targets attached."""
    graphs = [from_smiles(smiles) for smiles in SMILES]
    for name in NAMES:
        make_objective(name).prepare(graphs, seed=0)
    return graphs


@pytest.fixture
def batch(corpus: list[Data]) -> Batch:
    return Batch.from_data_list(corpus)


def ready(name: str, corpus: Sequence[Data], width: int = 24) -> tuple[Objective, GINE, nn.Module]:
    """Return an objective, an encoder and the objective's head, the same at each call."""
    torch.manual_seed(0)
    objective = make_objective(name)
    objective.prepare(corpus, seed=0)
    encoder = GINE(width=width, layers=2, norm="layer")
    return objective, encoder, objective.head(encoder)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_reaches_the_encoder_and_the_head(name: str, corpus: list[Data], batch: Batch) -> None:
    objective, encoder, head = ready(name, corpus)
    loss = objective.loss(encoder, head, objective.view(batch))
    assert loss.shape == ()
    assert loss.isfinite()
    loss.backward()
    unreached = [key for key, p in (*encoder.named_parameters(), *head.named_parameters()) if p.grad is None]
    assert not unreached
    assert encoder.atoms.tables[0].weight.grad.norm() > 0
    assert encoder.bonds[0].tables[0].weight.grad.norm() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_view_leaves_the_batch_alone(name: str, corpus: list[Data], batch: Batch) -> None:
    objective, _, _ = ready(name, corpus)
    before, keys = copy.deepcopy(batch), batch.keys()
    objective.view(batch)
    assert batch.keys() == keys
    for key, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(batch[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_replays_a_view_and_its_loss(name: str, corpus: list[Data], batch: Batch) -> None:
    objective, encoder, head = ready(name, corpus)
    state = torch.get_rng_state()
    losses = [objective.loss(encoder, head, objective.view(batch)) for _ in range(2)]
    torch.set_rng_state(state)
    assert torch.equal(objective.loss(encoder, head, objective.view(batch)), losses[0])
    assert torch.equal(losses[0], losses[1]) != (name in RANDOM_VIEWS)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random_labels"])
def test_the_loss_falls_under_adam(name: str, corpus: list[Data], batch: Batch) -> None:
    objective, encoder, head = ready(name, corpus, width=32)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=3e-3)

    def mean_loss() -> float:
        """Return the mean over fixed views, which keeps chance out of the comparison."""
        torch.manual_seed(1)
        with torch.no_grad():
            return sum(float(objective.loss(encoder, head, objective.view(batch))) for _ in range(4)) / 4

    before = mean_loss()
    for _ in range(15):
        optimizer.zero_grad()
        objective.loss(encoder, head, objective.view(batch)).backward()
        optimizer.step()
    assert mean_loss() < 0.85 * before


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_agree_on_both_routes(name: str, corpus: list[Data]) -> None:
    objective, encoder, head = ready(name, corpus, width=8)
    network = nn.ModuleList([encoder, head]).double()
    view = objective.view(Batch.from_data_list(corpus[:8]))
    tangent = random_tangent(network)

    def loss(network: nn.ModuleList) -> Tensor:
        return objective.loss(network[0], network[1], view)

    product = by_double_backward(network, loss, tangent)
    assert product.abs().sum() > 1e-3
    torch.testing.assert_close(by_forward_over_reverse(network, loss, tangent), product, rtol=1e-9, atol=1e-11)


def test_masked_atoms_are_hidden_and_their_targets_are_their_elements(batch: Batch) -> None:
    view = MaskedAtoms().view(batch)
    masked = view.masked_atoms
    assert len(masked) == round(0.15 * len(batch.x)) == len(masked.unique())
    assert torch.equal(view.atomic_numbers, batch.x[masked, 0])
    assert (view.x[masked] == ATOM_MASK).all()
    others = ~torch.isin(torch.arange(len(batch.x)), masked)
    assert torch.equal(view.x[others], batch.x[others])
    assert torch.equal(MaskedAtoms().view(Batch.from_data_list([from_smiles("O")])).atomic_numbers, torch.tensor([8]))


def test_masked_bonds_are_hidden_in_both_directions_with_the_features_that_reveal_them(batch: Batch) -> None:
    view = MaskedBonds().view(batch)
    number = batch.edge_index.shape[1] // 2
    hidden = {frozenset(pair) for pair in view.masked_bonds.T.tolist()}
    assert len(hidden) == view.masked_bonds.shape[1] == round(0.15 * number)
    types = {frozenset(p): int(f[0]) for p, f in zip(batch.edge_index.T.tolist(), batch.edge_attr, strict=True)}
    assert [types[frozenset(pair)] for pair in view.masked_bonds.T.tolist()] == view.bond_types.tolist()
    for pair, before, after in zip(batch.edge_index.T.tolist(), batch.edge_attr, view.edge_attr, strict=True):
        assert torch.equal(after, BOND_MASK if frozenset(pair) in hidden else before)
    ends = torch.tensor(sorted(set().union(*hidden)))
    revealing, kept = [1, 2, 4, 6, 7], [0, 3, 5, 8]
    assert (view.x[ends][:, revealing] == ATOM_MASK[revealing]).all()
    assert torch.equal(view.x[ends][:, kept], batch.x[ends][:, kept])
    assert torch.equal(view.edge_index, batch.edge_index)


def test_masked_bonds_see_the_two_atoms_alike(corpus: list[Data], batch: Batch) -> None:
    objective, encoder, head = ready("masked_bonds", corpus)
    view = objective.view(batch)
    turned = copy.copy(view)
    turned.masked_bonds = view.masked_bonds.flip(0)
    torch.testing.assert_close(objective.loss(encoder, head, turned), objective.loss(encoder, head, view))


def test_the_loss_of_masked_bonds_without_bonds_is_a_zero_with_a_gradient(corpus: list[Data]) -> None:
    objective, encoder, head = ready("masked_bonds", corpus)
    loss = objective.loss(encoder, head, objective.view(Batch.from_data_list([from_smiles("C"), from_smiles("[K+]")])))
    assert loss == 0
    loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


def test_nt_xent_is_the_written_formula() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 7, dtype=torch.float64)
    rows, total = torch.cat([first, second]), 0.0
    for i in range(10):
        similar = [math.exp(float(cosine_similarity(rows[i], rows[k], dim=0)) / 0.1) for k in range(10)]
        total -= math.log(similar[(i + 5) % 10] / (sum(similar) - similar[i]))
    assert float(nt_xent(first, second, 0.1)) == pytest.approx(total / 10, rel=1e-12)


def test_contrastive_views_drop_whole_bonds_and_mask_whole_atoms(batch: Batch) -> None:
    number = batch.edge_index.shape[1] // 2
    views = ContrastiveViews(mask_rate=0.3, drop_rate=0.2).view(batch)
    for view in views:
        edges = set(map(tuple, view.edge_index.T.tolist()))
        assert len(edges) == view.edge_attr.shape[0] == 2 * (number - round(0.2 * number))
        assert {(j, i) for i, j in edges} == edges
        features = {(*p, *f) for p, f in zip(batch.edge_index.T.tolist(), batch.edge_attr.tolist(), strict=True)}
        assert {(*p, *f) for p, f in zip(view.edge_index.T.tolist(), view.edge_attr.tolist(), strict=True)} <= features
        masked = (view.x == ATOM_MASK).all(1)
        assert masked.sum() == round(0.3 * len(batch.x))
        assert torch.equal(view.x[~masked], batch.x[~masked])
    assert not torch.equal(views[0].x, views[1].x)
    with pytest.raises(ValueError, match="batch holds 1: use batches of at least 2"):
        ContrastiveViews().view(Batch.from_data_list(batch.to_data_list()[:1]))
    assert not torch.equal(views[0].edge_index, views[1].edge_index)


def test_functional_groups_are_those_of_the_molecule(corpus: list[Data]) -> None:
    from rdkit.Chem import Fragments

    names = sorted(name for name in vars(Fragments) if name.startswith("fr_"))
    aspirin, caffeine = ({n for n, yes in zip(names, g.fragment_counts[0], strict=True) if yes} for g in corpus[:2])
    assert {"fr_ester", "fr_COO", "fr_benzene"} <= aspirin
    assert "fr_imidazole" in caffeine
    assert "fr_COO" not in caffeine
    objective = FunctionalGroups()
    objective.prepare(corpus, seed=0)
    table = torch.cat([graph.fragment_counts for graph in corpus]) > 0
    kept = table[:, objective.columns].float().mean(0)
    assert ((kept > 0) & (kept < 1)).all()
    assert 0 < len(objective.columns) < table.shape[1]


def test_descriptors_are_standardised_rdkit_values(corpus: list[Data], batch: Batch) -> None:
    from rdkit import Chem
    from rdkit.Chem import Crippen
    from rdkit.Chem.Descriptors import MolWt

    table = torch.cat([graph.descriptors for graph in corpus])
    molecules = [Chem.MolFromSmiles(smiles) for smiles in SMILES]
    torch.testing.assert_close(table[:, 0], torch.tensor([MolWt(m) for m in molecules]))
    torch.testing.assert_close(table[:, 1], torch.tensor([Crippen.MolLogP(m) for m in molecules]))
    objective, encoder, head = ready("descriptors", corpus)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    loss = objective.loss(encoder, head, batch).detach()
    torch.testing.assert_close(loss, torch.tensor(1.0))  # predicting the mean


def test_clusters_are_those_of_mini_batch_k_means() -> None:
    from rdkit import Chem
    from rdkit.Chem import rdFingerprintGenerator
    from sklearn.cluster import MiniBatchKMeans

    graphs = [from_smiles(smiles) for smiles in SMILES]
    objective = FingerprintClusters(clusters=(4, 6))
    objective.prepare(graphs, seed=3)
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    fingerprints = [generator.GetFingerprintAsNumPy(Chem.MolFromSmiles(smiles)).tolist() for smiles in SMILES]
    assert morgan_fingerprints(graphs).toarray().tolist() == fingerprints
    for number in (4, 6):
        kmeans = MiniBatchKMeans(number, random_state=3, n_init=1).fit(morgan_fingerprints(graphs))
        assert [int(graph[f"clusters_{number}"]) for graph in graphs] == kmeans.labels_.tolist()
    assert not objective.remarks
    assert graphs[0].clusters_4.untyped_storage().nbytes() == 8  # a pickled graph does not carry the corpus's table
    assert [linear.out_features for linear in objective.head(GINE(width=8, layers=1))] == objective.classes


def test_too_many_clusters_are_reduced_with_a_remark() -> None:
    objective = FingerprintClusters()
    objective.prepare([from_smiles(smiles) for smiles in SMILES], seed=0)
    assert objective.remarks == [
        f"100 clusters reduced to 6: the corpus has {len(SMILES)} molecules",
        f"1000 clusters reduced to 6: the corpus has {len(SMILES)} molecules",
    ]
    assert max(objective.classes) <= 6
    with pytest.raises(ValueError, match="needs at least 20 molecules, but the corpus has 19; give a larger corpus"):
        FingerprintClusters().prepare([from_smiles(smiles) for smiles in SMILES[:19]], seed=0)


def test_random_labels_are_even_and_the_same_everywhere() -> None:
    graphs = [Data(smiles="C" * length) for length in range(1, 1601)]
    RandomLabels(classes=8).prepare(graphs, seed=0)
    labels = torch.cat([graph.random_labels_8 for graph in graphs])
    counts = labels.bincount(minlength=8).double()
    assert float(((counts - 200) ** 2 / 200).sum()) < 24.3  # chi-squared with 7 degrees of freedom: p > 0.001
    assert labels[:8].tolist() == [3, 3, 5, 0, 6, 1, 2, 0]  # a change would make results incomparable


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RANDOM_VIEWS])
def test_attached_targets_need_no_chemistry(
    name: str, corpus: list[Data], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [*sys.modules]:
        if module.partition(".")[0] in ("rdkit", "sklearn"):
            monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "rdkit", None)
    objective, encoder, head = ready(name, corpus)
    assert objective.loss(encoder, head, objective.view(batch)).isfinite()
    if name != "random_labels":
        bare = [Data(smiles=smiles) for smiles in SMILES]
        with pytest.raises(
            mlopt.MissingDependencyError, match=r"needs rdkit, which is not installed.*mlopt-torch\[molecules\]"
        ):
            make_objective(name).prepare(bare, seed=0)


def test_a_corpus_that_cannot_be_prepared_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ValueError, match="molecule 1 of the corpus, 'c1cc', is not a SMILES that RDKit reads; leave it out"
    ):
        FunctionalGroups().prepare([Data(smiles="C"), Data(smiles="c1cc")], seed=0)
    for objective in (FunctionalGroups(), Descriptors()):
        with pytest.raises(
            ValueError, match=r"are the same in (all but 1% of )?the corpus, so there is nothing to predict; leave"
        ):
            objective.prepare([from_smiles("CCO") for _ in range(3)], seed=0)
    with pytest.raises(ValueError, match="the corpus is empty"):
        RandomLabels().prepare([], seed=0)
    with pytest.raises(NotPreparedError, match=r"Descriptors.prepare\(corpus, seed\) must run first"):
        Descriptors().head(GINE(width=8, layers=1))

    class Fleeting(Dataset):
        def len(self) -> int:
            return 2

        def get(self, idx: int) -> Data:
            return Data(smiles="C" * (idx + 1))

    with pytest.raises(mlopt.ArgumentError, match="Fleeting creates its graphs at each access"):
        RandomLabels().prepare(Fleeting(), seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskedAtoms(rate=0), "rate must be above 0 and below 1; got 0"),
        (lambda: MaskedBonds(rate=1.0), "rate must be above 0"),
        (lambda: ContrastiveViews(temperature=0), "temperature must be above 0; got 0"),
        (lambda: FingerprintClusters(clusters=(1,)), "clusters must be different numbers of at least 2"),
        (lambda: RandomLabels(classes=1), "classes must be at least 2; got 1"),
        (
            lambda: make_objective("mask_atoms"),
            "no objective 'mask_atoms'; available: 'masked_atoms'.*did you mean 'masked_atoms'",
        ),
        (lambda: make_objective("zzz"), "no objective 'zzz'; available: 'masked_atoms', 'masked_bonds', 'contrastive'"),
    ],
)
def test_wrong_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class RingCount(Objective):
    """An objective of a user: regress the number of rings, bonds - atoms + fragments, for whole molecules."""

    name = "ring_count"

    def head(self, encoder: nn.Module) -> nn.Module:
        return nn.Linear(encoder.width, 1)

    def view(self, batch: Batch) -> Batch:
        view = copy.copy(batch)
        atoms = torch.bincount(batch.batch, minlength=batch.num_graphs)
        bonds = torch.bincount(batch.batch[batch.edge_index[0]], minlength=batch.num_graphs) // 2
        view.rings = (bonds - atoms + 1).float()
        return view

    def loss(self, encoder: nn.Module, head: nn.Module, view: Batch) -> Tensor:
        return (head(encoder.pool(view)).squeeze(1) - view.rings).square().mean()


def test_an_objective_of_a_user(batch: Batch) -> None:
    torch.manual_seed(0)
    objective, encoder = RingCount(), GINE(width=24, layers=2)
    head = objective.head(encoder)
    view = objective.view(batch)
    assert view.rings[:2].tolist() == [1, 2]  # aspirin, caffeine
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(15):
        losses.append(objective.loss(encoder, head, view))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
