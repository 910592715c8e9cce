"""GINE against lookups in each table and torch_geometric's own message passing, with derivatives."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GINEConv
from torch_geometric.utils import from_smiles

from mlopt.recipes.tapweight.molecules.encoder import ATOM_MASK, BOND_MASK, GINE, FeatureEmbedding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def embedded(module: Any, features: Tensor) -> Tensor:
    # Not torch.nn.functional.embedding: its second derivative fails for no rows.
    return torch.stack([table.weight[features[:, k]] for k, table in enumerate(module.tables)]).sum(0)


def reference(network: GINE, batch: Batch) -> Tensor:
    """Return the embeddings of atoms by torch_geometric's GINEConv."""
    nodes, last = embedded(network.atoms, batch.x), len(network.convolutions) - 1
    for layer, (bonds, convolve, norm) in enumerate(
        zip(network.bonds, network.convolutions, network.norms, strict=True)
    ):
        update = norm(GINEConv.forward(convolve, nodes, batch.edge_index, embedded(bonds, batch.edge_attr)))
        update = update if layer == last else update.relu()
        nodes = nodes + update if network.residual else update
    return nodes


@st.composite
def graphs(draw: st.DrawFn) -> Data:
    """Draw a graph of 1 to 5 atoms with bonds in both directions, or without bonds; mask tokens included."""
    atoms = draw(st.integers(1, 5))
    bonds = [(i, j) for i in range(atoms) for j in range(i) if draw(st.booleans())]

    def features(count: int, sizes: Tensor) -> Tensor:
        rows = [[draw(st.integers(0, size)) for size in sizes.tolist()] for _ in range(count)]
        return torch.tensor(rows, dtype=torch.long).reshape(count, len(sizes))

    ends = torch.tensor(bonds + [(j, i) for i, j in bonds], dtype=torch.long).reshape(-1, 2).T
    return Data(x=features(atoms, ATOM_MASK), edge_index=ends, edge_attr=features(len(bonds), BOND_MASK).repeat(2, 1))


def derivatives(nodes: Tensor, network: GINE, cotangent: Tensor, tangent: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of a nonlinear loss of the nodes, and its Hessian-vector product."""
    parameters = list(network.parameters())
    loss = (nodes.square() * cotangent).sum()
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    product = sum((g * t).sum() for g, t in zip(gradient, tangent, strict=True))
    assert isinstance(product, torch.Tensor)
    return *gradient, *torch.autograd.grad(product, parameters, materialize_grads=True)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(graphs(), min_size=1, max_size=3), st.sampled_from(["batch", "layer"]), st.booleans(), st.integers(0, 99)
)
def test_values_gradients_and_hessian_products(drawn: list[Data], norm: Any, residual: bool, seed: int) -> None:
    torch.manual_seed(seed)
    network = GINE(width=5, layers=2, norm=norm, residual=residual).double().eval()
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand_like(tensor))
    batch = Batch.from_data_list(drawn)
    nodes, expected = network(batch), reference(network, batch)
    torch.testing.assert_close(nodes, expected, rtol=1e-12, atol=1e-12)
    cotangent, tangent = torch.randn_like(nodes), [torch.randn_like(p) for p in network.parameters()]
    pairs = zip(
        derivatives(nodes, network, cotangent, tangent), derivatives(expected, network, cotangent, tangent), strict=True
    )
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12 * max(1.0, float(other.detach().abs().max())))


@pytest.fixture
def batch() -> Batch:
    return Batch.from_data_list([from_smiles(smiles) for smiles in ("CC(=O)Oc1ccccc1C(=O)O", "C", "C[N+](C)(C)C")])


def test_forward_mode_and_vmap_agree_with_the_reference(batch: Batch) -> None:
    torch.manual_seed(0)
    network = GINE(width=6, layers=2, norm="layer").double()
    parameters = dict(network.named_parameters())
    tangents = {name: torch.randn(3, *p.shape, dtype=p.dtype) for name, p in parameters.items()}

    def own(values: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(network, values, (batch,))
        return output

    def by_tables(values: dict[str, Tensor]) -> Tensor:
        copied = copy.deepcopy(network)
        for name, value in values.items():
            owner, _, leaf = name.rpartition(".")
            delattr(module := copied.get_submodule(owner), leaf)
            setattr(module, leaf, value)
        return reference(copied, batch)

    results = [
        torch.func.vmap(lambda tangent, f=f: torch.func.jvp(f, (parameters,), (tangent,))[1])(tangents)
        for f in (own, by_tables)
    ]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("norm", "residual"), [("layer", True), ("batch", False)])
def test_autocast_computes_the_same_types_and_values(batch: Batch, norm: Any, residual: bool) -> None:
    torch.manual_seed(0)
    network = GINE(width=16, layers=3, norm=norm, residual=residual)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nodes, expected = network(batch), reference(network, batch)
    assert nodes.dtype == expected.dtype
    torch.testing.assert_close(nodes, expected, rtol=0.02, atol=0.02)


def test_copies_compute_the_same(batch: Batch) -> None:
    network = GINE(width=6, layers=2).eval()
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(copied(batch), network(batch))


@pytest.mark.parametrize("sizes", [{"a": 3}, {"a": 30, "b": 30}, {"a": 4, "b": 3, "c": 600, "d": 2, "e": 1}])
def test_every_combination_of_features_has_the_sum_of_its_rows(sizes: dict[str, int]) -> None:
    module = FeatureEmbedding(sizes, 3).double()
    features = torch.stack([torch.randint(0, size + 1, (500,)) for size in sizes.values()], dim=1)
    torch.testing.assert_close(module(features), embedded(module, features), rtol=1e-14, atol=1e-14)
