"""Optimisers, schedulers and the like that were saved half-way go on bit-equally to those that were not."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from saving_cases import same, through
from torch import nn
from torch.optim import lr_scheduler


def quadratic(dtype=torch.float64):
    """Return a matrix and a vector to train, the same each time."""
    torch.manual_seed(0)
    return nn.ParameterList([torch.randn(3, 2, dtype=dtype), torch.randn(2, dtype=dtype)])


def train(parameters, optimizer, steps, after=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p * p.sin()).sum() for p in parameters).backward()
        if isinstance(optimizer, torch.optim.SparseAdam):
            for p in parameters:
                p.grad = p.grad.to_sparse()
        optimizer.step()
        after()


#: Every optimiser that takes a gradient.
OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")
}
VARIANTS = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9, "centered": True}, "Adam": {"amsgrad": True}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_bit_equally(name, dtype):
    def made():
        parameters = quadratic(dtype)
        chosen = [parameters[0]] if name == "Muon" else list(parameters)
        return parameters, chosen, OPTIMIZERS[name](chosen, lr=1e-2, **VARIANTS.get(name, {}))

    parameters, chosen, optimizer = made()
    train(chosen, optimizer, 3)
    state = {"optimizer": optimizer.state_dict(), "module": parameters.state_dict()}
    found = through(state)
    assert same(state, found)
    train(chosen, optimizer, 3)
    others, chosen, optimizer = made()
    others.load_state_dict(found["module"])
    optimizer.load_state_dict(found["optimizer"])
    if name == "NAdam":
        # Its own load_state_dict turns a float32 product of its into the parameters' dtype.
        for entry, kept in zip(optimizer.state.values(), found["optimizer"]["state"].values(), strict=True):
            entry["mu_product"] = kept["mu_product"]
    train(chosen, optimizer, 3)
    assert same(parameters.state_dict(), others.state_dict())


def test_an_optimizer_whose_learning_rate_is_a_tensor_goes_on():
    parameters = quadratic()
    optimizer = torch.optim.Adam(parameters, lr=torch.tensor(1e-2), capturable=False, foreach=False)
    train(parameters, optimizer, 2)
    assert same(optimizer.state_dict(), through(optimizer.state_dict()))


S = lr_scheduler


def chained(optimizer):
    return S.ChainedScheduler([S.ExponentialLR(optimizer, 0.9), S.ConstantLR(optimizer, 0.5, 4)], optimizer)


def sequential(optimizer):
    return S.SequentialLR(optimizer, [S.LinearLR(optimizer, total_iters=3), S.CosineAnnealingLR(optimizer, 9)], [4])


class Halving:
    """A schedule with a state of its own."""

    def __init__(self):
        self.factor = 0.5

    def __call__(self, epoch):
        return self.factor**epoch


SCHEDULERS = {
    "LambdaLR": partial(S.LambdaLR, lr_lambda=lambda epoch: 0.9**epoch),
    "LambdaLR of an object": lambda optimizer: S.LambdaLR(optimizer, Halving()),
    "MultiplicativeLR": partial(S.MultiplicativeLR, lr_lambda=lambda epoch: 0.9),
    "StepLR": partial(S.StepLR, step_size=2),
    "MultiStepLR": partial(S.MultiStepLR, milestones=[2, 4, 4]),
    "ConstantLR": partial(S.ConstantLR, total_iters=4),
    "LinearLR": S.LinearLR,
    "ExponentialLR": partial(S.ExponentialLR, gamma=0.9),
    "PolynomialLR": S.PolynomialLR,
    "CosineAnnealingLR": partial(S.CosineAnnealingLR, T_max=5),
    "CosineAnnealingWarmRestarts": partial(S.CosineAnnealingWarmRestarts, T_0=3, T_mult=2),
    "CyclicLR": partial(S.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2, mode="triangular2"),
    "CyclicLR by a function": partial(
        S.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2, scale_fn=lambda x: 1 / (x + 1)
    ),
    "OneCycleLR": partial(S.OneCycleLR, max_lr=0.1, total_steps=20),
    "ReduceLROnPlateau": partial(S.ReduceLROnPlateau, patience=0, threshold=10.0),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "SWALR": lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_bit_equally(name):
    def made():
        parameters = quadratic()
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        rates = []
        losses = itertools.count()

        def after():
            scheduler.step(*[float(next(losses))] * isinstance(scheduler, S.ReduceLROnPlateau))
            rates.append(optimizer.param_groups[0]["lr"])

        return parameters, optimizer, scheduler, rates, after

    parameters, optimizer, scheduler, rates, after = made()
    train(parameters, optimizer, 3, after)
    parts = {"module": parameters, "optimizer": optimizer, "scheduler": scheduler}
    state = {key: part.state_dict() for key, part in parts.items()}
    found = through(state)
    assert same(state, found)
    train(parameters, optimizer, 5, after)
    others, optimizer, scheduler, others_rates, after = made()
    for key, part in {"module": others, "optimizer": optimizer, "scheduler": scheduler}.items():
        part.load_state_dict(found[key])
    train(others, optimizer, 5, after)
    assert same(rates[3:], others_rates)
    assert same(parameters.state_dict(), others.state_dict())
    assert len(set(rates)) > 1 or name == "ReduceLROnPlateau"


def test_a_gradient_scaler_goes_on_bit_equally():
    def step(scaler, weight):
        optimizer = torch.optim.SGD([weight], lr=0.1)
        scaler.scale(weight.square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    weight = nn.Parameter(torch.ones(3))
    scaler, fresh = (torch.amp.GradScaler("cpu", growth_interval=2) for _ in range(2))
    for _ in range(3):
        step(scaler, weight)
    found = through({"scaler": scaler.state_dict(), "weight": weight})
    assert same(scaler.state_dict(), found["scaler"])
    fresh.load_state_dict(found["scaler"])
    other = nn.Parameter(found["weight"])
    for _ in range(3):
        step(scaler, weight)
        weight.grad = None
    for _ in range(3):
        step(fresh, other)
        other.grad = None
    assert same(scaler.state_dict(), fresh.state_dict())


def test_an_averaged_model_goes_on_bit_equally():
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        averaged = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        return model, averaged, torch.optim.SGD(model.parameters(), lr=0.1)

    def steps(model, averaged, optimizer):
        for k in range(3):
            optimizer.zero_grad()
            model(torch.arange(8.0).reshape(4, 2).cos() + k).square().mean().backward()
            optimizer.step()
            averaged.update_parameters(model)

    parts = made()
    steps(*parts)
    found = through({str(k): part.state_dict() for k, part in enumerate(parts)})
    steps(*parts)
    others = made()
    for k, part in enumerate(others):
        part.load_state_dict(found[str(k)])
    steps(*others)
    assert same(parts[1].state_dict(), others[1].state_dict())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_on_a_device_comes_back_on_the_cpu_and_goes_on_there():
    def made():
        parameters = quadratic().to("cuda")
        return parameters, torch.optim.Adam(parameters, lr=1e-2)

    parts = made()
    train(*parts, 3)
    state = {str(k): part.state_dict() for k, part in enumerate(parts)}
    found = through(state)
    assert found["0"]["1"].device.type == "cpu"
    assert torch.equal(found["0"]["1"], parts[0][1].cpu())
    train(*parts, 3)
    others = made()
    for k, part in enumerate(others):
        part.load_state_dict(found[str(k)])
    train(*others, 3)
    assert all(map(torch.equal, parts[0], others[0]))
