"""The graph network and its objectives on a GPU, on graphs made by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from cuda_cases import CPU, DEVICE, needs_cuda
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

import mlopt
from mlopt.problem import to_device
from mlopt.recipes.tapweight.molecules import GINE
from mlopt.recipes.tapweight.molecules.encoder import ATOM_SIZES, BOND_SIZES
from mlopt.recipes.tapweight.molecules.objectives import make_objective

pytestmark = needs_cuda

F64 = torch.float64
#: Those that need no RDKit.
OBJECTIVES = ("masked_atoms", "masked_bonds", "contrastive", "random_labels")


def features(count: int, sizes: dict[str, int], draws: torch.Generator) -> Tensor:
    return torch.stack([torch.randint(size, (count,), generator=draws) for size in sizes.values()], dim=1)


def rings(count: int = 6) -> list[Data]:
    """Return rings of 3 to 5 atoms with random features; a bond has an edge in each direction, one after the other."""
    draws, made = torch.Generator().manual_seed(0), []
    for k in range(count):
        size = 3 + k % 3
        ends = torch.stack([torch.arange(size), torch.arange(1, size + 1) % size])
        bonds = features(size, BOND_SIZES, draws).repeat_interleave(2, dim=0)
        edges = torch.stack([ends, ends.flip(0)], dim=2).reshape(2, -1)
        atoms = features(size, ATOM_SIZES, draws)
        made.append(Data(x=atoms, edge_index=edges, edge_attr=bonds, smiles=f"ring {k}"))
    return made


def network(norm: str = "batch") -> GINE:
    torch.manual_seed(0)
    return GINE(width=8, layers=2, norm=norm).to(F64)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("products", ["autograd", "finite_difference"])
def test_a_hypergradient_through_the_network_is_that_of_the_cpu(products: str, norm: str) -> None:
    targets = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=F64)

    def inner(own: GINE, batch: Batch, *, weights: nn.Module) -> Tensor:
        decay = torch.stack([p.square().sum() for p in own.parameters()]).sum()
        errors = (own.pool(batch).mean(1) - targets.to(batch.x.device)).square()
        return (weights().sigmoid() * errors).mean() + 0.1 * decay

    def outer(weights: nn.Module, batch: Batch, *, network: GINE) -> Tensor:
        return network.pool(batch).square().mean()

    gradients = []
    for device in (DEVICE, CPU):
        data = [Batch.from_data_list(rings())]
        rule = mlopt.ConjugateGradient(iterations=3, damping=1.0, products=products)
        problem = mlopt.Problem(
            mlopt.Level("weights", mlopt.variables(torch.zeros(6, dtype=F64)), outer, data=data, device=device),
            mlopt.Level("network", network(norm), inner, data=data, estimator=rule, device=device),
        )
        gradients.append(mlopt.hypergradient(problem, seed=0).gradient["value"].cpu())
        assert data[0].x.device == CPU  # a copy was moved
    bound = 1e-4 if products == "finite_difference" else 1e-8
    torch.testing.assert_close(gradients[0], gradients[1], rtol=bound, atol=0.01 * bound)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_an_objective_is_that_of_the_same_view_on_the_cpu(name: str) -> None:
    graphs, own, objective = rings(), network("layer"), make_objective(name)
    objective.prepare(graphs, 0)
    head = objective.head(own).to(F64)
    batch = Batch.from_data_list(graphs).to(DEVICE)
    view = objective.view(batch)
    there = objective.loss(copy.deepcopy(own).to(DEVICE), copy.deepcopy(head).to(DEVICE), view)
    assert there.device.type == DEVICE.type
    here = objective.loss(own, head, to_device(view, CPU))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-10, atol=0)
    assert torch.equal(batch.x.cpu(), Batch.from_data_list(graphs).x)  # the view is a copy
