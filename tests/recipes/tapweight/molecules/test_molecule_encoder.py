"""The GINE encoder: files, invariances, second derivatives, refusals."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from second_derivatives import by_differences, by_double_backward, by_forward_over_reverse, random_tangent
from torch_geometric.data import Batch
from torch_geometric.utils import from_smiles

from mlopt.recipes.tapweight.molecules.encoder import ATOM_MASK, BOND_MASK, GINE

if TYPE_CHECKING:
    from pathlib import Path

SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "C", "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "C[N+](C)(C)CC(=O)[O-]", "[Na+].[Cl-]", "C#N"]


@pytest.fixture
def batch() -> Batch:
    return Batch.from_data_list([from_smiles(smiles) for smiles in SMILES])


def randomised(network: GINE) -> GINE:
    """Move every parameter and running statistic away from its initial value."""
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return network


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_shapes_and_gradients(batch: Batch, norm: Any, pooling: Any) -> None:
    network = GINE(width=16, layers=2, norm=norm, pooling=pooling)
    assert network(batch).shape == (len(batch.x), 16)
    pooled = network.pool(batch)
    assert pooled.shape == (len(SMILES), network.width)
    pooled.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_pool_is_the_mean_or_the_sum_of_a_molecules_atoms(batch: Batch) -> None:
    for pooling in ("mean", "sum"):
        network = GINE(width=8, layers=2, pooling=pooling).eval()
        nodes, pooled = network(batch), network.pool(batch)
        for molecule in range(len(SMILES)):
            own = nodes[batch.batch == molecule]
            torch.testing.assert_close(pooled[molecule], own.mean(0) if pooling == "mean" else own.sum(0))


def test_a_molecule_without_atoms_keeps_its_row() -> None:
    batch = Batch.from_data_list([from_smiles("CO"), from_smiles("")])
    pooled = GINE(width=8, layers=1).pool(batch)
    assert pooled.shape == (2, 8)
    assert not pooled[1].any()


@pytest.mark.parametrize("residual", [False, True])
def test_a_layer_is_the_documented_equation(residual: bool) -> None:
    graph = Batch.from_data_list([from_smiles("C=O")])
    network = GINE(width=8, layers=1, norm="layer", residual=residual).double()
    nodes, bonds = network.atoms(graph.x), network.bonds[0](graph.edge_attr)
    messages = (nodes[graph.edge_index[0]] + bonds).relu()
    total = nodes.clone().index_add(0, graph.edge_index[1], messages)
    expected = network.norms[0](network.convolutions[0].nn(total))
    torch.testing.assert_close(network(graph), nodes + expected if residual else expected)


@pytest.mark.parametrize("residual", [False, True])
def test_pool_does_not_depend_on_the_order_of_atoms_and_bonds(batch: Batch, residual: bool) -> None:
    network = randomised(GINE(width=16, layers=3, residual=residual).double()).eval()
    order = torch.randperm(len(batch.x), generator=torch.Generator().manual_seed(0))
    bonds = torch.randperm(batch.edge_index.shape[1], generator=torch.Generator().manual_seed(1))
    place = order.argsort()
    shuffled = batch.clone()
    shuffled.x, shuffled.batch = batch.x[order], batch.batch[order]
    shuffled.edge_index, shuffled.edge_attr = place[batch.edge_index[:, bonds]], batch.edge_attr[bonds]
    torch.testing.assert_close(network.pool(shuffled), network.pool(batch), rtol=1e-12, atol=1e-12)


def test_bonds_and_their_features_matter(batch: Batch) -> None:
    network = GINE(width=16, layers=2).eval()
    changed = batch.clone()
    changed.edge_attr[:, 0] = BOND_MASK[0]
    assert not torch.allclose(network.pool(changed), network.pool(batch))


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("smiles", [["C"], ["C", "[Na+]", "O"]])
def test_molecules_without_bonds(smiles: list[str], norm: Any) -> None:
    batch = Batch.from_data_list([from_smiles(molecule) for molecule in smiles])
    assert batch.edge_attr.shape == (0, 3)
    network = GINE(width=8, layers=2, norm=norm)
    pooled = network.pool(batch)
    assert pooled.shape == (len(smiles), 8)
    assert pooled.isfinite().all()
    pooled.sum().backward()


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_second_derivatives(batch: Batch, norm: Any) -> None:
    torch.manual_seed(0)
    network = randomised(GINE(width=12, layers=3, norm=norm).double())
    if norm == "batch":  # in training mode it counts batches in place, which torch.func refuses
        network.eval()
    target = torch.randn(batch.num_graphs, network.width, dtype=torch.float64)
    tangent = random_tangent(network)

    def loss(network: GINE) -> torch.Tensor:
        return (network.pool(batch) - target).square().mean()

    product = by_double_backward(network, loss, tangent)
    assert product.norm() > 0.1
    torch.testing.assert_close(by_forward_over_reverse(network, loss, tangent), product, rtol=1e-10, atol=1e-12)
    assert (by_differences(network, loss, tangent) - product).norm() < 1e-6 * product.norm()


def test_batch_norm_in_training_mode_has_a_double_backward(batch: Batch) -> None:
    torch.manual_seed(0)
    network = randomised(GINE(width=12, layers=2).double())
    tangent = random_tangent(network)

    def loss(network: GINE) -> torch.Tensor:
        return network.pool(batch).square().mean()

    product = by_double_backward(network, loss, tangent)
    assert (by_differences(network, loss, tangent) - product).norm() < 1e-6 * product.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load_are_bit_equal(batch: Batch, tmp_path: Path, dtype: torch.dtype) -> None:
    network = randomised(GINE(width=12, layers=2, dropout=0.25, norm="batch", pooling="sum", residual=True).to(dtype))
    network.pool(batch)  # moves the running statistics
    network.save(tmp_path / "new" / "folder")
    loaded = GINE.load(tmp_path / "new" / "folder")
    assert loaded.config == network.config
    assert loaded.state_dict().keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
    assert torch.equal(loaded.eval().pool(batch), network.eval().pool(batch))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_save_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GINE(width=8, layers=1).save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def interrupted(tensors: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("mlopt.recipes.tapweight.molecules.encoder.save_file", interrupted)
    with pytest.raises(OSError, match="disk full"):
        GINE(width=8, layers=1).save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, 'lacks "format": "mlopt-gine"'),
        ({"version": 2}, "version 2; this release reads version 1"),
        ({"heads": 4}, r"unknown keys \['heads'\]"),
        ({"pooling": None}, r"lacks keys \['pooling'\]"),
        ({"norm": "group"}, "norm must be one of 'batch', 'layer'; got 'group'"),
        ({"width": 16}, "model.safetensors does not fit"),
        ({"layers": 2}, "model.safetensors does not fit"),
    ],
)
def test_load_refuses_an_unknown_config(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    GINE(width=8, layers=1).save(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        GINE.load(tmp_path)


def test_load_refuses_a_config_that_is_not_a_json_mapping(tmp_path: Path) -> None:
    GINE(width=8, layers=1).save(tmp_path)
    for text, message in (("{", "is not JSON"), ("[1]", "is not the config of a GINE")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            GINE.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_load_names_a_missing_file(tmp_path: Path, name: str) -> None:
    GINE(width=8, layers=1).save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        GINE.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width must be a whole number of at least 1; got 0"),
        ({"layers": 1.5}, "layers must be"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1; got 1.0"),
        ({"pooling": "max"}, "pooling must be one of 'mean', 'sum'; got 'max'"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GINE(**arguments)


def test_mask_tokens_have_an_embedding_and_values_beyond_them_are_refused(batch: Batch) -> None:
    network = GINE(width=8, layers=1)
    assert [table.num_embeddings for table in network.atoms.tables] == (ATOM_MASK + 1).tolist()
    batch.x[:] = ATOM_MASK
    batch.edge_attr[:] = BOND_MASK
    assert network(batch).isfinite().all()
    batch.x[3, 2] += 1
    with pytest.raises(ValueError, match="feature 'degree' has values from 11 to 12"):
        network(batch)
    batch.x[3, 2] = 0
    batch.edge_attr[0, 1] = -1
    with pytest.raises(ValueError, match="feature 'stereo' has values from -1 to 6"):
        network(batch)
    batch.x = batch.x[:, :8]
    with pytest.raises(ValueError, match=r"features must be \(N, 9\)"):
        network(batch)


def test_dropout_only_acts_in_training(batch: Batch) -> None:
    network = GINE(width=8, layers=2, dropout=0.5, norm="layer")
    assert not torch.equal(network.pool(batch), network.pool(batch))
    network.eval()
    assert torch.equal(network.pool(batch), network.pool(batch))
