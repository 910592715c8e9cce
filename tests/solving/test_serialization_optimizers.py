"""Optimizers, schedulers and the like resume from a saved state bit-equally."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from saving_cases import through
from states import assert_same_state
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


def states(parts):
    return {name: part.state_dict() for name, part in parts.items()}


def assert_resumes_bit_equally(make):
    """Train, save, train on; train new parts from the saved state too, and compare.

    `make` returns the parts that have a state, by name, and a function that trains them for a number of steps.
    """
    parts, train_parts = make()
    train_parts(3)
    saved = through(states(parts))
    assert_same_state(saved, states(parts))
    train_parts(5)
    resumed, train_resumed = make()
    for name, part in resumed.items():
        part.load_state_dict(saved[name])
    train_resumed(5)
    del parts["optimizer"], resumed["optimizer"]  # torch converts some of its state to the dtype of the parameters
    assert_same_state(states(resumed), states(parts))
    return saved


class NAdam(torch.optim.NAdam):
    def load_state_dict(self, state):
        """Restore `mu_product`, which torch converts to the dtype of the parameters."""
        super().load_state_dict(state)
        for entry, saved in zip(self.state.values(), state["state"].values(), strict=True):
            entry["mu_product"] = saved["mu_product"]


#: Every optimizer that takes a gradient.
OPTIMIZERS = {
    name: kind
    for name, kind in {**vars(torch.optim), "NAdam": NAdam}.items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")
}
VARIANTS = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9, "centered": True}, "Adam": {"amsgrad": True}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_resumes_bit_equally(name, dtype):
    def make():
        parameters = quadratic(dtype)
        chosen = [parameters[0]] if name == "Muon" else list(parameters)
        optimizer = OPTIMIZERS[name](chosen, lr=1e-2, **VARIANTS.get(name, {}))
        return {"module": parameters, "optimizer": optimizer}, lambda count: train(chosen, optimizer, count)

    assert_resumes_bit_equally(make)


def test_an_optimizer_whose_learning_rate_is_a_tensor_is_saved():
    parameters = quadratic()
    optimizer = torch.optim.Adam(parameters, lr=torch.tensor(1e-2), capturable=False, foreach=False)
    train(parameters, optimizer, 2)
    assert_same_state(through(optimizer.state_dict()), optimizer.state_dict())


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
def test_a_scheduler_resumes_bit_equally(name):
    rates = []

    def make():
        parameters = quadratic()
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        losses = itertools.count()

        def after():
            scheduler.step(*[float(next(losses))] * isinstance(scheduler, S.ReduceLROnPlateau))
            rates.append(optimizer.param_groups[0]["lr"])

        parts = {"module": parameters, "optimizer": optimizer, "scheduler": scheduler}
        return parts, lambda count: train(parameters, optimizer, count, after)

    assert_resumes_bit_equally(make)
    # Three steps before the save, five after it, and five in the resumed run.
    assert rates[3:8] == rates[8:]
    assert len(set(rates)) > 1 or name == "ReduceLROnPlateau"


def test_a_gradient_scaler_resumes_bit_equally():
    def make():
        weight = nn.ParameterList([torch.ones(3)])
        scaler, optimizer = torch.amp.GradScaler("cpu", growth_interval=2), torch.optim.SGD(weight, lr=0.1)

        def steps(count):
            for _ in range(count):
                optimizer.zero_grad()
                scaler.scale(weight[0].square().sum()).backward()
                scaler.step(optimizer)
                scaler.update()

        return {"scaler": scaler, "weight": weight, "optimizer": optimizer}, steps

    assert_resumes_bit_equally(make)


def test_an_averaged_model_resumes_bit_equally():
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        averaged = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def steps(count):
            for k in range(count):
                optimizer.zero_grad()
                model(torch.arange(8.0).reshape(4, 2).cos() + k).square().mean().backward()
                optimizer.step()
                averaged.update_parameters(model)

        return {"model": model, "averaged": averaged, "optimizer": optimizer}, steps

    assert_resumes_bit_equally(make)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_a_device_are_loaded_on_the_cpu_and_training_resumes_on_the_device():
    def make():
        parameters = quadratic().to("cuda")
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        return {"module": parameters, "optimizer": optimizer}, lambda count: train(parameters, optimizer, count)

    saved = assert_resumes_bit_equally(make)
    assert {tensor.device.type for tensor in saved["module"].values()} == {"cpu"}
