"""Estimates for levels that `fully_shard` will shard, beside the resident memory of two processes."""

from __future__ import annotations

import ctypes
import gc
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sharded_cases
import torch
from processes import in_processes
from torch import Tensor, nn
from torch.optim import Adam

import mlopt
from benchmarks.memory import Encoder
from mlopt.diagnosis import estimate_requirements
from mlopt.diagnosis.sharding import Sharding

ESTIMATORS: dict[str, Callable[[], mlopt.Estimator]] = {
    "differences": mlopt.FiniteDifference,
    "cg by differences": partial(
        mlopt.ConjugateGradient, iterations=2, rtol=0.0, damping=1.0, products="finite_difference"
    ),
}
ROWS, WIDTH, LAYERS = 16, 640, 3


def of(estimator: mlopt.Estimator, shard: sharded_cases.Sharding, width: int = WIDTH) -> mlopt.Problem:
    """Return weights of rows outside, a network of equal layers inside."""

    def training(model: nn.Module, batch: Any, *, weights: nn.Module) -> Tensor:
        inputs, labels, index = batch
        return (weights()[index].sigmoid() * (model(inputs).sum(1) - labels).square()).mean()

    def validation(weights: nn.Module, batch: Any, *, model: nn.Module) -> Tensor:
        inputs, labels, _ = batch
        return (model(inputs).sum(1) - labels).square().mean()

    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.Tanh())))
    data = [(torch.randn(ROWS, width), torch.randn(ROWS), torch.arange(ROWS))]
    own = {"data": data, "optimizer": partial(Adam, lr=1e-4)}
    return mlopt.Problem(
        mlopt.Level("weights", mlopt.variables(torch.zeros(ROWS)), validation, **own),
        mlopt.Level("model", shard(net), training, estimator=estimator, **own),
        group=sharded_cases.group_of(shard),
    )


def resident(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def peaks(sharding: str) -> dict[str, int]:
    """Return the most that a run holds in this process, modules included, as the operating system counts it.

    Threads of gloo free memory, which torch's profiler does not see.
    """
    warnings.simplefilter("ignore")
    library, shard, result = ctypes.CDLL(None), getattr(sharded_cases, sharding), {}
    library.mallopt(-3, 65_536)  # M_MMAP_THRESHOLD: tensors are given back at once
    mlopt.solve(of(mlopt.FiniteDifference(), shard, width=64), 2, seed=0, progress=False)
    for name, make in ESTIMATORS.items():
        problem = of(make(), shard)
        modules = sum(x._local_tensor.untyped_storage().nbytes() for x in problem["model"].parameters)  # type: ignore[attr-defined]
        gc.collect()
        library.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # restart the peak
        before = resident("VmRSS")
        mlopt.solve(problem, 2, seed=0, progress=False)
        result[name] = modules + resident("VmHWM") - before
    return result


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux reports the peak of a process")
@pytest.mark.parametrize("sharding", ["parts", pytest.param("root", marks=pytest.mark.slow)])
def test_the_peak_is_that_of_two_processes(sharding: str, tmp_path: Path) -> None:
    outcomes = in_processes(2, peaks, sharding, folder=tmp_path)
    for name, make in ESTIMATORS.items():
        problem = of(make(), sharded_cases.alone)
        parts = [layer for layer in problem["model"].module.children() if isinstance(layer, nn.Linear)]
        sharded = {"model": parts if sharding == "parts" else []}
        estimate = estimate_requirements(problem, processes=2, sharded=sharded)
        for peak in outcomes:
            assert estimate.memory == pytest.approx(peak[name], rel=0.15), name


def test_vectors_are_divided_and_units_are_gathered() -> None:
    """Of two layers in eight processes, each holds 5 of 40 rows, and 1 row of 4: the rows are rounded up."""
    net = nn.Sequential(nn.Linear(10, 40, bias=False), nn.Linear(40, 4, bias=False))
    level = mlopt.Level("x", net, lambda x, batch: x[0].weight.sum())
    spread = Sharding.of(level, [net[0]], 8)
    assert spread.ratio == (5 * 10 + 1 * 40) / (400 + 160)
    # The first layer and its gradients, and the last unit, which stays whole.
    assert spread.gathered == (2 - 1 / 8) * 1600 + 640
    assert Sharding.of(level, [], 8).gathered == (2 - 1 / 8) * 2240
    assert Sharding.of(level, [net, net[0]], 8) == spread  # a unit leaves out those inside it


def test_states_and_gradients_are_those_of_a_part() -> None:
    problem = of(mlopt.FiniteDifference(), sharded_cases.alone)
    whole = estimate_requirements(problem, processes=4)
    parts = estimate_requirements(problem, processes=4, sharded={"model": ()})
    for name in ("variables", "gradient", "optimizer"):
        own, other = (getattr(estimate.levels["model"], name) for estimate in (parts, whole))
        assert own == pytest.approx(other / 4, rel=1e-3)
    assert parts.levels["weights"] == whole.levels["weights"]
    assert mlopt.diagnose(problem, processes=4, sharded={"model": ()}).requirements == parts


def test_the_encoder_of_the_page_has_as_many_variables_as_deberta() -> None:
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    options |= {"vocab_size": 128_100, "type_vocab_size": 0, "position_biased_input": False, "position_buckets": 256}
    options |= {"relative_attention": True, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
    config = transformers.DebertaV2Config(pos_att_type=["p2c", "c2p"], **options)
    with torch.device("meta"):
        models = transformers.DebertaV2Model(config), Encoder()
    shapes, own = (sorted(tuple(p.shape) for p in model.parameters()) for model in models)
    assert own == shapes


def test_what_cannot_be_sharded_is_refused() -> None:
    problem = of(mlopt.Identity(), sharded_cases.alone)
    with pytest.raises(mlopt.ProblemError, match=r"level 'model': .*use FiniteDifference\(\)"):
        estimate_requirements(problem, processes=2, sharded={"model": ()})
    for name in ("weights", "modle"):
        with pytest.raises(mlopt.ArgumentError, match=f"sharded='{name}'.*a level inside: model"):
            estimate_requirements(problem, processes=2, sharded={name: ()})
